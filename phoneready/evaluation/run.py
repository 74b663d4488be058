"""Judge a model, alone or against another one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cfsp.errors import InputError
from cfsp.evaluation.bits import bits_per_byte, losses_on_shared_text, predicted_bytes, tokens_per_byte
from cfsp.evaluation.divergence import divergence, respelled_divergence
from cfsp.evaluation.language_model import LanguageModel, vocabulary_difference
from cfsp.evaluation.perplexity import perplexity
from cfsp.evaluation.tasks import check_chat_tasks, load_tasks, run_tasks
from cfsp.evaluation.torch_model import TorchLanguageModel
from cfsp.progress import Progress, no_progress
from cfsp.reading import read_json_lines, read_text
from cfsp.settings import check_settings
from cfsp.text.respelling import Respelling, respelling
from cfsp.text.self_sampling import sample_windows
from cfsp.text.settings import SELF
from cfsp.text.tokens import TokenWindows, started, token_windows, tokens_sha256
from cfsp.text.writers import TRANSFORMERS, Writer
from phoneready.evaluation.answered import answers_of, degeneration, sampled_answers, sampling_for
from phoneready.evaluation.evaluation_record import (
    Evaluation,
    TextResult,
    Vocabularies,
    identity_of,
    repeated_text,
)
from phoneready.evaluation.metrics import find_metric, measure
from phoneready.evaluation.settings import EvaluationSettings

_Judge = Callable[[str, LanguageModel, LanguageModel | None, TokenWindows, Progress], TextResult]


def evaluate(
    model: LanguageModel,
    against: LanguageModel | None,
    settings: EvaluationSettings,
    *,
    writers: Sequence[Writer] = (TRANSFORMERS,),
    progress: Progress = no_progress,
) -> Evaluation:
    """Judge a model, against a reference model where one is given; token ids come from the reference's tokenizer.

    `writers` are what may have the reference model write, where that is a text; the first that can does.

    Raises:
        InputError: A text that cannot be read or is too short, two of one name, tasks or metrics that cannot be used,
            own metrics and a reference model with another vocabulary, or sampled answers without settings.
        MissingExtraError: Tasks without the `eval` extra.
    """
    check_settings(settings)
    check_texts(settings)
    pair = _Pair.of(model, against, settings)
    metrics = {name: find_metric(name) for name in settings.metrics}
    sampling = sampling_for(pair.models, settings)
    with ExitStack() as stack:
        # Tasks are loaded first: a wrong name must not be found after an hour of measuring.
        tasks = stack.enter_context(load_tasks(settings)) if settings.tasks else None
        for one in pair.models:
            check_chat_tasks(one, tasks.chats if tasks else ())
        windows = [
            text_windows(source, against or model, settings, progress, writers)
            for _, source in settings.sources
        ]
        texts = tuple(
            pair.judged(kind, of_source, progress)
            for (kind, _), of_source in zip(settings.sources, windows, strict=True)
        )
        done = [run_tasks(one, tasks, progress=progress) if tasks else () for one in pair.models]
    measured = [row for name, metric in metrics.items() for row in measure(name, metric, model, windows)]
    said = answers_of(pair.models, settings, progress)
    return Evaluation(
        model=identity_of(model),
        against=identity_of(against) if against else None,
        seed=settings.seed,
        texts=texts,
        prompts=settings.prompts,
        answers=next((one.texts for one in said), ()),
        against_answers=next((one.texts for one in said[1:]), ()),
        degeneration=degeneration(settings, said) if said else None,
        sampled=sampled_answers(pair.models, settings, sampling, progress),
        tasks=done[0],
        against_tasks=next(iter(done[1:]), ()),
        metrics=tuple(measured),
        vocabularies=pair.vocabularies,
    )


@dataclass(frozen=True)
class _Pair:
    """What is judged, and what it is held against.

    Attributes:
        model: It.
        against: The reference; None where there is none.
        has_other_tokens: Whether the reference has another vocabulary.
        spelling: From the reference's vocabulary to the model's, where that is another one and a part of it.
    """

    model: LanguageModel
    against: LanguageModel | None
    has_other_tokens: bool
    spelling: Respelling | None

    @classmethod
    def of(cls, model: LanguageModel, against: LanguageModel | None, settings: EvaluationSettings) -> _Pair:
        """Raises InputError where own metrics are asked for beside a reference with other tokens."""
        other = against if _has_other_vocabulary(model, against, settings) else None
        return cls(model, against, other is not None, _spelling(model, other) if other else None)

    @property
    def models(self) -> list[LanguageModel]:
        """Both, or the one that there is."""
        return [self.model, *([self.against] if self.against else [])]

    @property
    def vocabularies(self) -> Vocabularies | None:
        """Of both, where they are not the same."""
        if self.against is None or not self.has_other_tokens:
            return None
        return Vocabularies(_size(self.model), _size(self.against), self.spelling is not None)

    def judged(self, kind: str, windows: TokenWindows, progress: Progress) -> TextResult:
        """What they make of a text."""
        apart = self.against is not None and not self.model.gives_logits
        apart = apart or (self.has_other_tokens and self.spelling is None)
        judge: _Judge = _judge_apart if apart else partial(_judge, spelling=self.spelling)
        return judge(kind, self.model, self.against, windows, progress)


def _has_other_vocabulary(
    model: LanguageModel, against: LanguageModel | None, settings: EvaluationSettings
) -> bool:
    different = vocabulary_difference(model, against) if against else None
    if different and settings.metrics:
        raise InputError(f"{different}; own metrics read the ids of one: leave out the metrics, or --against")
    return different is not None


def _spelling(model: LanguageModel, other: LanguageModel) -> Respelling | None:
    """From the vocabulary of a reference to the model's; None where the model's is no part of it."""
    try:
        return respelling(other.tokenizer, model.tokenizer)
    except InputError:
        return None


def _size(model: LanguageModel) -> int:
    return len(model.tokenizer.get_vocab())


def check_texts(settings: EvaluationSettings) -> None:
    """Raise InputError where two texts have one name."""
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
        prompts = [_prompt(row, where) for where, row in read_json_lines(path)]
    if not prompts:
        raise InputError(f"{path} has no prompts")
    return tuple(prompts)


def _prompt(row: Mapping[str, Any], where: str) -> str:
    turns = row.get("turns")
    prompt = row.get("prompt") or (turns[0] if isinstance(turns, list) and turns else None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{where}: no prompt", allowed="a text in `prompt`, or `turns` with one")
    return prompt


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


def _judge(
    kind: str,
    model: LanguageModel,
    against: LanguageModel | None,
    windows: TokenWindows,
    progress: Progress,
    *,
    spelling: Respelling | None,
) -> TextResult:
    """Alone, or against a model of the same tokens, or of more where there is a spelling."""
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


def _judge_apart(
    kind: str,
    model: LanguageModel,
    against: LanguageModel | None,
    windows: TokenWindows,
    progress: Progress,
) -> TextResult:
    """Beside a model of other tokens, or that gives no logits: only bits and tokens per byte can be compared."""
    assert against is not None
    theirs, ours = losses_on_shared_text(against, model, windows, progress=progress)
    return TextResult(
        kind,
        windows.source,
        windows.ids.shape[1],
        ours.n_tokens,
        windows.sha256,
        ours.perplexity,
        n_bytes=ours.n_bytes,
        bits_per_byte=ours.bits_per_byte,
        against_bits_per_byte=theirs.bits_per_byte,
        tokens_per_byte=ours.tokens_per_byte,
        against_tokens_per_byte=theirs.tokens_per_byte,
    )
