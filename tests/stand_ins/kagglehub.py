"Datasets that lie in a folder, $STAND_IN_KAGGLE, for whoever has the token `right`."

import os
from pathlib import Path


def dataset_download(handle):
    "The folder of a dataset."
    if os.environ.get("KAGGLE_API_TOKEN") != "right":
        raise PermissionError(f"403 Client Error for {handle}.\nThe second line is never shown.")
    return str(Path(os.environ["STAND_IN_KAGGLE"], handle))
