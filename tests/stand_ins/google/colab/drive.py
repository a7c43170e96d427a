"A Drive that is a folder, $STAND_IN_DRIVE."

import os
from pathlib import Path

SHOWN = []


class MessageError(Exception):
    "What Colab raises if its window is closed or a box in it has no tick."


def mount(point):
    "Lets the folder appear as MyDrive; raises what Colab raises if the user refuses."
    if "STAND_IN_DRIVE" not in os.environ:
        raise MessageError("Error: credential propagation was unsuccessful")
    Path(point).mkdir(parents=True, exist_ok=True)
    if not Path(point, "MyDrive").is_symlink():
        Path(point, "MyDrive").symlink_to(os.environ["STAND_IN_DRIVE"])
    SHOWN[:] = [Path(point, "MyDrive")]
    print(f"Mounted at {point}")


def flush_and_unmount():
    "Takes MyDrive away; raises what Colab raises if not all could be uploaded, with $STAND_IN_DRIVE_FULL."
    if "STAND_IN_DRIVE_FULL" in os.environ:
        raise ValueError("flush_and_unmount failed")
    for link in SHOWN:
        link.unlink(missing_ok=True)
