"""The whole way of a model on the CPU and on a GPU: how long each step takes there, and how far the results are apart.

Prunes, judges and exports with the command line, once a device, and compares the plans' widths, the divergence from the
dense model and the divergence of every file from its checkpoint. Products are rounded otherwise on CUDA
(TensorFloat-32), and their sums are taken in another order on any GPU, so plans and files are alike, not equal;
`--devices cpu cpu` shows that equal devices give equal ones.

    python benchmarks/gpu.py MODEL -o DIR [--devices cpu cuda mps] [--calibration REF] [--text REF] [--ratio 0.2]
        [--nsamples 32] [--seqlen 512] [--windows 8] [--formats Q4_0 int4] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cfsp.devices import find_device
from cfsp.files import write_json
from cfsp.models.checkpoint import PLAN_FILE
from cfsp.pruning.plan import PruningPlan
from cfsp.records import read_record
from exporters.families import FAMILIES, family_of, find_format
from runtime_bench.presentation.table import table_of


@dataclass(frozen=True)
class Way:
    """What one device did.

    Attributes:
        device: Its name.
        seconds: Step -> how long it took, the start of the process included.
        widths: FFN width of every block.
        divergence: Of the pruned checkpoint from the dense model, nats a token.
        files: Format -> (SHA-256, divergence from the checkpoint).
    """

    device: str
    seconds: dict[str, float]
    widths: tuple[int, ...]
    divergence: float
    files: dict[str, tuple[str, float]]


def main() -> None:
    """Print a table of times and one of results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--devices", nargs="+", default=["cpu", str(find_device("auto"))])
    parser.add_argument("--calibration", default="builtin:python-docs")
    parser.add_argument("--text", default="builtin:python-docs")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--formats", nargs="+", default=["Q4_0", "int4"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ways = [
        go(device, arguments.output / f"{number}-{device.replace(':', '-')}", arguments)
        for number, device in enumerate(arguments.devices)
    ]
    first = ways[0]
    steps = [
        {"step": step} | {f"{n}: {way.device}, s": f"{way.seconds[step]:.1f}" for n, way in enumerate(ways)}
        for step in first.seconds
    ]
    print(table_of(steps).markdown())
    results = [
        {
            "device": way.device,
            "KL of the checkpoint": f"{way.divergence:.5f}",
            "most that a width differs": max(
                abs(a - b) for a, b in zip(way.widths, first.widths, strict=True)
            ),
            **{f"KL of {name}": f"{kl:.5f}" for name, (_, kl) in way.files.items()},
            "files as the first's": sum(way.files[name][0] == first.files[name][0] for name in way.files),
        }
        for way in ways
    ]
    print(table_of(results).markdown())
    if arguments.json:
        write_json(arguments.json, [asdict(way) for way in ways])


def go(device: str, folder: Path, arguments: argparse.Namespace) -> Way:
    """Everything on one device."""
    folder.mkdir(parents=True)
    seconds: dict[str, float] = {}

    def run(step: str, *words: object) -> Any:
        began = time.perf_counter()
        command = [sys.executable, "-m", "phoneready", step, *map(str, words), "--device", device, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds[step] = time.perf_counter() - began
        return json.loads(done.stdout)

    checkpoint, exports = folder / "pruned", folder / "exports"
    text = [
        "--calibration",
        arguments.calibration,
        "--nsamples",
        arguments.nsamples,
        "--seqlen",
        arguments.seqlen,
    ]
    run("prune", arguments.model, "-o", checkpoint, "--prune-ratio", arguments.ratio, *text)
    windows = ["--text", arguments.text, "--seqlen", arguments.seqlen, "--windows", arguments.windows]
    judged = run("eval", checkpoint, "--against", arguments.model, *windows, "--no-prompts")
    asked = {name: [f for f in arguments.formats if family_of(f).name == name] for name in FAMILIES}
    formats = [word for name, some in asked.items() if some for word in (f"--{name}", ",".join(some))]
    reads = any("calibration" in find_format(name).reads for name in arguments.formats)
    made = run("export", checkpoint, "-o", exports, *formats, *(text if reads else []))
    return Way(
        device,
        seconds,
        read_record(PruningPlan, checkpoint / PLAN_FILE).shape.ffn_widths,
        judged["texts"][0]["divergence"]["kl_mean"],
        {file["quant"]: (file["sha256"], file["parity"]["kl_mean"]) for file in made["exports"]},
    )


if __name__ == "__main__":
    main()
