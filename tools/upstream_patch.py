"""Build llama.cpp with docs/upstream/llama.cpp-per-layer-ffn.patch, and load files with a width for each block in it.

    python tools/upstream_patch.py build -o DIR     # minutes: the library, from the source that the environment's has
    python tools/upstream_patch.py check DIR        # files of tiny models, against transformers; without DIR: unpatched

The files name the architecture of their model and say `feed_forward_length` block by block, which the exporter does
only where llama.cpp can read it; here it is told that it can. Each is proven as every export is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PATCH = ROOT / "docs" / "upstream" / "llama.cpp-per-layer-ffn.patch"
_OFF = (
    *("LLAMA_BUILD_COMMON", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_TESTS"),
    *("LLAMA_BUILD_SERVER", "LLAMA_BUILD_APP", "LLAMA_OPENSSL", "GGML_CCACHE"),
)
_WIDTHS = (96, 160, 32, 128)
_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": max(_WIDTHS),
    "num_hidden_layers": len(_WIDTHS),
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 49152,
    "max_position_embeddings": 1024,
}
_MODELS: tuple[dict[str, Any], ...] = (
    {"model_type": "llama", "tie_word_embeddings": True},
    {"model_type": "llama", "tie_word_embeddings": False},
    {"model_type": "qwen3", "tie_word_embeddings": True},
    {"model_type": "qwen3", "tie_word_embeddings": False},
    {"model_type": "gemma3_text", "sliding_window": 64, "query_pre_attn_scalar": 16},
)


def main() -> None:
    """Build, or check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build_parser = commands.add_parser("build")
    build_parser.add_argument("-o", "--output", type=Path, required=True)
    check_parser = commands.add_parser("check")
    check_parser.add_argument("folder", type=Path, nargs="?", help="of the libraries that were built")
    asked = parser.parse_args()
    if asked.command == "build":
        build(asked.output)
    elif asked.folder and "LLAMA_CPP_LIB_PATH" not in os.environ:
        # llama-cpp-python reads it when it is imported.
        environment = os.environ | {"LLAMA_CPP_LIB_PATH": str(asked.folder.resolve())}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode)
    else:
        check()


def build(output: Path) -> None:
    """Compile the patched source; the libraries lie in `output` afterwards."""
    from runtime_bench.native.build import extract_llama, fetch_source

    output.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="llama-") as scratch:
        source = extract_llama(fetch_source(), Path(scratch))
        apply(source)
        made = Path(scratch) / "build"
        options = [
            "-DBUILD_SHARED_LIBS=ON",
            "-DCMAKE_BUILD_TYPE=Release",
            *(f"-D{name}=OFF" for name in _OFF),
        ]
        subprocess.run(["cmake", "-S", str(source), "-B", str(made), *options], check=True)
        jobs = str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(made), "--target", "llama", "-j", jobs], check=True)
        for library in (made / "bin").iterdir():
            shutil.copy2(library, output / library.name, follow_symlinks=False)


def apply(source: Path) -> None:
    """Apply the patch to llama.cpp's folder; raises CalledProcessError where it does not fit."""
    subprocess.run(["git", "apply", "--verbose", str(PATCH)], cwd=source, check=True)


def check() -> None:
    """Export tiny models whose blocks have unlike widths, and print how far llama.cpp is from torch."""
    from cfsp.models.families import BUILT_IN

    # What an unpatched llama.cpp can read of these types goes by other architectures' names.
    BUILT_IN.update(
        {
            name: replace(row, layouts=(replace(row.layouts[0], per_layer_sizes=True),))
            for name, row in BUILT_IN.items()
        }
    )
    for number, settings in enumerate(_MODELS):
        with tempfile.TemporaryDirectory(prefix="native-") as scratch:
            checkpoint = _checkpoint(settings, Path(scratch) / "model", seed=number)
            _export(settings, checkpoint, Path(scratch) / "files")


def _checkpoint(settings: dict[str, Any], folder: Path, *, seed: int) -> Path:
    import torch
    import transformers

    from cfsp.models.architectures import decoder_layers, feed_forward
    from cfsp.models.checkpoint import save_checkpoint
    from cfsp.models.reference import load_tokenizer
    from cfsp.models.source import LoadedModel, ModelSource
    from cfsp.pruning.surgery import cut_channels, set_config_shape

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**(_COMMON | settings))
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for layer, width in zip(decoder_layers(model), _WIDTHS, strict=True):
            cut_channels(feed_forward(model, layer), torch.arange(width))
    set_config_shape(model)
    source = ModelSource("tiny", "folder", "tiny")
    save_checkpoint(LoadedModel(model, load_tokenizer("smollm2-135m"), source), folder)
    return folder


def _export(settings: dict[str, Any], checkpoint: Path, output: Path) -> None:
    from cfsp.errors import PhonereadyError
    from exporters.export_record import ParityLimits
    from exporters.family import ExportOptions
    from exporters.gguf.export import export_gguf

    loose = {"Q8_0": ParityLimits(kl_mean=1.0)}  # random weights are unsure of every token
    tied = "tied" if settings.get("tie_word_embeddings", True) else "untied"
    name = f"{settings['model_type']} ({tied})"
    try:
        for record in export_gguf(checkpoint, output, ("f32", "Q8_0"), ExportOptions(limits=loose)):
            parity = record.parity
            print(
                f"{name}: {record.quant} as {record.architecture}, widths {record.shape.ffn_widths}: largest "
                f"difference of a logit {parity.max_logit_diff:.2g}, KL {parity.kl_mean:.2g} ({parity.n_tokens} tokens)"
            )
    except PhonereadyError as error:
        print(f"{name}: {error}")


if __name__ == "__main__":
    main()
