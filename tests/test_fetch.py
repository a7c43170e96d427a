"What `rsna_seg fetch` leaves on the disk, whatever happens on the way. Kaggle is never asked: a stand-in serves phantoms."

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

pytest.importorskip("pyarrow")

from rsna_seg import fetch as fetching
from rsna_seg.fetch import COMPETITION, FetchConfig, fetch
from rsna_seg.files import ConfigError, DataError, OutputError
from rsna_seg.phantom import write_kaggle

QUICK = FetchConfig(jobs=4, tries=3, wait=0.001)


def refusal(status, **headers):
    error = OSError(f"{status} Client Error")
    error.response = SimpleNamespace(status_code=status, headers=headers)
    return error


class StandIn:
    "kagglehub's download call on a local folder; `mishaps` are errors to raise or lengths to cut to, per file."

    def __init__(self, folder, mishaps={}, seconds=0.0):
        self.folder, self.mishaps, self.seconds = folder, {k: list(v) for k, v in mishaps.items()}, seconds
        self.asked, self.at_once, self.most = [], 0, 0
        self.lock = threading.Lock()

    def __call__(self, handle, path=None, *, force_download=False, output_dir=None):
        assert handle == COMPETITION and path and output_dir
        with self.lock:
            self.asked.append(path)
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        try:
            time.sleep(self.seconds)
            return self.serve(path, Path(output_dir))
        finally:
            with self.lock:
                self.at_once -= 1

    def serve(self, path, output_dir):
        mishap = self.mishaps[path].pop(0) if self.mishaps.get(path) else None
        if isinstance(mishap, BaseException):
            raise mishap
        if not (self.folder / path).exists():
            raise refusal(404)
        marker = output_dir / ".complete" / "competitions" / COMPETITION / f"{path}.complete"
        for file, data in ((output_dir / path, (self.folder / path).read_bytes()), (marker, b"")):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data if mishap is None else data[:mishap])
        return str(output_dir / path)


def content(folder):
    files = [p for p in folder.rglob("*") if p.is_file() and ".fetch" not in p.parts]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def kaggle(tmp_path_factory):
    "Phantoms as Kaggle has them: the last of the five series lacks a mask, and there are other files."
    folder = tmp_path_factory.mktemp("source") / "kaggle"
    meta = write_kaggle(folder, patients=4, size=48, slices=6)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.glob("train_images/*/*/*.dcm"))
    pd.DataFrame({"Rows": 48, "path": names}).to_parquet(folder / "train_dicom_tags.parquet")
    (folder / "segmentations" / f"{meta.series_id.iloc[-1]}.nii").unlink()
    (folder / "train.csv").write_text("patient_id,any_injury\n10000,0\n")
    return folder


@pytest.fixture(scope="module")
def wanted(kaggle):
    "What a complete fetch leaves: the tables it reads, the masks, and the slices of the series with masks."
    masked = {p.stem for p in kaggle.glob("segmentations/*")}
    files = content(kaggle)
    del files["train.csv"]
    return {k: v for k, v in files.items() if not k.startswith("train_images") or k.split("/")[2] in masked}


def test_folder_is_the_source_s_without_the_other_series(kaggle, wanted, tmp_path):
    source = StandIn(kaggle)
    table = fetch(tmp_path / "ct", QUICK, source)
    assert content(tmp_path / "ct") == wanted
    assert sorted(table["mask"]) == sorted(n for n in wanted if n.startswith("segmentations"))
    assert table.slices.sum() == sum(n.endswith(".dcm") for n in wanted)
    source.asked.clear()
    assert fetch(tmp_path / "ct", QUICK, source).equals(table)
    assert source.asked == []
    assert sorted(os.listdir(tmp_path / "ct" / ".fetch")) == ["absent", "masked.json"]


def test_prepare_reads_the_folder_like_kaggle_s(kaggle, tmp_path):
    from rsna_seg.data import PrepareConfig, prepare

    fetch(tmp_path / "ct", QUICK, StandIn(kaggle))
    config = PrepareConfig(size=48, jobs=1)
    data, whole = prepare(tmp_path / "ct", tmp_path / "data", config=config), prepare(kaggle, tmp_path / "whole", config=config)
    assert data.info["kind"] == whole.info["kind"] == "Kaggle's competition folder"
    assert data.skipped.empty and data.manifest.equals(whole.manifest)


def test_what_passes_is_tried_again(kaggle, wanted, tmp_path):
    slices = [n for n in wanted if n.endswith(".dcm")]
    mask = next(n for n in wanted if n.startswith("segmentations"))
    mishaps = {
        "train_series_meta.csv": [ConnectionError("down"), refusal(500)], "train_dicom_tags.parquet": [40, refusal(429)],
        mask: [refusal(503), 1000], slices[0]: [0], slices[1]: [TimeoutError()], slices[2]: [-1, 700], slices[3]: [-8],
    }  # fmt: skip
    source = StandIn(kaggle, mishaps)
    fetch(tmp_path, QUICK, source)
    assert content(tmp_path) == wanted
    assert {n: source.asked.count(n) for n in mishaps} == {n: 1 + len(m) for n, m in mishaps.items()}


def test_damaged_and_absent_files_are_told_and_the_rest_arrives(kaggle, wanted, tmp_path):
    bad = [n for n in wanted if n.endswith(".dcm")][4]
    with pytest.raises(DataError, match=f"{bad} arrives damaged.*missing for such reasons: 1,"):
        fetch(tmp_path, QUICK, StandIn(kaggle, {bad: [300] * 3}))
    assert content(tmp_path).keys() == wanted.keys() - {bad}
    with pytest.raises(DataError, match=f"no file {bad}"):
        fetch(tmp_path, QUICK, StandIn(kaggle, {bad: [refusal(404)]}))
    source = StandIn(kaggle)
    fetch(tmp_path, QUICK, source)
    assert source.asked == [bad]
    assert content(tmp_path) == wanted


def test_damaged_mask_leaves_its_series_for_the_next_time(kaggle, wanted, tmp_path):
    bad = next(n for n in wanted if n.startswith("segmentations"))
    with pytest.raises(DataError, match=f"{bad} arrives damaged"):
        fetch(tmp_path, QUICK, StandIn(kaggle, {bad: [400] * 3}))
    assert not (tmp_path / bad).exists() and len(list(tmp_path.glob("train_images/*/*"))) == 3
    fetch(tmp_path, QUICK, StandIn(kaggle))
    assert content(tmp_path) == wanted


@pytest.mark.parametrize(("error", "says", "kind", "asks"), [
    (refusal(403), "accept the rules.*competitions/rsna-2023-abdominal-trauma-detection/rules", ConfigError, 1),
    (refusal(401), "API token at https://www.kaggle.com/settings", ConfigError, 1),
    (refusal(429), "refuses so many requests.*give the same command again", DataError, 3),
    (ConnectionError("no route"), "check your network", DataError, 3),
])  # fmt: skip
def test_refusals_end_in_a_sentence(kaggle, tmp_path, error, says, kind, asks):
    source = StandIn(kaggle, {"train_series_meta.csv": [error] * 3})
    with pytest.raises(kind, match=says) as told:
        fetch(tmp_path, QUICK, source)
    assert "\n" not in str(told.value) and len(source.asked) == asks
    assert content(tmp_path) == {}


def test_refusal_in_the_middle_ends_the_fetch(kaggle, wanted, tmp_path):
    slices = [n for n in wanted if n.endswith(".dcm")]
    source = StandIn(kaggle, {slices[0]: [refusal(429)] * 9}, seconds=0.01)
    started = time.perf_counter()
    with pytest.raises(DataError, match="so many requests"):
        fetch(tmp_path, FetchConfig(jobs=2, tries=2, wait=0.01), source)
    assert time.perf_counter() - started < 5
    assert content(tmp_path).items() <= wanted.items()


def test_a_pause_that_the_server_asks_for_is_kept(kaggle, tmp_path):
    busy = refusal(429, **{"Retry-After": "1"})
    started = time.perf_counter()
    fetch(tmp_path, QUICK, StandIn(kaggle, {"train_series_meta.csv": [busy]}))
    assert time.perf_counter() - started >= 1


def test_pauses_double_up_to_ten_minutes():
    assert [fetching._pause(refusal(503), 2.0, k) for k in (0, 1, 5, 9, 199)] == [2, 4, 64, 600, 600]
    assert fetching._pause(refusal(429, **{"Retry-After": "3600"}), 2.0, 0) == 3600


def test_full_disk_is_not_tried_again(kaggle, wanted, tmp_path, monkeypatch):
    source = StandIn(kaggle, {"train_series_meta.csv": [OSError(28, "No space left on device", "x")] * 3})
    with pytest.raises(OutputError, match="No space left"):
        fetch(tmp_path, QUICK, source)
    assert len(source.asked) == 1
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    source = StandIn(kaggle)
    with pytest.raises(DataError, match="choose a larger disk"):
        fetch(tmp_path, QUICK, source)
    assert sorted(source.asked) == ["train_dicom_tags.parquet", "train_series_meta.csv"]
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        fetch(tmp_path / "file", QUICK, StandIn(kaggle))


def test_downloads_run_side_by_side(kaggle, wanted, tmp_path):
    source = StandIn(kaggle, seconds=0.02)
    fetch(tmp_path, FetchConfig(jobs=4, wait=0.001), source)
    assert source.most == 4
    assert content(tmp_path) == wanted


def test_chosen_series(kaggle, wanted, tmp_path):
    series = next(n for n in wanted if n.endswith(".dcm")).split("/")[2]
    table = fetch(tmp_path, FetchConfig(series=(series,)), StandIn(kaggle))
    assert list(table.series) == [series]
    assert {n.split("/")[2] for n in content(tmp_path) if n.endswith(".dcm")} == {series}
    with pytest.raises(ConfigError, match="no series 7 in"):
        fetch(tmp_path, FetchConfig(series=("7",)), StandIn(kaggle))
    maskless = ({p.name for p in kaggle.glob("train_images/*/*")} - {Path(n).stem for n in wanted if n[0] == "s"}).pop()
    with pytest.raises(DataError, match=f"{maskless} has no mask"):
        fetch(tmp_path, FetchConfig(series=(maskless,)), StandIn(kaggle))
    fetch(tmp_path, QUICK, StandIn(kaggle))
    assert content(tmp_path) == wanted


def test_shortened_table_of_series_is_told(kaggle, wanted, tmp_path):
    size = len(wanted["train_series_meta.csv"])
    with pytest.raises(DataError, match="train_series_meta.csv has no row for series .*; delete it and fetch it again"):
        fetch(tmp_path, QUICK, StandIn(kaggle, {"train_series_meta.csv": [size // 2]}))
    assert not (tmp_path / "train_images").exists()
    (tmp_path / "train_series_meta.csv").unlink()
    fetch(tmp_path, QUICK, StandIn(kaggle))
    assert content(tmp_path) == wanted


@pytest.mark.parametrize(("table", "says"), [
    ({"file": ["a"]}, "has no column `path`.*only file"),
    ({"path": ["images/1/2/3.dcm"]}, "names 'images/1/2/3.dcm' where"),
    ({"path": []}, "is expected"),
])  # fmt: skip
def test_another_table_is_refused(kaggle, tmp_path, table, says):
    pd.DataFrame(table).to_parquet(tmp_path / "train_dicom_tags.parquet")
    with pytest.raises(DataError, match=says):
        fetch(tmp_path, QUICK, StandIn(kaggle))


def test_other_files_among_the_slices_are_told(kaggle, tmp_path):
    folder = Path(fetch(tmp_path, QUICK, StandIn(kaggle)).series[0])
    folder = next(tmp_path.glob(f"train_images/*/{folder}"))
    (folder / "9999.dcm").write_bytes(b"?")
    with pytest.raises(DataError, match="delete the folder"):
        fetch(tmp_path, QUICK, StandIn(kaggle))


@pytest.mark.parametrize("package", ["kagglehub", "pyarrow.parquet"])
def test_missing_extra(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"pip install 'rsna_seg\[fetch\]'"):
        fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_where_kaggle_has_mounted_the_files_nothing_is_fetched(kaggle, tmp_path):
    with pytest.raises(ConfigError, match=f"rsna_seg prepare {kaggle} DATA"):
        fetch(tmp_path, QUICK, lambda handle, path, output_dir: str(kaggle / path))
    assert (kaggle / "train_series_meta.csv").exists()


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in its background has it ignored
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_fetch import StandIn, FetchConfig, fetch
fetch(sys.argv[3], FetchConfig(jobs=4, wait=60), StandIn(Path(sys.argv[2]), {sys.argv[4]: [ConnectionError()] * 9}, seconds=0.1))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_and_resumed(kaggle, wanted, tmp_path, how):
    "Also while a thread waits a minute for its next try."
    waits = [n for n in wanted if n.endswith(".dcm")][0]
    words = [sys.executable, "-c", INTERRUPTED, Path(__file__).parent, kaggle, tmp_path, waits]
    process = subprocess.Popen([str(w) for w in words], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while len(list(tmp_path.glob("train_images/*/*/*.dcm"))) < 4:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(how)
        process.wait(10)
    finally:
        process.kill()
    here = content(tmp_path)
    assert here.items() <= wanted.items() and len(here) < len(wanted)
    source = StandIn(kaggle)
    fetch(tmp_path, QUICK, source)
    assert content(tmp_path) == wanted and not set(source.asked) & set(here)
    assert list((tmp_path / ".fetch").glob("part-*")) == []


class Server(BaseHTTPRequestHandler):
    "As much of Kaggle's API as kagglehub asks for here: a redirect for each file, and a list in pages."

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        what = self.path.rsplit("/", 1)[1]
        self.server.asked.append(what)
        if self.headers["Authorization"] != "Bearer token":
            self.answer(self.server.status_for_strangers, b"{}")
        elif what == "ListDataTreeFiles":
            assert body["path"] == "segmentations"
            names, first = sorted(os.listdir(self.server.folder / "segmentations")), int(body.get("pageToken") or 0)
            page = {"files": [{"name": n} for n in names[first : first + 3]], "nextPageToken": "3" if first == 0 else ""}
            self.answer(200, json.dumps(page).encode())
        elif (self.server.folder / body["fileName"]).is_file():
            self.answer(302, b"", Location=f"/files/{body['fileName']}")
        else:
            self.answer(404, b'{"code": 404, "message": "Not Found"}')

    def do_GET(self):
        name = self.path.removeprefix("/files/")
        data = (self.server.folder / name).read_bytes()
        breaks_off = name in self.server.break_off
        self.server.break_off.discard(name)
        self.close_connection = breaks_off
        self.answer(200, data, len(data) // 2 if breaks_off else None, kind="application/octet-stream")

    def answer(self, status, data, sent=None, kind="application/json", **headers):
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": len(data), **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(data[:sent])

    def log_message(self, *words):
        pass


@pytest.fixture
def server(kaggle, tmp_path, monkeypatch):
    "kagglehub, real but for the address that it talks to."
    pytest.importorskip("kagglehub")
    from kagglesdk import kaggle_env

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.folder, server.asked, server.status_for_strangers, server.break_off = kaggle, [], 401, set()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    monkeypatch.setenv("KAGGLE_API_TOKEN", "token")
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, address)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("masks", [4, 206])
def test_kagglehub_itself_against_a_server_here(server, wanted, tmp_path, monkeypatch, capfd, masks):
    "The list of masks is used if it is complete; else each mask is asked for."
    monkeypatch.setattr(fetching, "MASKED_SERIES", masks)
    fetch(tmp_path / "ct", QUICK)
    assert content(tmp_path / "ct") == wanted
    assert server.asked.count("ListDataTreeFiles") == 2
    assert server.asked.count("DownloadDataFile") == len(wanted) + (1 if masks == 4 else 3)
    out, err = capfd.readouterr()
    assert out == "" and "Downloading" not in err and "B/s" not in err
    assert logging.getLogger("kagglehub").level != logging.ERROR


def test_connection_that_breaks_off_is_noticed(server, wanted, tmp_path):
    "Even in a CSV, which can be read when shortened."
    server.break_off |= {"train_series_meta.csv", next(n for n in wanted if n.endswith(".dcm"))}
    fetch(tmp_path / "ct", QUICK)
    assert content(tmp_path / "ct") == wanted and not server.break_off


def test_kagglehub_s_own_errors_end_in_a_sentence(server, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", "wrong")
    with pytest.raises(ConfigError, match="API token"):
        fetch(tmp_path, QUICK)
    server.status_for_strangers = 403
    with pytest.raises(ConfigError, match="accept the rules"):
        fetch(tmp_path, QUICK)
    server.status_for_strangers = 503
    with pytest.raises(DataError, match="error 503"):
        fetch(tmp_path, QUICK)
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    with pytest.raises(ConfigError, match="API token"):
        fetch(tmp_path, QUICK)
    (tmp_path / "kaggle.json").write_text("{")
    with pytest.raises(ConfigError, match="download it again"):
        fetch(tmp_path, QUICK)
    assert content(tmp_path).keys() == {"kaggle.json"}


def test_offline_kagglehub_ends_in_a_sentence(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match="check your network"):
        fetch(tmp_path, QUICK)
