"`rsna_seg demo` as a newcomer runs it."

import json
import subprocess
import sys

import pytest


@pytest.mark.long
def test_demo(tmp_path):
    command = [sys.executable, "-c", "from rsna_seg.app.cli import main; main()", "demo", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    result = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert done.stdout.count("random weights") == 1
    assert result["mean_dice"] >= 0.85, result
    assert (tmp_path / "demo" / "report" / "report.html").exists()
    assert len(list((tmp_path / "demo" / "predicted").glob("*/organs.nii.gz"))) == 4
