"""What each stage takes, from shapes and settings: one function a stage.

Constants count numbers that go through a function between matrix products. They were measured once, on SmolLM2-135M;
docs/scale.md says how well they fit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from cfsp.forecast import Extent, Work
from cfsp.pruning.moments import MOMENT_WINDOWS
from cfsp.pruning.prune import GRADIENT_WINDOWS, PROBE_TOKENS, PROBE_WINDOWS
from cfsp.pruning.settings import PruneSettings
from cfsp.recovery.settings import METHODS, Training, loss_weights, token_budget
from exporters.export_record import ExportFormat
from exporters.families import family_of, find_format
from exporters.parity import PARITY_SEQLEN, PARITY_WINDOWS

_PASS, _STATISTICS, _MOMENTS, _RECONSTRUCTED, _BACKWARDS = 10.0, 14.0, 25.0, 40.0, 30.0
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
_STEP_S = 3e-3
"""Of a step in which texts grow by a token, for each block, beside its products."""
_READ_FASTER = 4.0
"""How much less of a file with few bits is read for a token."""
_FLOATS, _TEXTS = 32.0, 64
_AT_ONCE = 3
"""Tensors of an FFN's width that rounding holds for all tokens."""


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

    def most(self, count: int) -> Windows:
        """At most so many of them."""
        return replace(self, count=min(count, self.count))


_PROOF = Windows(PARITY_WINDOWS, PARITY_SEQLEN)


@dataclass(frozen=True)
class Pruning:
    """What pruning is asked for.

    Attributes:
        settings: What a target takes away is not known before, and counts as nothing.
        text: Calibration windows.
    """

    settings: PruneSettings
    text: Windows


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
        text: Windows of all texts.
        prompts: Questions.
        max_new_tokens: Of an answer.
        few_bits: Of each model, whether its runtime multiplies few bits.
    """

    text: Windows
    prompts: int
    max_new_tokens: int
    few_bits: tuple[bool, ...]


@dataclass(frozen=True)
class Surveying:
    """What a frontier is asked for.

    Attributes:
        pruning: Of each pruned checkpoint.
        exporting: In which formats each checkpoint is made.
        text: Windows that every file is measured on.
        checkpoints: Pruned ones.
    """

    pruning: Pruning
    exporting: Exporting
    text: Windows
    checkpoints: int


def drawing(extents: Sequence[Extent], asked: Drawing) -> Work:
    """The dense model as a checkpoint, with its activation moments."""
    (dense,) = extents
    measured = [_passed(dense, asked.text.most(MOMENT_WINDOWS), _MOMENTS)] if asked.moments else []
    return _all([_loaded(dense), *measured, _saved(dense)])


def pruning(extents: Sequence[Extent], asked: Pruning) -> Work:
    """Statistics, plan, cut and reconstruction, and the activation moments of what is left."""
    (dense,), settings, text = extents, asked.settings, asked.text
    kept = dense.narrowed(settings.prune_ratio)
    steps = [_loaded(dense), _passed(dense, text, _STATISTICS), *_removals(dense, settings, text)]
    steps += [_gathered(dense, text)] if settings.needs_gram else []
    if settings.needs_gradients:
        seen = text.most(GRADIENT_WINDOWS)
        steps += [_passed(dense, seen, _BACKWARDS, passes=3), _headed(dense, seen).times(2)]
    if settings.reconstruct == "block-by-block" and settings.prune_ratio:
        held = dense.resident_bytes + 5 * dense.states_bytes(text.tokens)
        steps += [replace(_passed(dense, text, _RECONSTRUCTED, passes=2), memory=held)]
        steps += [replace(_gathered(kept, text), scratch=0)]
    work = _all([*steps, _passed(kept, text.most(MOMENT_WINDOWS), _MOMENTS), _saved(kept)])
    # What was changed of a model in files lies in scratch files, in as many bytes as it may take.
    return replace(work, scratch=4 * dense.n_weights) if dense.by_blocks else work


def exporting(extents: Sequence[Extent], asked: Exporting) -> Work:
    """The checkpoint's side of the proof, the floats that the rest is made of, and each file with its proof."""
    (extent,) = extents
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
        seen = _passed(extent, asked.text).then(_headed(extent, asked.text, logits))
        said = _answered(extent, asked.prompts, asked.max_new_tokens, few_bits=few)
        works.append(_all([_loaded(extent), _faster(seen) if few else seen, said]))
    return replace(_all(works), memory=sum(work.memory for work in works))


def recovering(extents: Sequence[Extent], asked: Training) -> Work:
    """Training passes of the student, and the teacher's where the loss reads it, over a budget of tokens."""
    (extent,) = extents
    text = Windows(max(1, (token_budget(asked) or 0) // asked.seqlen), asked.seqlen)
    adapter, (_, distilled) = METHODS[asked.method].adapter, loss_weights(asked)
    passes = (2 if adapter else 3) + bool(distilled)
    steps = [_loaded(extent), _passed(extent, text, passes * _PASS, passes)]
    steps += [_headed(extent, text).times(passes), _saved(extent)]
    # Weights, gradients and Adam's two moments of all that is trained; and the teacher.
    held = (1 + bool(distilled) + (0 if adapter else 3)) * extent.resident_bytes
    held += len(extent.blocks) * extent.states_bytes(asked.batch_size * asked.seqlen) * 8
    kept = Work(disk=0 if adapter else 12 * extent.n_weights)
    return replace(_all([*steps, kept]), memory=held)


def surveying(extents: Sequence[Extent], asked: Surveying) -> Work:
    """Every checkpoint, each of its files, and what these lose on a text."""
    (dense,) = extents
    kept = dense.narrowed(asked.pruning.settings.prune_ratio)
    steps = [pruning(extents, asked.pruning).times(asked.checkpoints)] if asked.checkpoints else []
    for extent, count in ((dense, 1), (kept, asked.checkpoints)):
        files = exporting((extent,), asked.exporting)
        one = _faster(_all([_passed(extent, asked.text), _headed(extent, asked.text, _COMPARED_LOGIT)]))
        steps += [files.times(count), one.times(count * len(asked.exporting.names))]
    # Files that others dominate are deleted; one is made at a time.
    return replace(_all(steps), least_disk=4 * dense.least_weights)


STAGES: Mapping[str, Callable[[Sequence[Extent], Any], Work]] = MappingProxyType(
    {
        "draw": drawing,
        "prune": pruning,
        "export": exporting,
        "eval": judging,
        "recover": recovering,
        "frontier": surveying,
    }
)
"""Stage -> its work, for the models that it reads and what is asked for."""


def _all(steps: Iterable[Work]) -> Work:
    return functools.reduce(Work.then, steps, Work())


def _by_family(names: Iterable[str]) -> dict[str, list[ExportFormat]]:
    """Family -> rows of the formats that it makes."""
    rows: dict[str, list[ExportFormat]] = {}
    for name in names:
        rows.setdefault(family_of(name).name, []).append(find_format(name))
    return rows


def _passed(extent: Extent, text: Windows, elements: float = _PASS, passes: float = 1.0) -> Work:
    """Text through all blocks."""
    return Work(
        {text.seqlen: passes * extent.pass_operations(text.tokens, text.seqlen)},
        elements * extent.pass_elements(text.tokens),
        memory=extent.resident_bytes + 2 * extent.states_bytes(text.tokens),
        least_memory=extent.least_resident_bytes + extent.states_bytes(text.tokens),
    )


def _headed(extent: Extent, text: Windows, elements: float = _LOGIT) -> Work:
    """Text through the output matrix, and what is done with its logits."""
    logits = elements * text.tokens * extent.vocab_size
    return Work({text.seqlen: extent.head_operations(text.tokens)}, logits)


def _loaded(extent: Extent) -> Work:
    """A model that is read."""
    elements = _LOADED * extent.n_weights + _TOKENIZER * extent.vocab_size
    return Work(elements=elements, memory=extent.resident_bytes)


def _saved(extent: Extent) -> Work:
    """A checkpoint of a model."""
    n_bytes, least = (extent.stored_bytes * count for count in (extent.n_weights, extent.least_weights))
    return Work(elements=_WRITTEN * extent.n_weights, disk=n_bytes, least_disk=least)


def _gathered(extent: Extent, text: Windows) -> Work:
    """Gram matrices of what down_proj reads."""
    squares = [width**2 for width in extent.widths]
    return Work({text.seqlen: float(text.tokens) * sum(squares)}, scratch=4 * sum(squares))


def _removals(extent: Extent, settings: PruneSettings, text: Windows) -> list[Work]:
    """Trials without a block, an attention, or a part of one."""
    trials = len(extent.blocks) * sum(map(bool, (settings.blocks, settings.attentions, settings.kv_groups)))
    probes = replace(text.most(PROBE_WINDOWS), seqlen=min(PROBE_TOKENS, text.seqlen))
    tried = _passed(extent, probes).then(_headed(extent, probes, _COMPARED_LOGIT))
    return [tried.times(trials)] if trials else []


def _answered(extent: Extent, prompts: int, tokens: int, *, few_bits: bool = False) -> Work:
    """Answers: torch writes them beside each other, a file's own runtime one after the other."""
    operations = 2.0 * prompts * tokens * extent.n_weights
    if few_bits or not prompts:
        return Work({1: operations / _READ_FASTER}) if prompts else Work()
    return Work({prompts: operations}, seconds=_STEP_S * tokens * len(extent.blocks))


def _faster(work: Work) -> Work:
    """It in a runtime that multiplies few bits."""
    return replace(work, products={n: each / _FEW_BITS for n, each in work.products.items()})


def _proven(extent: Extent, bits: float) -> Work:
    """A file that is run on the text of the proof, and compared."""
    run = _all([_passed(extent, _PROOF), _headed(extent, _PROOF, 0.0)])
    run = run if bits >= _FLOATS / 2 else _faster(run)
    strings = Work(elements=_STRINGS * extent.vocab_size)
    return _all([run, _headed(extent, _PROOF, _COMPARED_LOGIT), strings])


def _floats(extent: Extent, family: str, asked: Exporting) -> Work:
    """What a family's files are made of: float32; of a model in files in its own bits, or nothing but its blocks."""
    if extent.by_blocks and _FAMILIES[family].floats_in_blocks:
        return Work()
    n_bytes = (extent.stored_bytes if extent.by_blocks else 4) * extent.least_weights
    made = Work(elements=_WRITTEN * extent.n_weights, disk=n_bytes, least_disk=n_bytes)
    return made.then(_proven(extent, _FLOATS)) if asked.is_proven else made


def _file(extent: Extent, row: ExportFormat, asked: Exporting) -> Work:
    """A format's file."""
    least = int(row.bits / 8 * extent.least_weights) if row.is_sized else 0
    n_bytes = int(row.bits / 8 * extent.n_weights)
    elements = (_WRITTEN if row.bits == _FLOATS else _QUANTIZED) * extent.n_weights
    steps = [Work(elements=elements, disk=n_bytes, least_disk=least, memory=3 * extent.resident_bytes)]
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
    operations += text.tokens * sum({columns**2 for _, columns in matrices}) * 2.0 * len(extent.blocks)
    held = 4 * _AT_ONCE * text.tokens * max(extent.widths)
    rounding = Work(
        {text.seqlen: operations},
        _FAMILIES[family].rounded * extent.n_weights,
        memory=3 * extent.resident_bytes + held,
        least_memory=extent.least_resident_bytes + held,
    )
    return _passed(extent, text).then(rounding)


def writing(extent: Extent, text: Windows) -> Work:
    """Text that a model writes itself, many texts beside each other."""
    steps = text.tokens // _TEXTS + 1
    operations = 2.0 * _TEXTS * steps * extent.n_weights
    return _all([_loaded(extent), _saved(extent), _faster(Work({_TEXTS: operations}))])
