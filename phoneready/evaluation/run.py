"""Judge a model, by itself or against another one: texts, tasks, answers, own metrics; and files side by side."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from cfsp.errors import InputError
from cfsp.evaluation.divergence import divergence, respelled_divergence
from cfsp.evaluation.language_model import LanguageModel, answer, vocabulary_difference
from cfsp.evaluation.perplexity import (
    bits_per_byte,
    losses_on_shared_text,
    perplexity,
    predicted_bytes,
    respelled,
    text_loss,
    tokens_per_byte,
)
from cfsp.evaluation.tasks import check_chat_tasks, load_tasks, run_tasks
from cfsp.evaluation.torch_model import TorchLanguageModel
from cfsp.models.builtin import BUILTIN_MODELS
from cfsp.progress import Progress, no_progress
from cfsp.reading import read_json_lines, read_text
from cfsp.settings import check_settings
from cfsp.text.choosing import Sampling
from cfsp.text.degeneration import degenerate, system_text
from cfsp.text.respelling import Respelling, respelling
from cfsp.text.self_sampling import TRANSFORMERS, Writer, sample_windows
from cfsp.text.settings import SELF
from cfsp.text.tokens import TokenWindows, started, token_windows, tokens_sha256
from phoneready.evaluation.evaluation_record import (
    Degeneration,
    Evaluation,
    SampledAnswers,
    TextResult,
    Vocabularies,
    identity_of,
    repeated_text,
)
from phoneready.evaluation.measured_file import MeasuredText
from phoneready.evaluation.metrics import find_metric, measure
from phoneready.evaluation.models import OpenSettings, open_language_model, runtime_for
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

    `writers` are what may have the reference model write, if that is a text; the first that can does.

    Raises:
        InputError: A text that cannot be read or is too short, two of one name, tasks or metrics that cannot be used,
            own metrics and a reference model with another vocabulary, or sampled answers without settings.
        MissingExtraError: Tasks without the `eval` extra.
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
    sampling = sampling_for(models, settings)
    with ExitStack() as stack:
        # Tasks are loaded first: a wrong name must not be found after an hour of measuring.
        tasks = stack.enter_context(load_tasks(settings)) if settings.tasks else None
        for one in models:
            check_chat_tasks(one, tasks.chats if tasks else ())
        windows = [
            text_windows(source, against or model, settings, progress, writers)
            for _, source in settings.sources
        ]
        texts = []
        for (kind, _), text in zip(settings.sources, windows, strict=True):
            apart = against and (not model.gives_logits or (different and spelling is None))
            if against and apart:
                # Beside a model of other tokens, or that gives no logits, only bits and tokens per byte are compared.
                theirs, ours = losses_on_shared_text(against, model, text, progress=progress)
                texts.append(
                    TextResult(
                        kind,
                        text.source,
                        text.ids.shape[1],
                        ours.n_tokens,
                        text.sha256,
                        ours.perplexity,
                        n_bytes=ours.n_bytes,
                        bits_per_byte=ours.bits_per_byte,
                        against_bits_per_byte=theirs.bits_per_byte,
                        tokens_per_byte=ours.tokens_per_byte,
                        against_tokens_per_byte=theirs.tokens_per_byte,
                    )
                )
            else:
                texts.append(_judge(kind, model, against, text, spelling, progress))
        done = [run_tasks(one, tasks, progress=progress) if tasks else () for one in models]
    measured = [row for name, metric in metrics.items() for row in measure(name, metric, model, windows)]
    said: tuple[tuple[str, ...], ...] = ()
    degeneration = sampled = None
    if settings.prompts:
        said, degeneration = _answers_of(models, settings, None, progress)
    if sampling:
        again, found = _answers_of(models, settings, sampling, progress)
        sampled = SampledAnswers(sampling, settings.seed, found, again[0], next(iter(again[1:]), ()))
    vocabularies = None
    if against and different:
        sizes = [len(one.tokenizer.get_vocab()) for one in models]
        vocabularies = Vocabularies(sizes[0], sizes[1], spelling is not None)
    return Evaluation(
        model=identity_of(model),
        against=identity_of(against) if against else None,
        seed=settings.seed,
        texts=tuple(texts),
        prompts=settings.prompts,
        answers=next(iter(said), ()),
        against_answers=next(iter(said[1:]), ()),
        degeneration=degeneration,
        sampled=sampled,
        tasks=done[0],
        against_tasks=next(iter(done[1:]), ()),
        metrics=tuple(measured),
        vocabularies=vocabularies,
    )


def check_texts(settings: EvaluationSettings) -> None:
    """Raise InputError if two texts have one name."""
    name = repeated_text(settings.text, settings.chats)
    if name is not None:
        raise InputError("two texts have this name; rename one of the files", field="text", value=name)


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts from a file: .txt one a line; .jsonl with `prompt`, or `turns` of which the first counts.

    Raises:
        InputError: Not there, not such a file, or without prompts.
    """
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
    """The windows of one text, or sampled from the reference model; token ids are the reference's.

    Raises:
        InputError: A text that cannot be read or is too short, or a model that cannot be sampled from.
    """
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


def sampling_for(models: Sequence[LanguageModel], settings: EvaluationSettings) -> Sampling | None:
    """How answers are sampled: as asked for, else as the reference model recommends, else the model; or None.

    Raises:
        InputError: Neither says how, or settings out of range.
    """
    if not (settings.sampled and settings.prompts):
        return None
    recommended: Mapping[str, Any] = {}
    for model in reversed(models):
        # What a model comes with, or what the card says of the built-in one that it is, or was made from.
        hashes = {model.sha256, model.source_sha256}
        cards = (row.sampling for row in BUILTIN_MODELS.values() if row.sha256 in hashes)
        recommended = recommended or model.stated_sampling or next(cards, {})
    chosen = dict(recommended)
    if settings.temperature is not None:
        chosen["temperature"] = settings.temperature
    if not chosen:
        names = " and ".join(model.name for model in models)
        raise InputError(
            f"no settings to sample at come with {names}", allowed="--temperature T, or evaluate.temperature"
        )
    sampling = Sampling(**chosen)
    check_settings(sampling)
    return sampling


def _judge(
    kind: str,
    model: LanguageModel,
    against: LanguageModel | None,
    windows: TokenWindows,
    spelling: Respelling | None,
    progress: Progress,
) -> TextResult:
    """By itself, or against a model of the same tokens, or of more if there is a spelling."""
    if spelling is not None:
        windows = spelling.shortened(windows)
    text = (kind, windows.source, windows.ids.shape[1])
    n_bytes = predicted_bytes(windows.ids, (against or model).tokenizer)

    def bits(each: float, n_tokens: int) -> float:
        return bits_per_byte(math.log(each) * n_tokens, n_bytes)

    if against is None:
        alone = perplexity(model, windows, progress=progress)
        return TextResult(
            *text,
            alone.n_scored,
            windows.sha256,
            alone.perplexity,
            n_bytes=n_bytes,
            bits_per_byte=bits(alone.perplexity, alone.n_scored),
            tokens_per_byte=tokens_per_byte(alone.n_scored, n_bytes),
        )
    if spelling is not None:
        both = respelled_divergence(against, model, windows, spelling, progress=progress)
    else:
        both = divergence(against, model, windows, progress=progress)
    n_own = spelling.n_predicted(windows.ids) if spelling else both.n_tokens
    return TextResult(
        *text,
        both.n_tokens,
        windows.sha256,
        both.perplexity,
        both,
        n_bytes=n_bytes,
        bits_per_byte=bits(both.perplexity, both.n_tokens),
        against_bits_per_byte=bits(both.reference_perplexity, both.n_tokens),
        tokens_per_byte=tokens_per_byte(n_own, n_bytes),
        against_tokens_per_byte=tokens_per_byte(both.n_tokens, n_bytes),
    )


def _answers_of(
    models: Sequence[LanguageModel],
    settings: EvaluationSettings,
    sampling: Sampling | None,
    progress: Progress,
) -> tuple[tuple[tuple[str, ...], ...], Degeneration]:
    """What each model answers to the prompts, sampled by the same numbers, or greedily without settings; and how many
    of the first one's answers, and of the reference model's after it, are degenerate."""
    said, reasons = [], []
    for model in models:
        texts = answer(
            model,
            settings.prompts,
            max_new_tokens=settings.max_new_tokens,
            sampling=sampling,
            seed=settings.seed,
            progress=progress,
        )
        pairs = zip(texts, settings.prompts, strict=True)
        said.append(tuple(texts))
        reasons.append(
            tuple(degenerate(text, prompt, system_text(model.tokenizer, prompt)) for text, prompt in pairs)
        )
    shares = [sum(why is not None for why in each) / len(each) for each in reasons]
    by_reason = [
        {why: count / len(each) for why, count in sorted(Counter(filter(None, each)).items())}
        for each in reasons
    ]
    text = json.dumps(settings.prompts, ensure_ascii=False)
    found = Degeneration(
        prompts_sha256=hashlib.sha256(text.encode()).hexdigest(),
        n_prompts=len(settings.prompts),
        max_new_tokens=settings.max_new_tokens,
        share=shares[0],
        by_reason=by_reason[0],
        reasons=reasons[0],
    )
    if len(models) > 1:
        found = replace(
            found,
            against_share=shares[1],
            against_by_reason=by_reason[1],
            against_reasons=reasons[1],
            difference_points=100 * (shares[0] - shares[1]),
        )
    return tuple(said), found


@dataclass(frozen=True)
class JudgedText:
    """A text, `text` or `chats`, in windows of the dense model's ids, (n_windows, seqlen)."""

    kind: str
    windows: TokenWindows


def shortened(text: JudgedText, tokenizer: Any, other: Any) -> JudgedText:
    """The text, as cut for a tokenizer, in windows that `other`, too, spells in no more tokens than they had."""
    return replace(text, windows=respelling(tokenizer, other).shortened(text.windows))


def measure_file(
    path: Path,
    dense: LanguageModel,
    tokenizer: Any,
    texts: Sequence[JudgedText],
    *,
    threads: int | None,
    progress: Progress,
) -> tuple[MeasuredText, ...]:
    """What a file loses, in its own runtime.

    Raises:
        InputError: A text in the file's own tokens is longer than its context.
        LimitError: It gives logits that are not finite.
    """
    windows = [window for text in texts for window in text.windows.ids]
    same = tokenizer.get_vocab() == dense.tokenizer.get_vocab()
    spelling = None if same else respelling(dense.tokenizer, tokenizer)
    lengths = (len(spelling.spell(window.tolist()).ids if spelling else window) for window in windows)
    opening = OpenSettings(max(lengths), threads=threads)
    with open_language_model(str(path), runtime_for(str(path)), opening, progress=progress) as model:
        return tuple(_measured(text, model, dense, spelling, progress) for text in texts)


def _measured(
    text: JudgedText,
    model: LanguageModel,
    dense: LanguageModel,
    spelling: Respelling | None,
    progress: Progress,
) -> MeasuredText:
    ids = text.windows.ids
    n_tokens, nats, found = 0, [], []
    for number, window in enumerate(ids, 1):
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
        progress("measuring", number, len(ids))
    return MeasuredText(
        text.kind,
        text.windows.source,
        ids.shape[1],
        text.windows.sha256,
        n_tokens,
        n_bytes=tuple(max(1, predicted_bytes(window[None], dense.tokenizer)) for window in ids),
        nats=tuple(nats),
        dense_nats=tuple(math.log(one.reference_perplexity) * one.n_tokens for one in found),
        kl_mean=fmean(one.kl_mean for one in found),
        same_top1=fmean(one.same_top1 for one in found),
    )
