"What the benchmarks share: named ways to do one work, timed in turn, as a table and as JSON."

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from rsna_seg.engines.engines import processor
from rsna_seg.files import whole_file


def words(question, quick=True):
    "The words of a benchmark, as a parser to which others may be added; `quick` where nothing has to be learned first."
    parser = argparse.ArgumentParser(description=question)
    if quick:
        parser.add_argument("--quick", action="store_true", help="same work per round, fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    return parser


def arguments(question):
    "Those words and no others."
    return words(question).parse_args()


def machine():
    "Processor, cores and memory."
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    system = platform.platform()
    return {"cpu": processor(), "cores": os.cpu_count(), "memory_gb": round(memory, 1), "system": system}


def versions_of(*packages):
    "Their installed versions by name."
    return {name: version(name) for name in packages}


def speeds(ways, work, unit, rounds):
    "`work` per second of each way, each once a round; the first round does not count."
    seconds = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: summary([work / s for s in taken], unit) for name, taken in seconds.items()}


def summary(values, unit):
    "Median and spread of some rounds."
    spread = {"min": min(values), "max": max(values)}
    return {"median": statistics.median(values), **spread, "unit": unit}


def report(question, results, ratios, packages, rounds, file=None):
    "Prints the results as a table, and writes them as JSON."
    table = pd.DataFrame(results).T
    for column in ("median", "min", "max"):
        table[column] = [f"{value:.3g}" for value in table[column]]
    print(question, table.to_string(), "", sep="\n")
    print(*(f"{name}: {ratio:.2f}" for name, ratio in ratios.items()), sep="\n")
    if file:
        everything = {
            "question": question, "machine": machine(), "versions": versions_of(*packages), "rounds": rounds,
            "results": results, "ratios": ratios,
        }  # fmt: skip
        with whole_file(file) as part:
            part.write_text(json.dumps(everything, indent=2))
