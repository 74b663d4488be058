"""The families of exports, and what users say of them. A new family is a folder, and a row here.

What is heavy is imported when it is first wanted.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from operator import methodcaller
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cfsp.errors import InputError
from cfsp.progress import Progress
from cfsp.settings import SEED, Reads, Settings, setting
from cfsp.text.settings import SELF, TEXT_FORMS
from cfsp.units import parse_bytes
from exporters.export_record import ExportFormat
from exporters.family import ExportedModel, ExportFamily, ExportOptions
from exporters.gguf.quants import DEFAULT_CACHE, MEASURED_CACHES, MIXED, QUANTS, find_quant
from exporters.onnx.folder import find_graph, is_onnx
from exporters.onnx.variants import VARIANTS, find_variant

if TYPE_CHECKING:
    import torch  # not in the memory of a process that only runs a file

    from cfsp.recovery.rounding import RoundedModel, Rounding


def _imported(module: str, name: str) -> Callable[..., Any]:
    """A function or class of a module that is imported when it is first called."""
    return lambda *given: getattr(importlib.import_module(module), name)(*given)


def _locate_gguf(folder: Path, stem: str, quant: str) -> ExportedModel:
    file = folder / f"{stem}-{quant}.gguf"
    if not file.is_file():
        raise InputError(f"{file} does not exist")
    return ExportedModel(file.name, file, file)


def _locate_onnx(folder: Path, stem: str, variant: str) -> ExportedModel:
    root = folder / variant
    return ExportedModel(f"{stem}-{variant}", root, find_graph(str(root), last_logits=True))


GGUF = ExportFamily(
    name="gguf",
    title=".gguf files",
    formats=QUANTS,
    find=find_quant,
    export=_imported("exporters.gguf.export", "export_gguf"),
    locate=_locate_gguf,
    runtime="llama.cpp",
    open_model=_imported("exporters.gguf.language_model", "GGUFLanguageModel"),
    outline=_imported("exporters.gguf.language_model", "outline_of"),
    claims=lambda reference: Path(reference).suffix == ".gguf",
    needs={"llama_cpp": "llama-cpp-python"},
    extra="gguf",
    for_size=MIXED,
    through=_imported("exporters.gguf.files", "GGUFRounding"),
    cache_types=MEASURED_CACHES,
    own_cache=DEFAULT_CACHE,
)
ONNX = ExportFamily(
    name="onnx",
    title=".onnx files and folders of ONNX variants",
    formats=VARIANTS,
    find=find_variant,
    export=_imported("exporters.onnx.export", "export_onnx"),
    locate=_locate_onnx,
    runtime="onnxruntime",
    open_model=_imported("exporters.onnx.language_model", "OnnxLanguageModel"),
    outline=_imported("exporters.onnx.language_model", "outline_of"),
    claims=is_onnx,
    needs={"onnx": "onnx", "onnx_ir": "onnx-ir", "onnxruntime": "onnxruntime"},
    extra="onnx",
    through=_imported("exporters.onnx.quantize", "OnnxRounding"),
)

FAMILIES: Mapping[str, ExportFamily] = MappingProxyType({family.name: family for family in (GGUF, ONNX)})
BASE = GGUF
"""The family of which a release always has files."""
DEFAULT_FORMAT = "Q4_0"
"""What is made if nothing is asked for."""


def family_of(name: str) -> ExportFamily:
    """The family that has a format, in any case, or with its own name before it, as in `onnx:int4`.

    Raises InputError that names the known formats.
    """
    said, _, rest = name.partition(":")
    for family in FAMILIES.values():
        if family.has(rest if said.lower() == family.name else name):
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.names)
    raise InputError("unknown format", field="to", value=name, allowed=known)


def find_format(name: str) -> ExportFormat:
    """The row of a format; raises InputError as `family_of`."""
    family = family_of(name)
    return family.find(re.sub(f"^{family.name}:", "", name, flags=re.IGNORECASE))


def makes_gguf(names: Iterable[str]) -> bool:
    """Whether some of the formats are GGUF; if none is named, one is made."""
    return any(map(GGUF.has, tuple(names) or (DEFAULT_FORMAT,)))


def required_multiple(names: Iterable[str]) -> int:
    """Smallest width unit with which no FFN matrix in these formats falls back to a larger type."""
    return math.lcm(*(find_format(name).width_multiple for name in names))


class _Rounding:
    """See `cfsp.recovery.rounding.Rounding`: of every family whose rounding can be trained through."""

    def check(self, name: str) -> None:
        self._of(name).check(name)

    def start(
        self, checkpoint: Path, name: str, input_ids: torch.Tensor, device: str, progress: Progress
    ) -> RoundedModel:
        return self._of(name).start(checkpoint, name, input_ids, device, progress)

    def _of(self, name: str) -> Rounding:
        family = family_of(name)
        if family.through is None:
            known = ", ".join(each.title for each in FAMILIES.values() if each.through)
            raise InputError(
                f"{family.title} cannot be trained through", field="for_quant", value=name, allowed=known
            )
        family.require()
        return family.through()


ROUNDING = _Rounding()
"""What recovery asks for formats."""


@dataclass(frozen=True)
class FileSettings(Settings):
    """Formats, and how they are rounded."""

    to: tuple[str, ...] = setting(
        (DEFAULT_FORMAT,),
        "Files to make. "
        + "; ".join(f"{one.name.upper()}: {', '.join(one.names)}" for one in FAMILIES.values())
        + ".",
        look_up=lambda name: find_format(name).name,
        least=1,
        metavar="FORMAT,...",
    )
    mixed_bytes: int | None = setting(
        None,
        "Most that `int4-mixed` may take.",
        ge=1,
        le=2**50,
        parse=parse_bytes,
        metavar="SIZE",
        shown="1.1 times what weights take in GGUF's Q4_0",
        example=90_000_000,
        rare=True,
    )
    imatrix: bool = setting(True, "Quantize with the importance matrix of the calibration.", rare=True)
    gptq: bool = setting(
        True, "Round the matrices of GGUF files of up to 6 bits for the calibration text, by GPTQ.", rare=True
    )
    tune_scales: bool = setting(
        False,
        "Train the scales and norms of GGUF files of up to 6 bits on that text, too: slower, and loses less.",
        option="--tune-scales",
    )
    rounding_windows: int | None = setting(
        32,
        "Windows of that text which files of few bits are rounded for and mixtures chosen by; with more "
        "of them they lose a little less and take longer.",
        ge=1,
        le=2**20,
        rare=True,
    )

    @property
    def formats(self) -> dict[str, tuple[str, ...]]:
        """Family -> what is made of it; families of which nothing is are left out."""
        made = {name: tuple(filter(family.has, self.to)) for name, family in FAMILIES.items()}
        return {name: formats for name, formats in made.items() if formats}

    @property
    def names(self) -> tuple[str, ...]:
        """All formats, family after family."""
        return tuple(name for formats in self.formats.values() for name in formats)

    def reads(self, name: str) -> bool:
        """Whether any of the formats reads a setting."""
        return any(name in find_format(one).reads for one in self.names)

    def options(self, text: torch.Tensor | None, **others: Any) -> ExportOptions:
        """What an export reads of them; `text` are token ids (nsamples, seqlen), `others` further fields of it."""
        own = ExportOptions(
            use_imatrix=self.imatrix,
            calibration=text,
            gptq=self.gptq,
            tune_scales=self.tune_scales,
            mixed_bytes=self.mixed_bytes,
        )
        return replace(own, **others)


@dataclass(frozen=True)
class ExportSettings(FileSettings):
    """One export of a checkpoint."""

    name: str | None = setting(
        None, "Stem of GGUF files, name of graphs.", shown="the model's name", rare=True
    )
    calibration: tuple[str, ...] = setting(
        (SELF,),
        f"Text that files of few bits are rounded for, and mixtures chosen by: `self`, `none`, {TEXT_FORMS}.",
        least=1,
        option="--calibration --text",
        metavar="REF",
    )
    nsamples: int = setting(32, "Windows of that text.", ge=1, le=2**20, rare=True)
    seqlen: int = setting(512, "Tokens in such a window.", ge=2, le=2**20, rare=True)
    rounding_windows: int | None = setting(
        None, "Use so many of the text's windows, spread over them.", ge=1, le=2**20, shown="all", rare=True
    )
    dense: str | None = setting(
        None, "Model that writes the text `self`.", metavar="MODEL", shown="the checkpoint", rare=True
    )
    opset: int | None = setting(
        None,
        "ONNX opset of the graphs; older runtimes want an older one.",
        ge=1,
        metavar="N",
        shown="21",
        rare=True,
    )
    seed: int = setting(0, SEED)


def read_by_formats(where: Mapping[str, str]) -> Reads:
    """A row for each setting that formats read, of the words that say that none does."""
    return MappingProxyType({name: (methodcaller("reads", name), words) for name, words in where.items()})


READS = read_by_formats(
    {
        "tune_scales": "without GGUF files of up to 6 bits",
        "mixed_bytes": "without the ONNX variant int4-mixed",
    }
)
"""What is read of the settings of files."""
