"""Processor time that a token costs in a page: `python benchmarks/browser_cpu_time.py FILE...` (GGUF, ONNX folders).

One thread. Processor time does not wait for other programs, so that it can be compared on a machine that is shared;
what `phoneready bench --on browser` reports is wall time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import psutil

from exporters.onnx.folder import find_graph, is_onnx
from runtime_bench.browser.chromium import (
    fetch_packages,
    find_chromium,
    open_page,
    renderer_bytes,
)
from runtime_bench.browser.worker import OpenModel, served_files
from runtime_bench.engines import SessionSettings
from runtime_bench.targets.local import Browser
from runtime_bench.worker import WorkerRequest, random_tokens
from runtime_bench.workload import Workload

TOKENS = 32


def renderers_seconds() -> float:
    """Processor time of all renderers below this process."""
    processes = psutil.Process().children(recursive=True)
    times = [p.cpu_times() for p in processes if any("--type=renderer" in part for part in p.cmdline())]
    return float(sum(time.user + time.system for time in times))


def measure(name: str) -> tuple[float, float]:
    """Milliseconds of processor time a token, and MiB of the renderer's peak."""
    path = find_graph(name, last_logits=True) if is_onnx(name) else Path(name)
    workload = Workload("tg", n_gen=TOKENS)
    request = WorkerRequest(
        str(path), Browser().default_engine(path), workload, SessionSettings(workload.n_ctx, 1, 128, 128)
    )
    packages = fetch_packages()
    with open_page(find_chromium(), packages, served_files(request)) as page:
        model = OpenModel(page, request, packages)
        pieces = [[token] for token in random_tokens(model, request, TOKENS)]
        page.call("bench.time", {"pieces": pieces[:8]}, None, [], 1)  # compiled by now
        before = renderers_seconds()
        page.call("bench.time", {"pieces": pieces}, None, [], 1)
        used = renderers_seconds() - before
        return 1000 * used / TOKENS, (renderer_bytes()[1] or 0) / 2**20


def main() -> None:
    """A line a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a GGUF file or an ONNX folder")
    for name in parser.parse_args().files:
        milliseconds, mib = measure(name)
        print(f"{name}: {milliseconds:.0f} ms of processor time a token, peak {mib:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
