"Processes that a server forks: what takes seconds to import is imported once."

import multiprocessing

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["pytest", "nbdev.test", "albumentations", "rsna_seg.app.cli", "rsna_seg.finetune", "rsna_seg.ct.phantom"]
)  # fmt: skip
