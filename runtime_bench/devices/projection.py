"""What a model would need and how fast it would be on a device that is not here: a projection, never a measurement.

Memory is a sum of what llama.cpp allocates. Speed is a band: a generated token reads all weights and the cache once, at
30 to 70 % of the theoretical bandwidth; a prompt gets 5 to 30 % of what the cores could multiply. docs/devices.md holds
the bands against published speeds.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from cfsp.settings import Setting
from exporters.gguf.quants import CACHE_TYPES, DEFAULT_CACHE
from runtime_bench.devices.model_facts import ModelFacts
from runtime_bench.devices.profile import DeviceProfile
from runtime_bench.records.bench_record import DOES_NOT_FIT, FITS, THRASHES

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
