"""What Chromium's throttling slows down: `python benchmarks/browser_throttling.py [-r 5]`.

The same work, products of the score's matrix (`runtime_bench/browser/page/score.html`), on the page's main thread and
in a worker of the page, at several rates in turns. Shown is the time that it took, median over rounds, in times of that
at rate 1. Wants an idle machine: processor time would tell less, since a throttled main thread is kept busy whether it
has work or not.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from statistics import median

from runtime_bench.browser.chromium import Page, fetch_packages, find_chromium, open_page

RATES = (1, 2, 4, 8)
PRODUCTS = 20_000
_WORK = """
async (bytes, products, rows, columns) => {
  const { instance } = await WebAssembly.instantiate(bytes);
  new Float32Array(instance.exports.memory.buffer).fill(0.5);
  for (let i = 0; i < products; i++) instance.exports.multiply(rows, columns);
}
"""
_MODULE = "Uint8Array.from(atob(MODULE), (character) => character.charCodeAt(0))"
SCRIPTS = {
    "main thread": f"({_WORK})({_MODULE}, {PRODUCTS}, ROWS, COLUMNS)",
    "worker": f"""new Promise((resolve, reject) => {{
        const body = `onmessage = async ({{ data }}) => {{ await ({_WORK})(...data); postMessage(null); }}`;
        const worker = new Worker(URL.createObjectURL(new Blob([body])));
        worker.onmessage = () => {{ worker.terminate(); resolve(); }};
        worker.onerror = (event) => reject(new Error(event.message));
        worker.postMessage([{_MODULE}, {PRODUCTS}, ROWS, COLUMNS]);
    }})""",
}


def elapsed(page: Page, script: str) -> float:
    """Seconds until the work is done."""
    started = time.monotonic()
    page.call("eval", script)
    return time.monotonic() - started


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-r", "--rounds", type=int, default=5)
    rounds: int = parser.parse_args().rounds
    seconds: dict[tuple[int, str], list[float]] = defaultdict(list)
    with open_page(find_chromium(), fetch_packages(), {}) as page:
        page.visit("score.html?quiet")
        for _ in range(rounds):
            for rate in RATES:
                page.throttle(rate)
                for where, script in SCRIPTS.items():
                    seconds[rate, where].append(elapsed(page, script))
    print("| rate | " + " | ".join(SCRIPTS) + " |", "|---" * (1 + len(SCRIPTS)) + "|", sep="\n")
    for rate in RATES:
        times = [median(seconds[rate, where]) / median(seconds[RATES[0], where]) for where in SCRIPTS]
        print(f"| {rate} | " + " | ".join(f"{x:.1f}" for x in times) + " |")


if __name__ == "__main__":
    main()
