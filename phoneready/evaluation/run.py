"""Judge a model, by itself or against another one: texts, tasks, answers, own metrics; and files side by side."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

from cfsp.errors import InputError
from cfsp.evaluation.language_model import LanguageModel, answer, vocabulary_difference
from cfsp.evaluation.loss import (
    Scored,
    bounded_exp,
    divergence,
    losses_on_shared_text,
    predicted_bytes,
    respelled,
    respelled_divergence,
    text_loss,
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
    Degeneration,
    Evaluation,
    ModelIdentity,
    TextResult,
    Vocabularies,
    repeated_text,
)
from phoneready.evaluation.measured_file import MeasuredText
from phoneready.evaluation.models import OpenSettings, open_language_model, runtime_for
from phoneready.evaluation.own_metrics import find_metric, measure
from phoneready.evaluation.settings import EvaluationSettings


def evaluate(
    model: LanguageModel,
    against: LanguageModel | None,
    settings: EvaluationSettings,
    *,
    writers: Sequence[Writer] = (TRANSFORMERS,),
    progress: Progress = no_progress,
) -> Evaluation:
    """Judge a model, against a reference model if one is given; token ids come from the reference's tokenizer.

    The first of `writers` that can has the reference model write, if that is a text. Raises InputError for texts, tasks
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
        windows = [
            text_windows(source, against or model, settings, progress, writers)
            for _, source in settings.sources
        ]
        # Beside a model of other tokens, or that gives no logits, only bits and tokens per byte are compared.
        comparable = model.gives_logits and (not different or spelling is not None)
        texts = [
            _judge(kind, model, against, text, spelling, progress, token_by_token=comparable)
            for (kind, _), text in zip(settings.sources, windows, strict=True)
        ]
        done = [run_tasks(one, tasks, progress=progress) if tasks else () for one in models]
    measured = [row for name, metric in metrics.items() for row in measure(name, metric, model, windows)]
    answers: list[tuple[str, ...]] = [() for _ in models]
    degeneration = None
    if settings.prompts:
        answers, degeneration = _answers_of(models, settings, progress)
    vocabularies = None
    if against and different:
        sizes = [len(one.tokenizer.get_vocab()) for one in models]
        vocabularies = Vocabularies(sizes[0], sizes[1], spelling is not None)
    return Evaluation(
        model=_identity(model),
        against=_identity(against) if against else None,
        seed=settings.seed,
        texts=tuple(texts),
        prompts=settings.prompts,
        answers=answers[0],
        against_answers=answers[-1] if against else (),
        degeneration=degeneration,
        tasks=done[0],
        against_tasks=done[-1] if against else (),
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


def _judge(
    kind: str,
    model: LanguageModel,
    against: LanguageModel | None,
    windows: TokenWindows,
    spelling: Respelling | None,
    progress: Progress,
    *,
    token_by_token: bool,
) -> TextResult:
    """By itself; against a model of the same tokens, or of more if there is a spelling; or on the same text."""
    both = theirs = n_theirs = None
    if against and token_by_token:
        if spelling is not None:
            windows = spelling.shortened(windows)
            both = respelled_divergence(against, model, windows, spelling, progress=progress)
            texts = (spelling.spell(window.tolist()) for window in windows.ids)
            n_own = sum(int((text.owners != 0).sum()) for text in texts)
        else:
            both = divergence(against, model, windows, progress=progress)
            n_own = both.n_tokens
        n_tokens = n_theirs = both.n_tokens
        n_bytes = predicted_bytes(windows.ids, against.tokenizer)
        nats, theirs = (math.log(each) * n_tokens for each in (both.perplexity, both.reference_perplexity))
    elif against:
        (theirs, n_theirs), (nats, n_own), n_bytes = losses_on_shared_text(
            against, model, windows, progress=progress
        )
        n_tokens = n_own
    else:
        nats = text_loss(model, [Scored(window, 1) for window in windows.ids], progress=progress)
        n_tokens = n_own = windows.ids[:, 1:].numel()
        n_bytes = predicted_bytes(windows.ids, model.tokenizer)
    size = max(n_bytes, 1)
    return TextResult(
        kind,
        windows.source,
        windows.ids.shape[1],
        n_tokens,
        windows.sha256,
        both.perplexity if both else bounded_exp(nats / n_tokens),
        both,
        n_bytes=n_bytes,
        bits_per_byte=nats / math.log(2) / size,
        against_bits_per_byte=None if theirs is None else theirs / math.log(2) / size,
        tokens_per_byte=n_own / size,
        against_tokens_per_byte=None if n_theirs is None else n_theirs / size,
    )


def _answers_of(
    models: Sequence[LanguageModel], settings: EvaluationSettings, progress: Progress
) -> tuple[list[tuple[str, ...]], Degeneration]:
    """What each model answers to the prompts, and which answers are degenerate."""
    prompts, longest = settings.prompts, settings.max_new_tokens
    answers, reasons = [], []
    for model in models:
        texts = answer(model, prompts, max_new_tokens=longest, progress=progress)
        answers.append(tuple(texts))
        pairs = zip(texts, prompts, strict=True)
        reasons.append(
            tuple(degenerate(text, prompt, system_text(model.tokenizer, prompt)) for text, prompt in pairs)
        )
    shares = [sum(why is not None for why in each) / len(each) for each in reasons]
    digest = hashlib.sha256(json.dumps(prompts, ensure_ascii=False).encode()).hexdigest()
    beside = (shares[1], reasons[1]) if len(models) > 1 else (None, ())
    return answers, Degeneration(digest, longest, shares[0], reasons[0], *beside)


def measure_file(
    path: Path,
    dense: LanguageModel,
    tokenizer: Any,
    texts: Sequence[tuple[str, TokenWindows]],
    *,
    threads: int | None,
    progress: Progress,
) -> tuple[MeasuredText, ...]:
    """What a file loses in its own runtime on texts: (`text` or `chats`, windows of the dense model's ids)."""
    same = tokenizer.get_vocab() == dense.tokenizer.get_vocab()
    spelling = None if same else respelling(dense.tokenizer, tokenizer)
    rows = [window for _, text in texts for window in text.ids]
    longest = max(len(spelling.spell(window.tolist()).ids if spelling else window) for window in rows)
    opening, measured = OpenSettings(longest, threads=threads), []
    with open_language_model(str(path), runtime_for(str(path)), opening, progress=progress) as model:
        for kind, text in texts:
            n_tokens, nats, found = 0, [], []
            for number, window in enumerate(text.ids, 1):
                alone = TokenWindows(window[None], "", "")
                if spelling is None:
                    one = divergence(dense, model, alone)
                    n_tokens += one.n_tokens
                    loss = math.log(one.perplexity) * one.n_tokens
                else:
                    # All of the window's text, however many tokens that takes, as the file's own tokenizer cuts it.
                    one = respelled_divergence(dense, model, alone, spelling)
                    own = respelled(window, dense.tokenizer, model.tokenizer)
                    n_tokens += len(own.ids) - own.n_context
                    same_cut = own.ids.equal(spelling.spell(window.tolist()).ids)
                    loss = math.log(one.perplexity) * one.n_tokens if same_cut else text_loss(model, [own])
                nats.append(loss)
                found.append(one)
                progress("measuring", number, len(text.ids))
            measured.append(
                MeasuredText(
                    kind,
                    text.source,
                    text.ids.shape[1],
                    text.sha256,
                    n_tokens,
                    n_bytes=tuple(max(1, predicted_bytes(row[None], dense.tokenizer)) for row in text.ids),
                    nats=tuple(nats),
                    dense_nats=tuple(math.log(one.reference_perplexity) * one.n_tokens for one in found),
                    kl_mean=fmean(one.kl_mean for one in found),
                    same_top1=fmean(one.same_top1 for one in found),
                )
            )
    return tuple(measured)
