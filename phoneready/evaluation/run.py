"""Judge a model, by itself or against another one: texts, tasks, answers, own metrics; and files side by side."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from cfsp.errors import InputError
from cfsp.evaluation.language_model import LanguageModel, answer, vocabulary_difference
from cfsp.evaluation.loss import (
    Distance,
    Scored,
    divergence,
    predicted_bytes,
    respelled,
    respelled_divergence,
    text_losses,
)
from cfsp.evaluation.tasks import chat_requests, load_tasks, run_tasks
from cfsp.evaluation.torch_model import TorchLanguageModel
from cfsp.progress import Progress, no_progress
from cfsp.reading import read_json_lines, read_text
from cfsp.settings import check_settings
from cfsp.text.degeneration import degenerate, system_text
from cfsp.text.respelling import Respelling, respelling
from cfsp.text.self_sampling import TRANSFORMERS, Writer, sample_windows
from cfsp.text.settings import SELF
from cfsp.text.tokens import TokenWindows, started, token_windows, tokens_sha256
from phoneready.evaluation.evaluation_record import (
    Evaluation,
    ModelIdentity,
    TextLoss,
    Vocabularies,
    degeneration_of,
    repeated_text,
)
from phoneready.evaluation.models import OpenSettings, open_language_model, runtime_for
from phoneready.evaluation.own_metrics import find_metric, measure
from phoneready.evaluation.settings import EvaluationSettings


def evaluate(
    model: LanguageModel,
    against: LanguageModel | None,
    settings: EvaluationSettings,
    *,
    writers: Sequence[Writer] = (TRANSFORMERS,),
    known: tuple[TextLoss, ...] | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Judge a model, against a reference model if one is given; token ids come from the reference's tokenizer.

    The first of `writers` that can has the reference model write, if that is a text. If the texts are
    `known`, they are read for own metrics only, and the reference does no tasks. Raises InputError for texts, tasks
    or metrics that cannot be used, and MissingExtraError for tasks without the `eval` extra.
    """
    check_settings(settings)
    check_texts(settings)
    models = [model, *([against] if against else [])]
    different = vocabulary_difference(model, against) if against else None
    if different and settings.metrics:
        raise InputError(f"{different}; own metrics read the ids of one: leave out the metrics, or --against")
    spelling = None
    if against and different:
        try:
            spelling = respelling(against.tokenizer, model.tokenizer)
        except InputError:
            spelling = None  # the model's tokens are no part of the reference's
    metrics = {name: find_metric(name) for name in settings.metrics}
    with ExitStack() as stack:
        # Tasks are loaded first: a wrong name must not be found after an hour of measuring.
        tasks = stack.enter_context(load_tasks(settings)) if settings.tasks else None
        for one in models:
            for task in tasks.chats if tasks else ():
                chat_requests(one, task)
        sources = settings.sources if known is None or metrics else ()
        windows = [
            text_windows(source, against or model, settings, progress, writers) for _, source in sources
        ]
        texts = known
        if texts is None:
            texts = tuple(
                measure_text(kind, model, against, text, spelling, progress=progress)
                for (kind, _), text in zip(sources, windows, strict=True)
            )
        asked = models if known is None else models[:1]
        done = [run_tasks(one, tasks, progress=progress) if tasks else () for one in asked]
    measured = [row for name, metric in metrics.items() for row in measure(name, metric, model, windows)]
    answers: list[tuple[str, ...]] = [() for _ in models]
    degeneration = None
    if settings.prompts:
        longest = settings.max_new_tokens
        answers = [
            tuple(answer(one, settings.prompts, max_new_tokens=longest, progress=progress)) for one in models
        ]
        reasons = [
            reasons_of(said, settings.prompts, one.tokenizer)
            for said, one in zip(answers, models, strict=True)
        ]
        degeneration = degeneration_of(settings.prompts, longest, *reasons)
    vocabularies = None
    if against and different:
        sizes = [len(one.tokenizer.get_vocab()) for one in models]
        vocabularies = Vocabularies(sizes[0], sizes[1], spelling is not None)
    return Evaluation(
        model=_identity(model),
        against=_identity(against) if against else None,
        seed=settings.seed,
        texts=texts,
        prompts=settings.prompts,
        answers=answers[0],
        against_answers=answers[-1] if against else (),
        degeneration=degeneration,
        tasks=done[0],
        against_tasks=done[1] if len(done) > 1 else (),
        metrics=tuple(measured),
        vocabularies=vocabularies,
    )


def _identity(model: LanguageModel) -> ModelIdentity:
    rounded = model.loaded.source.rounded if isinstance(model, TorchLanguageModel) else None
    hashes = model.sha256, model.source_sha256
    return ModelIdentity(model.name, model.runtime, *hashes, model.cache_type, rounded)


def check_texts(settings: EvaluationSettings) -> None:
    name = repeated_text(settings.text, settings.chats)
    if name is not None:
        raise InputError("two texts have this name; rename one of the files", field="text", value=name)


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts from a file: .txt one a line; .jsonl with `prompt`, or `turns` of which the first counts."""
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError("not a prompts file", field="prompts", value=str(path), allowed=".txt or .jsonl")
    if path.suffix == ".txt":
        prompts = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    else:
        prompts = []
        for where, row in read_json_lines(path):
            turns = row.get("turns")
            prompt = row.get("prompt") or (turns[0] if isinstance(turns, list) and turns else None)
            if not isinstance(prompt, str) or not prompt.strip():
                raise InputError(f"{where}: no prompt", allowed="a text in `prompt`, or `turns` with one")
            prompts.append(prompt)
    if not prompts:
        raise InputError(f"{path} has no prompts")
    return tuple(prompts)


def text_windows(
    source: str,
    reference: LanguageModel,
    settings: EvaluationSettings,
    progress: Progress,
    writers: Sequence[Writer],
) -> TokenWindows:
    """The windows of one text, or sampled from the reference model; token ids are the reference's."""
    if source != SELF:
        return token_windows(
            source, reference.tokenizer, seqlen=settings.seqlen, max_windows=settings.max_windows
        )
    if not isinstance(reference, TorchLanguageModel):
        raise InputError(
            "only a reference model in torch can write its own text", field="chats", value=SELF,
            allowed="a file of chats, or --against a checkpoint",
        )  # fmt: skip
    ids = sample_windows(
        reference.loaded,
        nsamples=settings.max_windows,
        seqlen=settings.seqlen,
        seed=settings.seed,
        writers=writers,
        progress=progress,
    )
    ids = started(ids, reference.tokenizer)
    return TokenWindows(ids, SELF, tokens_sha256(ids))


def measure_text(
    kind: str,
    model: LanguageModel,
    against: LanguageModel | None,
    windows: TokenWindows,
    spelling: Respelling | None = None,
    *,
    progress: Progress = no_progress,
) -> TextLoss:
    """What a model loses on windows of the reference's ids: the same text for both, however many tokens that takes.

    A `spelling` says how a model that lost tokens spells the reference's; one of another family has none, and then, as
    for a model that gives no logits, there is no distance. Raises InputError for more tokens than its context.
    """
    ids, reader = windows.ids, (against or model).tokenizer
    whole = [Scored(window, 1) for window in ids]
    different = spelling is not None or bool(against and vocabulary_difference(model, against))
    own = [respelled(window, reader, model.tokenizer) for window in ids] if different else whole
    longest = max(len(text.ids) for text in own)
    if longest > max(model.context_length, ids.shape[1]):
        raise InputError(
            f"the model needs {longest} tokens for the text of a window, its context has {model.context_length}",
            field="seqlen", value=ids.shape[1], allowed="shorter windows",
        )  # fmt: skip
    theirs: tuple[float, ...] = ()
    distance = None
    if against is None or not model.gives_logits or (different and spelling is None):
        nats = text_losses(model, own, progress=progress)
        theirs = text_losses(against, whole, progress=progress) if against else ()
    else:
        if spelling is None:
            found = divergence(against, model, windows, progress=progress)
        else:
            found = respelled_divergence(against, model, windows, spelling, progress=progress)
        theirs, nats = found.reference_nats, found.nats
        distance = Distance(**{field.name: getattr(found, field.name) for field in fields(Distance)})
        # Its own tokenizer may cut the text otherwise than token by token.
        recut = [
            number
            for number, (window, text) in enumerate(zip(ids, own, strict=True))
            if spelling is not None and not text.ids.equal(spelling.spell(window.tolist()).ids)
        ]
        again = dict(zip(recut, text_losses(model, [own[number] for number in recut]), strict=True))
        nats = tuple(again.get(number, loss) for number, loss in enumerate(nats))
    return TextLoss(
        kind,
        windows.source,
        ids.shape[1],
        windows.sha256,
        n_bytes=predicted_bytes(ids, reader),
        n_tokens=tuple(len(text.ids) - text.n_context for text in own),
        nats=nats,
        against_n_tokens=(ids.shape[1] - 1,) * len(ids) if against else (),
        against_nats=theirs,
        distance=distance,
    )


def reasons_of(answers: Sequence[str], prompts: Sequence[str], tokenizer: Any) -> tuple[str | None, ...]:
    """Why each answer is degenerate; None for a good one."""
    pairs = zip(answers, prompts, strict=True)
    return tuple(degenerate(text, prompt, system_text(tokenizer, prompt)) for text, prompt in pairs)


def measure_file(
    path: Path,
    dense: LanguageModel,
    tokenizer: Any,
    texts: Sequence[tuple[str, TokenWindows]],
    *,
    threads: int | None,
    progress: Progress,
) -> tuple[TextLoss, ...]:
    """What a file loses in its own runtime on texts: (`text` or `chats`, windows of the dense model's ids)."""
    same = tokenizer.get_vocab() == dense.tokenizer.get_vocab()
    spelling = None if same else respelling(dense.tokenizer, tokenizer)
    rows = [window for _, text in texts for window in text.ids]
    longest = max(len(spelling.spell(window.tolist()).ids if spelling else window) for window in rows)
    opening = OpenSettings(longest, threads=threads)
    with open_language_model(str(path), runtime_for(str(path)), opening, progress=progress) as model:
        return tuple(
            measure_text(kind, model, dense, text, spelling, progress=progress) for kind, text in texts
        )
