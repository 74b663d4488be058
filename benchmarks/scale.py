"""How much memory and time a model of a known shape takes, stage by stage: its weights are random, its size is real.

Writes the model in bfloat16, a block at a time, then prunes and exports it with the command line; each stage is a
process of its own, whose peak memory (RSS) and processor time the system tells.

    python benchmarks/scale.py llama-3.2-1b -o DIR [--blocks N] [--stream always] [--ratio 0.2] [--nsamples 8]
        [--seqlen 512] [--formats Q4_0] [--calibration builtin:python-docs] [--export-calibration none]
        [--json FILE]

With fewer blocks than the shape has, memory is that of all of them, as one is in memory at a time.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from taken import Taken, run_phoneready

from cfsp.files import write_json
from cfsp.models.checkpoint import save_tokenizer
from cfsp.models.offload import VARIABLE
from cfsp.models.reference import load_tokenizer
from cfsp.models.weights import INDEX_FILE
from cfsp.units import format_bytes
from exporters.families import family_of
from runtime_bench.presentation.table import Column, Table

_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_scaling": _ROPE | {"factor": 32.0},
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_scaling": _ROPE | {"factor": 8.0},
    },
}
"""Settings as in the models' config.json (huggingface.co/meta-llama)."""
_COMMON: dict[str, Any] = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
_SPREAD = 0.02
_QUIET = ("o_proj.weight", "down_proj.weight")
"""Of blocks that add little to a token: with others, few bits would change every prediction of a random model."""


@dataclass(frozen=True)
class Stage(Taken):
    """What a command took.

    Attributes:
        name: Of the stage.
    """

    name: str


def main() -> None:
    """Print a table, one line a stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--blocks", type=int, help="of the shape's, the first ones alone")
    parser.add_argument("--stream", default="always")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--formats", nargs="+", default=["Q4_0"])
    parser.add_argument("--calibration", default="builtin:python-docs")
    parser.add_argument("--export-calibration", default="none")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    dense = arguments.output / "dense"
    if not dense.exists():
        shape = SHAPES[arguments.shape]
        count = arguments.blocks or shape["num_hidden_layers"]
        write_model(shape | {"num_hidden_layers": count}, dense)
    stages = [run(name, command, arguments.stream) for name, command in commands(arguments, dense)]
    columns: list[Column[Stage]] = [
        Column("stage", lambda stage: stage.name),
        Column("time", lambda stage: f"{stage.seconds:.0f} s", right=True),
        Column("processor time", lambda stage: f"{stage.cpu_seconds:.0f} s", right=True),
        Column("peak memory", lambda stage: format_bytes(stage.peak_rss_bytes), right=True),
    ]
    print(Table(columns, stages).markdown())
    if arguments.json:
        write_json(arguments.json, [asdict(stage) for stage in stages])


def commands(arguments: argparse.Namespace, dense: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of each stage."""
    pruned, text = arguments.output / "pruned", ["--calibration", arguments.calibration]
    sizes = ["--set", f"nsamples={arguments.nsamples}", "--set", f"seqlen={arguments.seqlen}"]
    ratio = ["--prune-ratio", str(arguments.ratio)]
    yield "prune", ["prune", str(dense), "-o", str(pruned), "--force", *ratio, *text, *sizes]
    for name in arguments.formats:
        where, given = str(arguments.output / name), ["--calibration", arguments.export_calibration, *sizes]
        kind = f"--{family_of(name).name}"
        yield f"export {name}", ["quantize", str(pruned), "-o", where, "--force", kind, name, *given]


def run(name: str, command: list[str], stream: str) -> Stage:
    """Run a command of phoneready."""
    return Stage(name=name, **asdict(run_phoneready(name, command, shown=True, **{VARIABLE: stream})))


def write_model(shape: dict[str, Any], folder: Path) -> None:
    """Write a random model in bfloat16, a shard a block."""
    config = transformers.LlamaConfig(**_COMMON, **shape, dtype="bfloat16")
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    save_tokenizer(load_tokenizer("smollm2-135m"), folder)
    with torch.device("meta"):
        names = {
            name: tensor.shape for name, tensor in transformers.LlamaForCausalLM(config).state_dict().items()
        }
    if config.tie_word_embeddings:
        del names["lm_head.weight"]
    shards: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        shards.setdefault(parts[2] if parts[1] == "layers" else parts[-2], []).append(name)
    places: dict[str, str] = {}
    for number, inside in enumerate(shards.values(), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _random(name, names[name]) for name in inside}
        safetensors.torch.save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(inside, file)
    write_json(folder / INDEX_FILE, {"metadata": {}, "weight_map": places})


def _random(name: str, shape: torch.Size) -> torch.Tensor:
    """A tensor that its name decides; an output matrix is the embedding once more, which predicts the token before."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    seed = zlib.crc32(name.replace("lm_head", "model.embed_tokens").encode())
    generator = torch.Generator().manual_seed(seed)
    spread = _SPREAD**2 if name.endswith(_QUIET) else _SPREAD
    return torch.empty(shape).normal_(0, spread, generator=generator).to(torch.bfloat16)


if __name__ == "__main__":
    main()
