"""Profiles of phones, and what is projected for them from a file's header. A projection is never a measurement.

Memory is a sum of what llama.cpp allocates. Speed is a band: a generated token reads all weights and the cache once, at
30 to 70 % of the theoretical bandwidth; a prompt gets 5 to 30 % of what the cores could multiply. docs/devices.md holds
the bands against published speeds.
"""

from __future__ import annotations

import datetime
import importlib.resources
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Generic, Literal, NamedTuple, Self, TypeVar

import pydantic

from cfsp.errors import InputError
from cfsp.reading import parse_toml, read_text
from cfsp.settings import Setting
from cfsp.validation import Section, describe_problems
from exporters.gguf.quants import CACHE_TYPES, DEFAULT_CACHE
from runtime_bench.records.bench_record import DOES_NOT_FIT, FITS, THRASHES

if TYPE_CHECKING:
    from cfsp.models.gguf_file import GGUFFile, GGUFTensor

_TABLE = "token_embd.weight"


@dataclass(frozen=True)
class ModelFacts:
    """A file's sizes. What drafts further tokens takes room, and is not read."""

    path: Path
    weight_bytes: int  # Of all tensors
    read_bytes: int  # Of the weights that every generated token reads: all but a lookup table
    n_multiplied: int  # Weights that every token is multiplied by
    bytes_by_type: Mapping[str, int]  # Stored type -> bytes of the matrices of it
    key_value_width: int  # Numbers that one token adds to the cache, over all blocks
    hidden_size: int
    ffn_width: int  # Of the widest FFN
    vocab_size: int
    context_length: int  # Longest that the model knows


def gguf_facts(path: Path) -> ModelFacts:
    """Facts of a GGUF file. Raises InputError: no GGUF file, or one without the keys of a decoder."""
    from cfsp.models.gguf_file import (
        is_drafting,
        looked_up_alone,
        read_gguf,
    )  # gguf takes as long as help pages

    file = read_gguf(path)
    drafting = is_drafting(file)
    tensors = {tensor.name: tensor for tensor in file.tensors if not drafting(tensor.name)}
    if _TABLE not in tensors:
        raise InputError(f"{path} has no {_TABLE}: it is no decoder")

    def largest(name: str, default: int | None = None) -> int:
        return max(_numbers(file, name, default))

    aside = looked_up_alone(tensors)
    read = [t for t in tensors.values() if t.name not in aside]
    matrices = [t for t in read if len(t.shape) > 1]
    by_type: Counter[str] = Counter()
    for tensor in matrices:
        by_type[tensor.kind.name] += _bytes(tensor)
    hidden = largest("embedding_length")
    return ModelFacts(
        path=path,
        weight_bytes=sum(map(_bytes, file.tensors)),
        read_bytes=sum(map(_bytes, read)),
        n_multiplied=sum(math.prod(t.shape) for t in matrices),
        bytes_by_type=dict(by_type),
        key_value_width=_key_value_width(file),
        hidden_size=hidden,
        ffn_width=largest("feed_forward_length"),
        vocab_size=tensors[_TABLE].shape[0],
        context_length=largest("context_length"),
    )


def _key_value_width(file: GGUFFile) -> int:
    """Numbers that one token adds to the cache, over all blocks that have keys and values of their own."""
    from cfsp.models.gguf_file import CONVOLUTIONS, drafting_blocks

    heads = max(_numbers(file, "attention.head_count"))
    size = max(_numbers(file, "embedding_length")) // heads
    layers = drafting_blocks(file).start
    of_blocks = _numbers(file, "attention.head_count_kv", heads)
    of_blocks = of_blocks * layers if len(of_blocks) == 1 else of_blocks
    windowed = file.hyperparameter("attention.sliding_window_pattern")
    windowed = windowed if isinstance(windowed, list) else [False] * layers

    own = layers - (file.hyperparameter("attention.shared_kv_layers") or 0)
    per_head = [
        sum(
            file.hyperparameter(key + ("_swa" if windowed[block] else ""), file.hyperparameter(key, size))
            for key in ("attention.key_length", "attention.value_length")
        )
        for block in range(own)
    ]
    mixing = {tensor.name.split(".")[1] for tensor in file.tensors if tensor.name.endswith(CONVOLUTIONS)}
    pairs = enumerate(zip(of_blocks, per_head, strict=False))
    return sum(count * each for block, (count, each) in pairs if str(block) not in mixing)


def _bytes(tensor: GGUFTensor) -> int:
    return int(tensor.data.nbytes)


def _numbers(file: GGUFFile, name: str, default: int | None = None) -> list[int]:
    """A number of the header that is one for all blocks, or a list of one for each."""
    stored = file.hyperparameter(name, default)
    values = list(stored) if isinstance(stored, (list, tuple)) else [stored]
    # Blocks without attention have no heads.
    if not all(isinstance(value, int) and value >= 0 for value in values) or not any(values):
        raise InputError(f"{file.path} has no usable {file.architecture}.{name}", value=stored)
    return [int(value) for value in values]


FACTS: Mapping[str, Callable[[Path], ModelFacts]] = MappingProxyType({"gguf": gguf_facts})
"""Family of exports -> how its files are read; what has no row is not projected."""


T = TypeVar("T")


class Figure(Section, Generic[T]):
    """A value and where it comes from."""

    value: T | None = None
    basis: Literal["vendor", "derived", "third_party", "estimate", "measured", "unknown"]
    # Who says so: an address, or a document's name
    source: str | None = pydantic.Field(default=None, min_length=1)
    date: datetime.date | None = None  # When it was looked up or measured

    @pydantic.model_validator(mode="after")
    def _value_and_origin_stand_together(self) -> Self:
        known = self.basis != "unknown"
        if known and None in (self.value, self.source, self.date):
            raise ValueError(f"basis {self.basis!r} wants value, source and date")
        if not known and self.value is not None:
            raise ValueError("basis 'unknown' wants no value")
        return self


class Cluster(Section):
    """Cores of one kind."""

    core: str = pydantic.Field(min_length=1)  # Microarchitecture, such as Cortex-A76
    count: int = pydantic.Field(ge=1, le=64)  # How many
    max_mhz: int | None = pydantic.Field(default=None, ge=100, le=6000)  # Highest clock


Feature = Literal["asimd", "fp16", "dotprod", "i8mm", "bf16", "sve", "sve2", "sme", "sme2"]
_Memory = Annotated[int, pydantic.Field(ge=64, le=262144)]
_Score = Annotated[float, pydantic.Field(ge=1, le=1e6)]
_Bandwidth = Annotated[float, pydantic.Field(ge=0.5, le=1000)]


class DeviceProfile(Section):
    """A device."""

    schema_version: Literal[1]
    id: str = pydantic.Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")  # The file's name without its suffix
    name: str = pydantic.Field(min_length=1)  # As people call it
    form: Literal["phone", "tablet", "board"]
    tier: Literal["budget", "mid", "flagship", "board"]
    os: Literal["android", "ios", "linux"]
    soc: Figure[str]
    cores: Figure[Annotated[tuple[Cluster, ...], pydantic.Field(min_length=1)]]  # Clusters, fastest first
    isa: Figure[tuple[Feature, ...]]  # What the fast cores offer to applications
    ram_mib: Figure[_Memory]  # RAM, MiB
    dram_gb_s: Figure[_Bandwidth]  # Theoretical bandwidth of the RAM, 10^9 bytes a second
    dram_sustained_gb_s: Figure[_Bandwidth]  # Measured bandwidth
    app_memory_mib: Figure[_Memory]  # What one application may use, MiB
    # Its browser's score (`runtime_bench/browser/page/score.html`); a file may leave it out
    browser_score: Figure[_Score] = Figure(basis="unknown")


FIGURES = tuple(
    name
    for name, field in DeviceProfile.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Figure)
)
"""Names of the figures of a profile."""


@dataclass(frozen=True)
class KnownProfile:
    """A profile and the file that it is from."""

    profile: DeviceProfile
    file: Path
    built_in: bool


def read_profile(file: Path) -> DeviceProfile:
    """One file. Raises InputError: unreadable, no TOML, or no profile: every problem is named."""
    try:
        profile = DeviceProfile.model_validate(parse_toml(read_text(file), str(file)))
    except pydantic.ValidationError as error:
        raise InputError(f"{file}: {describe_problems(error)}") from error
    if profile.id != file.stem:
        raise InputError(f"{file}: id: not the file's name (got {profile.id!r}); allowed: {file.stem}")
    return profile


def load_profiles(own: Path | None = None) -> dict[str, KnownProfile]:
    """All profiles by id, sorted; a user's own replaces the built-in one of its id.

    Args:
        own: The user's folder; PHONEREADY_DEVICES, or phoneready/devices in the configuration folder, unless given.

    Raises:
        InputError: The problems of all files that cannot be used.
    """
    # Inside an installed package, or at the top of a checkout.
    coming = Path(str(importlib.resources.files("runtime_bench"))) / "devices"
    coming = coming if any(coming.glob("*.toml")) else coming.parents[1] / "devices"
    # Not Path.home(): a user without a home has the built-in profiles all the same.
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")  # noqa: PTH111
    own = own or Path(os.environ.get("PHONEREADY_DEVICES") or Path(home) / "phoneready" / "devices")
    folders = ((coming, True), (own, False))
    profiles: dict[str, KnownProfile] = {}
    problems = []
    for folder, built_in in folders:
        for file in sorted(folder.glob("*.toml")):
            try:
                profile = read_profile(file)
            except InputError as error:
                problems.append(str(error))
                continue
            profiles[profile.id] = KnownProfile(profile, file, built_in)
    if problems:
        raise InputError("; ".join(problems))
    return dict(sorted(profiles.items()))


def find_profile(name: str, profiles: Mapping[str, KnownProfile]) -> KnownProfile:
    """The profile of an id, from what `load_profiles` gave. Raises InputError: there is none; the message has
    the ids that there are."""
    if name in profiles:
        return profiles[name]
    raise InputError("no profile of this name", field="device", value=name, allowed=", ".join(profiles))


MIB = 2**20
DECODE_SHARE = (0.30, 0.70)
"""Of the theoretical bandwidth that reading weights gets."""
PREFILL_SHARE = (0.05, 0.30)
"""Of the multiplications that the cores could do."""
APP_SHARE = 0.65
"""Of the RAM that one application may count on where its limit is not known."""
PROCESS_BYTES = 20 * MIB
"""A native program with llama.cpp in it, without a model."""
CACHE_CELLS = 256
"""llama.cpp gives the cache room for a multiple of so many tokens."""
BATCH_TOKENS = 512
"""Tokens of a prompt that llama.cpp computes at once (n_ubatch)."""
CONTEXT = Setting("Tokens of the context.", ge=1, le=2**24, metavar="N", option="-c --context")
DEFAULT_CONTEXT = 2048
_ARM_REPACKED = dict.fromkeys(("Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4"), 1.0)
REPACKED: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        # 32 numbers of Q8_0 get their sum, four bytes, beside them; F16 is copied as it is.
        "amx_int8": dict.fromkeys(("F16", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"), 1.0)
        | {"Q8_0": 38 / 34},
        "i8mm": _ARM_REPACKED,
        "dotprod": _ARM_REPACKED,
        "avx2": dict.fromkeys(("Q4_0", "Q4_K", "IQ4_NL", "MXFP4"), 1.0),
    }
)
"""What llama.cpp rearranges for a processor into memory beside the file's pages: a feature, the first that it has, to
types and how much larger they get. From ggml-cpu's repack.cpp and amx/common.h as llama-cpp-python 0.3.36 has them."""

SIMD_PIPES: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("Cortex-A53", "Cortex-A55", "Cortex-A510", "Cortex-A520"), 1),
        **dict.fromkeys(("Cortex-A72", "Cortex-A73", "Cortex-A75", "Cortex-A76", "Cortex-A77"), 2),
        **dict.fromkeys(("Cortex-A78", "Cortex-A710", "Cortex-A715", "Cortex-A720", "Cortex-A725"), 2),
        **dict.fromkeys(("Cortex-X1", "Cortex-X2", "Cortex-X3", "Cortex-X4"), 4),
        "Cortex-X925": 6,
        "Oryon": 4,
    }
)
"""Vector units of 128 bits in a core, by Arm's optimization guides and the makers' talks."""
_OPERATIONS = {"i8mm": 64, "dotprod": 32}
_PLAIN_OPERATIONS = 16
"""8-bit additions and multiplications of a vector unit in a cycle."""


class Band(NamedTuple):
    """Tokens a second, from the careful to the hopeful end."""

    low: float
    high: float


@dataclass(frozen=True)
class Memory:
    """Bytes that a run needs."""

    weights: int  # The file's tensors, mapped
    repacked: int  # A second copy of some, if the processor gets one
    cache: int  # Keys and values of a full context
    buffers: int  # What is computed on the way, of BATCH_TOKENS tokens
    process: int
    replaced: int = 0  # Of the weights, those whose repacked copy is read; the system may drop their pages

    @property
    def total(self) -> int:
        """All of it: the peak if memory is plenty."""
        return self.weights + self.repacked + self.cache + self.buffers + self.process

    @property
    def needed(self) -> int:
        """What every token reads."""
        return self.total - self.replaced

    def verdict(self, limit_bytes: int) -> str:
        """How a run stands to a limit, of MEMORY_VERDICTS. Only the weights, mapped from the file, can be dropped."""
        if self.total - self.weights > limit_bytes:
            return DOES_NOT_FIT
        return FITS if self.needed <= limit_bytes else THRASHES


@dataclass(frozen=True)
class Projection:
    """A model on a device."""

    device: str  # Id of the profile
    memory: Memory
    limit_bytes: int | None  # What it may have
    verdict: str | None  # How it stands to that, of MEMORY_VERDICTS
    decode: Band | None  # Generated tokens a second
    prefill: Band | None  # Prompt tokens a second
    assumptions: tuple[str, ...]  # What this rests on, and why something is unknown

    @property
    def fits(self) -> bool | None:
        """Whether it runs there without reading its weights again and again; None if unknown."""
        return None if self.verdict is None else self.verdict == FITS


def project_memory(
    facts: ModelFacts,
    n_ctx: int,
    features: Collection[str],
    *,
    cache_type: str = DEFAULT_CACHE,
    process_bytes: int = PROCESS_BYTES,
) -> Memory:
    """Memory of a run with a full context."""
    growth: Mapping[str, float] = next((types for name, types in REPACKED.items() if name in features), {})
    repacked = sum(size * growth.get(kind, 0.0) for kind, size in facts.bytes_by_type.items())
    # Files of float16 are read again and again under a limit that holds the pages or the copy, on AMX.
    replaced = sum(size for kind, size in facts.bytes_by_type.items() if kind in growth and kind != "F16")
    cells = -(-n_ctx // CACHE_CELLS) * CACHE_CELLS
    # The largest that live together: the FFN's two halves and its output, the residual stream and its norm; float32.
    widest = 2 * facts.ffn_width + 3 * facts.hidden_size
    return Memory(
        weights=facts.weight_bytes,
        repacked=round(repacked),
        cache=CACHE_TYPES[cache_type].size(facts.key_value_width) * cells,
        # The mask of attention is float16, all else float32.
        buffers=4 * (BATCH_TOKENS * widest + facts.vocab_size) + 2 * BATCH_TOKENS * n_ctx,
        process=process_bytes,
        replaced=replaced,
    )


def project(
    profile: DeviceProfile, facts: ModelFacts, n_ctx: int, cache_type: str = DEFAULT_CACHE
) -> Projection:
    """What a model needs on a device with a full context, and how fast it may be there."""
    features = profile.isa.value
    memory = project_memory(facts, n_ctx, features or ("dotprod",), cache_type=cache_type)
    limit, of_limit = memory_limit(profile)
    notes = [of_limit]
    if features is None:
        notes.append("the processor's instructions are unknown: it is taken to have dot products")
    decode, of_decode = decode_band(profile, facts.read_bytes, memory.cache)
    prefill, of_prefill = prefill_band(profile, facts.n_multiplied)
    return Projection(
        device=profile.id,
        memory=memory,
        limit_bytes=limit,
        verdict=None if limit is None else memory.verdict(limit),
        decode=decode,
        prefill=prefill,
        assumptions=(*notes, of_decode, of_prefill),
    )


def memory_limit(profile: DeviceProfile) -> tuple[int | None, str]:
    """Bytes that one application may use on a device, None if unknown; and what that rests on."""
    if profile.app_memory_mib.value is not None:
        why = f"limit of one application ({profile.app_memory_mib.basis})"
        return profile.app_memory_mib.value * MIB, why
    if profile.ram_mib.value is None:
        return None, "neither the RAM nor the limit of one application is known"
    return int(profile.ram_mib.value * MIB * APP_SHARE), f"an application may use {APP_SHARE:.0%} of the RAM"


def decode_band(profile: DeviceProfile, read_bytes: int, cache: int) -> tuple[Band | None, str]:
    """Generated tokens a second, None if the bandwidth is unknown; and what that rests on."""
    bandwidth = profile.dram_gb_s.value
    if bandwidth is None:
        return None, "decode unknown: the profile has no bandwidth"
    full, empty = ((bandwidth * 1e9) / (read_bytes + read) for read in (cache, 0))
    low, high = DECODE_SHARE
    text = f"decode gets {low:.0%} of {bandwidth:g} GB/s with a full context to {high:.0%} with an empty one"
    return Band(low * full, high * empty), text


def prefill_band(profile: DeviceProfile, n_multiplied: int) -> tuple[Band | None, str]:
    """Prompt tokens a second, None if cores, clocks or instructions are unknown; and what that rests on."""
    clusters, features = profile.cores.value, profile.isa.value
    if clusters is None or features is None:
        return None, "prefill unknown: the profile has no cores or no instructions"
    each = next((count for name, count in _OPERATIONS.items() if name in features), _PLAIN_OPERATIONS)
    # Small in-order cores hold the others up, and count only if there is nothing else.
    fast = [c for c in clusters if _pipes(c.core) != 1] or clusters
    unknown = [c.core for c in fast if c.max_mhz is None or not _pipes(c.core)]
    if unknown:
        return None, f"prefill unknown: no clock or no vector units of {', '.join(unknown)}"
    operations = sum(c.count * (c.max_mhz or 0) * 1e6 * _pipes(c.core) * each for c in fast)
    low, high = PREFILL_SHARE
    tokens = operations / (2 * n_multiplied)
    cores = sum(c.count for c in fast)
    return Band(low * tokens, high * tokens), f"prefill gets {low:.0%} to {high:.0%} of {cores} fast cores"


def _pipes(core: str) -> int:
    """Vector units of a core, 0 if unknown; its name may say more behind, as in "Oryon (prime)"."""
    return SIMD_PIPES.get(re.split(r"[ ,(]", core)[0], 0)
