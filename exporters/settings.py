"""What to export, in which formats."""

from __future__ import annotations

from dataclasses import dataclass

from cfsp.settings import SEED, Settings, setting
from cfsp.text.settings import TEXT_FORMS
from cfsp.units import parse_bytes
from exporters.gguf import find_quant
from exporters.onnx import find_variant


def _quant_name(name: str) -> str:
    return find_quant(name).name


def _variant_name(name: str) -> str:
    return find_variant(name).name


@dataclass(frozen=True)
class ExportFormats(Settings):
    """Formats, and how they are made."""

    quants: tuple[str, ...] = setting(
        ("Q4_0",),
        "GGUF: f32, f16, Q8_0, Q5_K_M, Q4_K_M, Q4_0, IQ4_NL.",
        look_up=_quant_name,
        least=1,
        option="--gguf",
        metavar="QUANT,...",
        shown="Q4_0 without --onnx",
    )
    onnx: tuple[str, ...] = setting(
        (),
        "fp32, fp16, int8, int8-dynamic, int4, int4-mixed, int4-b128, portable.",
        look_up=_variant_name,
        metavar="VARIANT,...",
        shown="none",
    )
    mixed_bytes: int | None = setting(
        None,
        "Most that `int4-mixed` may take.",
        ge=1,
        le=2**50,
        parse=parse_bytes,
        option="--mixed-size",
        metavar="SIZE",
        shown="1.1 times what GGUF's Q4_0 takes",
        example=90_000_000,
    )
    imatrix: bool = setting(
        True,
        "Quantize with the importance matrix of the calibration.",
        option="--no-imatrix",
        off="Quantize without the importance matrix of the calibration.",
    )


@dataclass(frozen=True)
class ExportSettings(ExportFormats):
    """One export of a checkpoint."""

    name: str | None = setting(None, "Stem of GGUF files, name of graphs.", shown="the model's name")
    calibration: tuple[str, ...] = setting(
        (),
        f"Text that 4-bit ONNX variants are rounded for: `self`, `none`, {TEXT_FORMS}.",
        metavar="REF",
        shown="self",
    )
    nsamples: int = setting(32, "Windows of that text.", ge=1, le=2**20)
    seqlen: int = setting(512, "Tokens in such a window.", ge=2, le=2**20)
    windows: int | None = setting(None, "Use so many of these windows, spread over them.", ge=1, shown="all")
    dense: str | None = setting(
        None, "Model that writes the text `self`.", metavar="MODEL", shown="the checkpoint"
    )
    opset: int | None = setting(
        None, "ONNX opset of the graphs; older runtimes want an older one.", ge=1, metavar="N", shown="21"
    )
    ort: bool = setting(False, "Write each ONNX variant as one .ort file, too.")
    seed: int = setting(0, SEED)
