"""Liver, spleen, kidneys and bowel outlined in abdominal CT: train, evaluate and predict."""

__version__ = "0.1.0"

from importlib import import_module

_CHAPTERS = ("data", "augment", "model", "train", "finetune", "evaluate", "predict")
_HOME = {
    "prepare": "data",
    "open_data": "ct.store",
    "read_scan": "ct.dicom",
    "Scan": "ct.scan",
    "ORGANS": "ct.organs",
    "load_checkpoint": "model",
    "TrainConfig": "train",
    "FinetuneConfig": "finetune",
    "Predictor": "predict",
}
__all__ = [*_CHAPTERS, *_HOME]


def __getattr__(name):
    "A chapter, or a name from its module, imported when it is first asked for."
    if name in _CHAPTERS:
        return import_module(f".{name}", __name__)
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
