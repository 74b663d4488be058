"""What each stage takes, from shapes and settings: one function a stage.

Constants count numbers that go through a function between matrix products. They were measured once, on SmolLM2-135M;
docs/scale.md says how well they fit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from cfsp.forecast import Extent, ProductsAs, Work
from cfsp.models.offload import WHOLE, may_keep_states, scratch_bytes
from cfsp.precision import products_in, trained_products
from cfsp.pruning.axes.spelling import BEGINNINGS, PREFIXES, RUN_TOKENS
from cfsp.pruning.moments import MOMENT_WINDOWS
from cfsp.pruning.prune import PROBE_TOKENS, SPELLING_WINDOWS, TOLD_WINDOWS
from cfsp.pruning.settings import PruneSettings
from cfsp.recovery.settings import (
    Training,
    held_out,
    loss_weights,
    method_of,
    token_budget,
    training_bytes,
    validation_interval,
)
from exporters.export_record import ExportFormat
from exporters.families import family_of, find_format
from exporters.parity import PARITY_SEQLEN, PARITY_WINDOWS
from exporters.rounding.walk import rounding_bytes

_PASS, _STATISTICS, _MOMENTS, _RECONSTRUCTED, _BACKWARDS = 10.0, 14.0, 25.0, 30.0, 30.0
"""For each number of a block's: in a plain pass, and in others with what they gather."""
_LOGIT, _COMPARED_LOGIT = 5.0, 30.0
"""For each logit that is scored, and of two models' that are compared."""
_LOADED, _WRITTEN, _QUANTIZED = 10.0, 10.0, 30.0
"""For each weight that is read, written, or quantized by itself."""
_ROUNDS = 7
"""Products of a weight with the Gram matrix of its inputs, while it is rounded for a text."""
_FEW_BITS = 1.2
"""How much faster a file's own runtime multiplies few bits than torch multiplies float32."""
_TOKENIZER, _STRINGS = 3e4, 5e4
"""For each token of the vocabulary: of a tokenizer that is read, and of one that is written and held against it."""
_PREFIX_TOKENS = 1.4
"""Of what a removed token is spelled in, but for its end."""
_STEP_S = 3e-3
"""Of a step in which texts grow by a token, for each block, beside its products."""
_READ_FASTER = 4.0
"""How much less of a file with few bits is read for a token."""
_ROUNDED_DISK = 9
"""Bytes of a weight on disk while a file to train through is made: the checkpoint, files of floats and of few bits."""
_FLOATS, _FEW, _TEXTS = 32.0, 8.0, 64
"""Bits of a weight in a file of floats, and at most in one of few bits; texts that are written beside each other."""


@dataclass(frozen=True)
class _Family:
    """What is a family's own.

    Attributes:
        rounded: For each weight that is rounded for a text.
        floats_stay: Whether the floats that its files are made of are there until all of them are.
        floats_in_blocks: Whether floats of a model that is read block by block are a block's at a time.
    """

    rounded: float
    floats_stay: bool
    floats_in_blocks: bool


_FAMILIES: Mapping[str, _Family] = MappingProxyType(
    {
        "gguf": _Family(220.0, floats_stay=True, floats_in_blocks=False),
        "onnx": _Family(360.0, floats_stay=False, floats_in_blocks=True),
    }
)


@dataclass(frozen=True)
class Windows:
    """Text.

    Attributes:
        count: Windows.
        seqlen: Tokens in each.
    """

    count: int
    seqlen: int

    @property
    def tokens(self) -> int:
        """In all of them."""
        return self.count * self.seqlen

    def most(self, count: int | None) -> Windows:
        """At most so many of them; all where there is no count."""
        return self if count is None else replace(self, count=min(count, self.count))


_PROOF = Windows(PARITY_WINDOWS, PARITY_SEQLEN)


@dataclass(frozen=True)
class Pruning:
    """What pruning is asked for.

    Attributes:
        settings: How.
        text: Calibration windows.
        only_plan: Whether no model is changed.
        has_plan: Whether what goes is decided already.
    """

    settings: PruneSettings
    text: Windows
    only_plan: bool = False
    has_plan: bool = False

    @property
    def cuts_ffn_alone(self) -> bool:
        """Whether the prune ratio says how much goes."""
        others = (
            self.settings.blocks,
            self.settings.attentions,
            self.settings.kv_groups,
            self.settings.vocabulary,
        )
        return not any(others)


@dataclass(frozen=True)
class Drawing:
    """What a release begins with.

    Attributes:
        text: Calibration windows.
        moments: Whether the dense model's activations are measured.
    """

    text: Windows
    moments: bool


@dataclass(frozen=True)
class Exporting:
    """What an export is asked for.

    Attributes:
        names: Formats.
        text: Windows that files of few bits are rounded for; None without.
        gptq: Whether GGUF files are.
        tune_scales: Whether their scales are trained on it.
        is_saved: Whether the model is no folder, and saved as one first.
        is_proven: Whether files are held against the checkpoint.
    """

    names: tuple[str, ...]
    text: Windows | None = None
    gptq: bool = True
    tune_scales: bool = False
    is_saved: bool = False
    is_proven: bool = True

    def rounds(self, row: ExportFormat) -> bool:
        """Whether a format's numbers are chosen for the text."""
        return self.text is not None and "calibration" in row.reads and (self.gptq or "gptq" not in row.reads)

    def trains(self, row: ExportFormat) -> bool:
        """Whether its scales are trained on the text."""
        return self.rounds(row) and (self.tune_scales or "gptq" not in row.reads)


@dataclass(frozen=True)
class Judging:
    """What models are judged on, one or two beside each other.

    Attributes:
        text: Windows that all texts have at most.
        prompts: Questions.
        max_new_tokens: Of an answer.
        few_bits: Of each model, whether its runtime multiplies few bits.
    """

    text: Windows
    prompts: int
    max_new_tokens: int
    few_bits: tuple[bool, ...]


@dataclass(frozen=True)
class Recovering:
    """What training is asked for.

    Attributes:
        settings: How to train.
    """

    settings: Training


def drawing(extents: Sequence[Extent], asked: Drawing) -> Work:
    """The dense model as a checkpoint, with its activation moments."""
    (dense,) = extents
    measured = [_measured(dense, asked.text)] if asked.moments else []
    return _all([_loaded(dense), *measured, _saved(dense)])


def pruning(extents: Sequence[Extent], asked: Pruning) -> Work:
    """Statistics, plan, cut and reconstruction, and the activation moments of what is left."""
    (dense,), settings, text = extents, asked.settings, asked.text
    kept = dense.narrowed(settings.prune_ratio)
    told = settings.keeps_blocks
    read = text.most(TOLD_WINDOWS) if told else text
    seen = _passed(dense, read, _STATISTICS, held=read.tokens if settings.prune_ratio else None)
    steps = [_loaded(dense), *_spelled(dense, settings, text), seen]
    steps += [] if asked.has_plan else _removals(dense, settings, text)
    if asked.only_plan:
        return _all(steps)
    stream = 0
    if settings.repairs and settings.prune_ratio:
        held = dense.resident_bytes + 5 * dense.states_bytes(text.tokens)
        steps += [replace(_passed(dense, text, _RECONSTRUCTED), memory=held)]
        steps += [_gathered(kept, text)]
        stream = 0 if asked.has_plan else _kept_stream(dense, text, _all(steps).scratch)
        steps += [] if stream else [_passed(dense, text)]
    work = _all([*steps, replace(_measured(kept, text), least_memory=0), _saved(kept)])
    work = replace(work, least_disk=_least_kept(dense, settings) if asked.cuts_ffn_alone else 0)
    scratch = scratch_bytes(dense.least_weights) if dense.by_blocks else work.scratch
    return replace(work, scratch=stream + scratch)


def exporting(extents: Sequence[Extent], asked: Exporting) -> Work:
    """The checkpoint's side of the proof, the floats that the rest is made of, and each file with its proof."""
    (extent,) = extents
    if extent.by_blocks and not extent.is_alone:
        extent = replace(extent, keeping=WHOLE)
    steps = [_loaded(extent), _passed(extent, _PROOF)] if asked.is_proven else []
    if asked.is_saved:
        extent = replace(extent, stored_bytes=4)
        steps += [_saved(extent), _loaded(extent)]
    saved = _all(steps)
    most = least = 0
    for name, rows in _by_family(asked.names).items():
        floats = Work() if any(row.bits == _FLOATS for row in rows) else _floats(extent, name, asked)
        files = _all(_file(extent, row, asked) for row in rows)
        at_once = sum if _FAMILIES[name].floats_stay else max
        most = max(most, saved.disk + at_once((floats.disk, files.disk)))
        least = max(least, saved.least_disk + at_once((floats.least_disk, files.least_disk)))
        saved = saved.then(replace(floats, disk=0, least_disk=0)).then(files)
    return replace(saved, disk=most, least_disk=least)


def judging(extents: Sequence[Extent], asked: Judging) -> Work:
    """Windows and answers of each model; of two, their logits are compared."""
    compared = len(extents) > 1
    works = []
    for extent, few in zip(extents, asked.few_bits, strict=True):
        logits = _COMPARED_LOGIT / 2 if compared else _LOGIT
        seen = _all([_loaded(extent), _passed(extent, asked.text), _headed(extent, asked.text, logits)])
        said = _answered(extent, asked.prompts, asked.max_new_tokens, few_bits=few)
        works.append((_in_runtime(extent, seen, _FEW) if few else seen).then(said))
    memory, least = (sum(getattr(work, name) for work in works) for name in ("memory", "least_memory"))
    return replace(_all(works), memory=memory, least_memory=least, is_most=asked.text.count > 0)


def recovering(extents: Sequence[Extent], asked: Recovering) -> Work:
    """Training passes of the student, and the teacher's where the loss reads it, over a budget of tokens.

    Validations, which learn nothing, are as many as held-out text of one reference makes them.
    """
    (extent,), settings = extents, asked.settings
    text = Windows(max(1, (token_budget(settings) or 0) // settings.seqlen), settings.seqlen)
    judged = text.most(held_out(text.count + settings.validation_windows, settings.validation_windows))
    method, (_, distilled) = method_of(settings), loss_weights(settings)
    few = method.adapter or method.through_rounding
    steps = [_loaded(extent), _saved(extent)]
    for read, passes in (
        (text, (2 if method.adapter else 3) + bool(distilled)),
        (judged, (1 + bool(distilled)) * (1 + _validations(settings, text.count, judged.count))),
    ):
        steps += [_passed(extent, read, passes * _PASS, passes), _headed(extent, read).times(passes)]
    held = training_bytes(settings, extent, extent if distilled else None)
    kept = Work(
        disk=(_ROUNDED_DISK if method.through_rounding else 0 if method.adapter else 12) * extent.n_weights
    )
    # The models themselves are in memory already where this is asked once they are read.
    least = 0 if few else 12 * extent.least_weights
    return replace(_all([*steps, kept]), memory=held, least_memory=least)


def _validations(settings: Training, sequences: int, held: int) -> int:
    """After the first one, by one process."""
    per_step = settings.batch_size * settings.gradient_accumulation_steps
    n_steps = max(1, round(sequences / per_step))
    return math.ceil(n_steps / validation_interval(settings, n_steps, per_step, held))


@dataclass(frozen=True)
class Stage:
    """A row of `STAGES`.

    Attributes:
        work: What it takes, for the models that it reads and what is asked for.
        less: What would take less memory, in words.
        products_as: The context that torch multiplies in.
    """

    work: Callable[[Sequence[Extent], Any], Work]
    less: str
    products_as: ProductsAs = products_in


STAGES: Mapping[str, Stage] = MappingProxyType(
    {
        "draw": Stage(drawing, "less text (--nsamples, --seqlen), or a smaller model"),
        "prune": Stage(pruning, "less text (--nsamples, --seqlen), or a smaller model"),
        "export": Stage(
            exporting, "less text (--nsamples, --rounding-windows, --seqlen), or a smaller model"
        ),
        "eval": Stage(judging, "shorter windows (--seqlen), or a smaller model"),
        "recover": Stage(
            recovering,
            "an adapter (--method lora), the loss next-token (no teacher), or a smaller model",
            trained_products,
        ),
    }
)
"""Stage -> its forecast."""


def _all(steps: Iterable[Work]) -> Work:
    return functools.reduce(Work.then, steps, Work())


def _by_family(names: Iterable[str]) -> dict[str, list[ExportFormat]]:
    """Family -> rows of the formats that it makes."""
    rows: dict[str, list[ExportFormat]] = {}
    for name in names:
        rows.setdefault(family_of(name).name, []).append(find_format(name))
    return rows


def _passed(
    extent: Extent,
    text: Windows,
    elements: float = _PASS,
    passes: float = 1.0,
    *,
    held: int | None = None,
) -> Work:
    """Text through all blocks; held: tokens whose hidden states are in memory at once, by default a window's."""
    states = extent.states_bytes(min(text.tokens, text.seqlen) if held is None else held)
    return Work(
        {text.seqlen: passes * extent.pass_operations(text.tokens, text.seqlen)},
        elements * extent.pass_elements(text.tokens),
        memory=extent.resident_bytes + 2 * states,
        least_memory=extent.least_resident_bytes + states,
    )


def _measured(extent: Extent, text: Windows) -> Work:
    """Activation moments."""
    some = text.most(MOMENT_WINDOWS)
    return _passed(extent, some, _MOMENTS, held=some.tokens)


def _kept_stream(dense: Extent, text: Windows, beside: int) -> int:
    """Bytes of what every block gives, where statistics keep it for the reconstruction beside other files."""
    n_bytes = len(dense.blocks) * dense.states_bytes(text.tokens)
    kept = dense.on_cpu and dense.is_alone and may_keep_states(n_bytes, dense.least_weights, beside)
    return n_bytes if kept else 0


def _least_kept(dense: Extent, settings: PruneSettings) -> int:
    """Bytes of a checkpoint without a share of the FFN channels, if blocks were nothing else; widths are rounded."""
    rounded = settings.align / 2 * len(dense.widths) / sum(dense.widths)
    share = max(0.0, 1 - settings.prune_ratio - rounded)
    return dense.stored_bytes * int(share * dense.block_weights + dense.end_weights)


def _headed(extent: Extent, text: Windows, elements: float = _LOGIT) -> Work:
    """Text through the output matrix, and what is done with its logits."""
    logits = elements * text.tokens * extent.vocab_size
    return Work({text.seqlen: extent.head_operations(text.tokens)}, logits)


def _loaded(extent: Extent) -> Work:
    """A model that is read."""
    elements = _LOADED * extent.n_weights + _TOKENIZER * extent.vocab_size
    return Work(host_elements=elements, memory=extent.resident_bytes)


def _saved(extent: Extent) -> Work:
    """A checkpoint of a model."""
    n_bytes, least = (extent.stored_bytes * count for count in (extent.n_weights, extent.least_weights))
    return Work(host_elements=_WRITTEN * extent.n_weights, disk=n_bytes, least_disk=least)


def _gathered(extent: Extent, text: Windows) -> Work:
    """Gram matrices of what down_proj reads."""
    squares = [width**2 for width in extent.widths]
    return Work({text.seqlen: float(text.tokens) * sum(squares)})


def _spelled(extent: Extent, settings: PruneSettings, text: Windows) -> list[Work]:
    """What is read for rows that learn to spell removed tokens: windows, and the beginnings of these tokens."""
    gone = extent.vocab_size - settings.vocabulary
    if settings.reconstruct == "none" or not settings.vocabulary or gone <= 0:
        return []
    tokens = _PREFIX_TOKENS * BEGINNINGS * min(PREFIXES, gone)
    prefixes = Windows(math.ceil(tokens / RUN_TOKENS), RUN_TOKENS)
    read = _passed(extent, prefixes).then(_headed(extent, prefixes))
    return [_passed(extent, text.most(SPELLING_WINDOWS)), read]


def _removals(extent: Extent, settings: PruneSettings, text: Windows) -> list[Work]:
    """Trials without a block, an attention, or a part of one."""
    trials = len(extent.blocks) * sum(map(bool, (settings.blocks, settings.attentions, settings.kv_groups)))
    probes = replace(text, seqlen=min(PROBE_TOKENS, text.seqlen))
    tried = _passed(extent, probes).then(_headed(extent, probes, _COMPARED_LOGIT))
    return [tried.times(trials)] if trials else []


def _answered(extent: Extent, prompts: int, tokens: int, *, few_bits: bool = False) -> Work:
    """Answers: torch writes them beside each other, a file's own runtime one after the other."""
    operations = 2.0 * prompts * tokens * extent.n_weights
    if few_bits or not prompts:
        return Work(host_products={1: operations / _READ_FASTER}) if prompts else Work()
    return Work({prompts: operations}, seconds=_STEP_S * tokens * len(extent.blocks))


def _in_runtime(extent: Extent, work: Work, bits: float) -> Work:
    """It in a file's own runtime, which computes on the CPU and maps the file into memory."""
    there = work.on_host(1.0 if bits >= _FLOATS / 2 else _FEW_BITS)
    return replace(there, memory=int(bits / 8 * extent.n_weights), least_memory=0)


def _proven(extent: Extent, bits: float) -> Work:
    """A file that is run on the text of the proof, and compared."""
    run = _in_runtime(extent, _all([_passed(extent, _PROOF), _headed(extent, _PROOF, 0.0)]), bits)
    strings = Work(host_elements=_STRINGS * extent.vocab_size)
    return _all([run, _headed(extent, _PROOF, _COMPARED_LOGIT), strings])


def _floats(extent: Extent, family: str, asked: Exporting) -> Work:
    """What a family's files are made of: float32; of a model in files in its own bits, or nothing but its blocks."""
    if extent.by_blocks and _FAMILIES[family].floats_in_blocks:
        return Work()
    n_bytes = (extent.stored_bytes if extent.by_blocks else 4) * extent.least_weights
    made = Work(host_elements=_WRITTEN * extent.n_weights, disk=n_bytes, least_disk=n_bytes)
    return made.then(_proven(extent, _FLOATS)) if asked.is_proven else made


def _file(extent: Extent, row: ExportFormat, asked: Exporting) -> Work:
    """A format's file."""
    least = int(row.bits / 8 * extent.least_weights) if row.is_sized else 0
    n_bytes = int(row.bits / 8 * extent.n_weights)
    elements = (_WRITTEN if row.bits == _FLOATS else _QUANTIZED) * extent.n_weights
    steps = [Work(host_elements=elements, disk=n_bytes, least_disk=least, memory=3 * extent.resident_bytes)]
    if asked.text is not None and asked.rounds(row):
        steps += [_rounded(extent, asked.text, family_of(row.name).name)]
    if asked.text is not None and asked.trains(row) and not extent.by_blocks:
        trained = _passed(extent, asked.text, 2 * _BACKWARDS, passes=6)
        steps += [trained, _headed(extent, asked.text, _COMPARED_LOGIT).times(4)]
    return _all([*steps, _proven(extent, row.bits)] if asked.is_proven else steps)


def _rounded(extent: Extent, text: Windows, family: str) -> Work:
    """Weights that are rounded for a text."""
    matrices = [shape for block in extent.blocks for shape in block]
    matrices += [(extent.vocab_size, extent.hidden_size)]
    operations = _ROUNDS * 2.0 * sum(rows * columns**2 for rows, columns in matrices)
    # Two Gram matrices: of inputs, and of them with what the exact stream has beyond them.
    operations += 2 * text.tokens * sum({columns**2 for _, columns in matrices}) * 2.0 * len(extent.blocks)
    held = rounding_bytes(text.tokens, max(extent.widths))
    rounding = Work(
        {text.seqlen: operations},
        _FAMILIES[family].rounded * extent.n_weights,
        memory=3 * extent.resident_bytes + held,
        least_memory=extent.least_resident_bytes + held,
    )
    return _passed(extent, text, 2 * _PASS, passes=2, held=text.tokens).then(rounding)


def writing(extent: Extent, text: Windows) -> Work:
    """Text that a model writes itself, many texts beside each other."""
    steps = text.tokens // _TEXTS + 1
    operations = 2.0 * _TEXTS * steps * extent.n_weights
    return _all([_loaded(extent), _saved(extent), Work({_TEXTS: operations}).on_host(_FEW_BITS)])
