"""The figures of docs/onnx.md: size, closeness and export time; speed against other exporters' graphs; memory.

    python benchmarks/onnx_exports.py files CHECKPOINT -o OUT --calibration chats.jsonl --calibration text.jsonl
    python benchmarks/onnx_exports.py speed DENSE -o OUT [--portable FOLDER] [--depths 0] [-r 7]
    python benchmarks/onnx_exports.py mixed CHECKPOINT --calibration chats.jsonl --calibration text.jsonl
    python benchmarks/onnx_exports.py memory DENSE/int4 PRUNED/int4

`files` exports every variant by itself, so that each has its own time, beside the GGUF file Q4_0. `speed` lets ONNX
Runtime GenAI's own builder export the same checkpoint and measures its graph and ours in turns, each sample in a
fresh process; --portable is a folder that `phoneready quantize --to portable` made in an environment with optimum.
`mixed` holds int4's choice of eight-bit layers against others, and int4-mixed's in as many bytes, in torch. `memory`
measures folders' peak RSS after a prompt of 512 tokens. Tables go to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cfsp.errors import InputError, PhonereadyError
from cfsp.files import atomic_directory
from cfsp.models.reference import load_model
from cfsp.text.calibration import load_calibration
from cfsp.text.settings import SELF
from cfsp.units import format_bytes
from exporters.export_record import ExportRecord, ParityReport
from exporters.families import DEFAULT_FORMAT, ExportSettings, family_of
from exporters.onnx.folder import find_graph
from exporters.onnx.layers import HEAD_PARTS, weight_of
from exporters.onnx.matrix import Rounded, round_to_nearest
from exporters.onnx.quantize import (
    QuantizedModel,
    bytes_of,
    choose_eight_bits,
    measure,
    quantize_linears,
    rounded_model,
    tune,
)
from exporters.onnx.variants import INT4, INT8, BlockFormat
from exporters.proof import Reference, choose_windows, reference_of
from exporters.proof import compare as compare_logits
from phoneready.console import MakeOptions, prepare_torch
from phoneready.exporting import export_model
from runtime_bench.measuring.measure import run_bench
from runtime_bench.presentation.table import table_of
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.compare import Comparison, by_model, compare
from runtime_bench.workload import BenchSettings

VARIANTS = ("fp32", "int8", "int8-dynamic", "int4", "int4-mixed", "int4-b128")
GENAI_PRECISIONS = ("fp32", "int8", "int4")
GENAI = "onnxruntime-genai"


def files(arguments: argparse.Namespace) -> None:
    """Every variant: size, share of Q4_0's, closeness to the checkpoint, seconds."""
    rows: list[tuple[ExportRecord, float]] = []
    with atomic_directory(arguments.output, force=arguments.force) as folder:
        for name in (DEFAULT_FORMAT, *arguments.variants):
            started = time.monotonic()
            (record,) = export_one(arguments.checkpoint, folder / name, name, tuple(arguments.calibration))
            rows.append((record, time.monotonic() - started))
            say(f"{name}: {rows[-1][1]:.0f} s")
    q4_0_bytes = rows[0][0].file_bytes
    print(table_of([file_row(record, seconds, q4_0_bytes) for record, seconds in rows]).markdown())
    for record, _ in rows:
        if record.eight_bit_layers:
            print(f"\n{record.quant}, in eight bits: {', '.join(record.eight_bit_layers)}")


def export_one(
    checkpoint: Path, output: Path, name: str, calibration: tuple[str, ...] = ()
) -> tuple[ExportRecord, ...]:
    """Export in one format alone."""
    family = family_of(name)
    text = calibration if calibration and "calibration" in family.find(name).reads else ("none",)
    request = ExportSettings(to=(name,), calibration=text)
    return export_model(str(checkpoint), output, request, MakeOptions())


def file_row(record: ExportRecord, seconds: float, q4_0_bytes: int) -> dict[str, str]:
    """A line of the table."""
    p = record.parity
    return {
        "file": record.quant,
        "size": format_bytes(record.file_bytes),
        "of Q4_0": f"{record.file_bytes / q4_0_bytes:.2f}",
        "max logit difference": f"{p.max_logit_diff:.2g}",
        "KL mean": f"{p.kl_mean:.4f}",
        "same top-1": f"{p.same_top1:.1%}",
        "perplexity ratio": f"{p.ppl_ratio:.3f}",
        "export s": f"{seconds:.0f}",
    }


def speed(arguments: argparse.Namespace) -> None:
    """Our graphs against others of the same checkpoint: speeds' ratios with 95 % intervals."""
    rows = []
    for name in arguments.precisions:
        ours = exported(
            arguments.checkpoint, arguments.output / "ours" / name, name, tuple(arguments.calibration)
        )
        theirs = genai_built(arguments.checkpoint, arguments.output / "genai" / name, name)
        rows += held_against(
            theirs, find_graph(str(ours), last_logits=True), f"{name} / GenAI's", GENAI, arguments
        )
    if arguments.portable:
        ours = exported(arguments.checkpoint, arguments.output / "ours" / "fp32", "fp32", ())
        graphs = (find_graph(str(arguments.portable)), find_graph(str(ours)))
        rows += held_against(*graphs, "fp32 / portable", "onnxruntime", arguments)
    print(table_of(rows).markdown())


def exported(checkpoint: Path, folder: Path, name: str, calibration: tuple[str, ...]) -> Path:
    """The folder of a variant, made unless it is there."""
    if not folder.is_dir():
        say(f"exporting {name}")
        export_one(checkpoint, folder, name, calibration)
    return folder / name


def genai_built(checkpoint: Path, folder: Path, precision: str) -> Path:
    """The graph of GenAI's own builder, made unless it is there."""
    if not folder.is_dir():
        say(f"GenAI's builder: {precision}")
        with atomic_directory(folder) as output:
            command = [
                sys.executable,
                "-m",
                "onnxruntime_genai.models.builder",
                "-m",
                str(checkpoint.resolve()),
            ]
            command += ["-o", str(output), "-p", precision, "-e", "cpu", "-c", str(output / "cache")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1:]
                raise InputError(f"GenAI's builder failed with {precision}: {' '.join(last)}")
            shutil.rmtree(output / "cache", ignore_errors=True)
    return folder / "model.onnx"


def held_against(
    base: Path, new: Path, label: str, engine: str, arguments: argparse.Namespace
) -> list[dict[str, str]]:
    """One line of the table."""
    settings = BenchSettings(
        n_prompt=(arguments.n_prompt,),
        n_gen=(arguments.n_gen,),
        n_depth=tuple(arguments.depths),
        ttft=(),
        load=False,
        repetitions=arguments.rounds,
        n_threads=(1,),
    )
    say(f"measuring {label}")
    records = run_bench([base, new], settings, engine=engine)
    failed = [f"{r.model_filename} {r.test}: {r.failure}" for r in records if not r.ok]
    if failed:
        raise InputError(f"not measured: {'; '.join(failed)}")
    left, right = by_model(records).values()
    found = [row for row in compare(left, right) if isinstance(row, Comparison)]
    cells = {f"{row.test}": ratio(row) for row in found}
    return [{"ours / theirs": label, **cells, "file": f"{found[0].file_size_ratio or 0:.2f}"}]


def ratio(row: Comparison) -> str:
    """Speed of the new file over the base's; above 1 is faster."""
    return f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})" if row.ratio else "-"


def mixed(arguments: argparse.Namespace) -> None:
    """Four bits for all, int4's choice of eight-bit layers, other heads, int4-mixed's choice; then int4, tuned."""
    loaded = load_model(arguments.checkpoint.resolve())
    model, references = loaded.model, arguments.calibration or [SELF]
    sizes = {"nsamples": arguments.windows, "seqlen": ExportSettings.seqlen}
    text = load_calibration(references, loaded, **sizes).input_ids
    windows = choose_windows(loaded.tokenizer, model.config.max_position_embeddings)
    reference = reference_of(model, windows._replace(ids=windows.ids[:2]))
    nearest = QuantizedModel(quantize_linears(model, lambda *_: INT4, None))
    losses = measure(model, INT4, text)
    small = rounded_model(model, INT4, (), text)
    own = rounded_model(model, INT4, choose_eight_bits(model, INT4, losses), text)

    def with_head(head: Mapping[str, Rounded]) -> QuantizedModel:
        return replace(own, layers={**own.layers, **{name: head[name] for name in HEAD_PARTS}})

    def nearest_head(form: BlockFormat) -> dict[str, Rounded]:
        return {name: round_to_nearest(weight_of(model, name), form) for name in HEAD_PARTS}

    left = taken_bytes(own.layers) - taken_bytes(nearest.layers)
    mixture = choose_eight_bits(model, INT4, losses, left)
    choices = {
        "nearest": nearest,
        "GPTQ, nothing taken back": QuantizedModel(
            quantize_linears(model, lambda *_: INT4, text, correction=0.0)
        ),
        "GPTQ": small,
        "int4's choice": own,
        "the same, head in four bits": with_head(small.layers),
        "the same, head to nearest": with_head(nearest_head(INT4)),
        "the same, head in eight bits": with_head(nearest_head(INT8)),
        "int4-mixed's choice": rounded_model(model, INT4, mixture, text),
        "int4: its choice, tuned": tune(model, own, text),
    }
    rows = []
    for label, quantized in choices.items():
        found = torch_parity(model, quantized, reference)
        cells = {"weights": format_bytes(taken_bytes(quantized.layers)), "KL mean": f"{found.kl_mean:.4f}"}
        cells |= {"same top-1": f"{found.same_top1:.1%}", "perplexity ratio": f"{found.ppl_ratio:.3f}"}
        rows.append({"file": label, **cells})
    print(table_of(rows).markdown())
    print(f"\nIn eight bits, {len(mixture)}: {', '.join(mixture)}")


def taken_bytes(rounded: Mapping[str, Rounded]) -> int:
    """Of the weights as they are stored."""
    return sum(bytes_of((len(each.q), each.columns), each.form) for each in rounded.values())


def torch_parity(model: Any, quantized: QuantizedModel, reference: Reference) -> ParityReport:
    """The model with its weights as they are stored, in torch, against itself."""
    # A tied embedding is the output matrix; an untied one stays as it is.
    changed = [(weight_of(model, name), stored.dequantize()) for name, stored in quantized.layers.items()]
    changed += [(model.get_parameter(name).detach(), norm) for name, norm in quantized.norms.items()]
    kept = [weight.clone() for weight, _ in changed]
    for weight, stored in changed:
        weight.copy_(stored)

    def run(window: npt.NDArray[np.int32]) -> list[npt.NDArray[np.float32]]:
        with torch.inference_mode():
            return [model(input_ids=torch.from_numpy(window).long()[None]).logits[0].numpy()]

    found = compare_logits(reference, run, {})
    for (weight, _), before in zip(changed, kept, strict=True):
        weight.copy_(before)
    return found


def memory(arguments: argparse.Namespace) -> None:
    """Peak RSS of a process that does no more than run the file."""
    settings = BenchSettings(
        n_prompt=(arguments.n_prompt,), n_gen=(arguments.n_gen,), ttft=(), repetitions=2, n_threads=(1,)
    )
    graphs = [find_graph(str(folder), last_logits=True) for folder in arguments.folders]
    records = by_model(run_bench(graphs, settings))
    rows = []
    for folder, found in zip(arguments.folders, records.values(), strict=True):
        peaks = {record.test: format_bytes(peak(record)) for record in found}
        rows.append({"folder": str(folder), "file": format_bytes(found[0].file_size_bytes), **peaks})
    print(table_of(rows).markdown())


def peak(record: BenchRecord) -> float | None:
    """Least over processes: what else ran only adds."""
    return min(record.peak_rss_samples_bytes, default=None)


def say(message: str) -> None:
    """Progress."""
    print(message, file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("files", help="size, closeness, export time")
    two = commands.add_parser("speed", help="against other exporters' graphs")
    for command in (one, two):
        command.add_argument("checkpoint", type=Path, help="a folder of `phoneready prune`, or a dense one")
        command.add_argument("-o", "--output", type=Path, required=True, help="where exports go")
        command.add_argument(
            "--calibration", action="append", default=[], help="text for 4-bit variants (self)"
        )
    one.add_argument("--variants", nargs="+", default=VARIANTS, help="which ones")
    one.add_argument("--force", action="store_true", help="replace the output")
    two.add_argument("--precisions", nargs="*", default=GENAI_PRECISIONS, help="which ones")
    two.add_argument("--portable", type=Path, help="folder of a portable variant")
    two.add_argument(
        "-d", "--depths", type=int, nargs="+", default=[0], help="tokens in the context before (0)"
    )
    two.add_argument("-r", "--rounds", type=int, default=7, help="samples of each (7)")
    four = commands.add_parser("mixed", help="int4 against int4-mixed in as many bytes")
    four.add_argument("checkpoint", type=Path, help="as above")
    four.add_argument("--calibration", action="append", default=[], help="text to round for (self)")
    four.add_argument("--windows", type=int, default=10, help="windows of it (10)")
    three = commands.add_parser("memory", help="peak RSS")
    three.add_argument("folders", type=Path, nargs="+", help="folders of variants")
    for command, n_prompt, n_gen in ((two, 128, 64), (three, 512, 16)):
        command.add_argument("-p", "--n-prompt", type=int, default=n_prompt, help=f"prompt ({n_prompt})")
        command.add_argument("-n", "--n-gen", type=int, default=n_gen, help=f"generated tokens ({n_gen})")
    return parser.parse_args(argv)


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = MappingProxyType(
    {"files": files, "speed": speed, "mixed": mixed, "memory": memory}
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print."""
    arguments = parse(argv)
    prepare_torch(None)
    try:
        COMMANDS[arguments.command](arguments)
    except PhonereadyError as error:
        say(f"error: {error}")
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
