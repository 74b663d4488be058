"""Judge a model, alone or against another one: perplexity, divergence, agreement, and what both say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cfsp.calibration import SELF
from cfsp.evaluation import PROMPTS, Divergence, Perplexity, divergence, perplexity, sample_answers
from cfsp.model_source import LoadedModel
from cfsp.progress import Progress, no_progress
from cfsp.self_sampling import sample_windows
from cfsp.text import TokenWindows, token_windows, tokens_sha256
from phoneready.console import format_rows

__all__ = [
    "Evaluation",
    "EvaluationSettings",
    "TextResult",
    "evaluate",
    "format_answers",
    "format_evaluation",
]


@dataclass(frozen=True)
class EvaluationSettings:
    """What to judge on.

    Attributes:
        text: Text references as in cfsp.text.
        chats: References to chats; `self` samples them from the reference model.
        seqlen: Tokens in a window.
        max_windows: Most windows of each reference.
        prompts: Questions to answer; empty for none.
        max_new_tokens: Longest answer.
        seed: Of `self`; the calibration should have another one.
    """

    text: tuple[str, ...]
    chats: tuple[str, ...] = ()
    seqlen: int = 1024
    max_windows: int = 16
    prompts: tuple[str, ...] = PROMPTS
    max_new_tokens: int = 64
    seed: int = 1


@dataclass(frozen=True)
class TextResult:
    """Figures on one text.

    Attributes:
        kind: `text` or `chats`.
        source: The reference.
        seqlen: Tokens in a window.
        n_tokens: Predicted tokens.
        windows_sha256: Hash of the token ids.
        perplexity: Of the model.
        divergence: From the reference model, where there is one.
    """

    kind: str
    source: str
    seqlen: int
    n_tokens: int
    windows_sha256: str
    perplexity: float
    divergence: Divergence | None = None


@dataclass(frozen=True)
class Evaluation:
    """A model judged.

    Attributes:
        model: What was judged.
        against: The reference model, where there is one.
        seed: Seed of sampled chats.
        texts: One entry a text.
        prompts: Questions.
        answers: The model's.
        against_answers: The reference model's.
    """

    KIND: ClassVar[str] = "evaluation"
    SCHEMA_VERSION: ClassVar[int] = 1

    model: str
    against: str | None
    seed: int
    texts: tuple[TextResult, ...]
    prompts: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    against_answers: tuple[str, ...] = ()


def evaluate(
    loaded: LoadedModel,
    against: LoadedModel | None,
    settings: EvaluationSettings,
    *,
    progress: Progress = no_progress,
) -> Evaluation:
    """Judge `loaded`, against a reference model where one is given; token ids come from the reference's tokenizer.

    Raises:
        InputError: A text that cannot be read or is too short.
    """
    reference = against or loaded
    results = []
    for kind, sources in (("text", settings.text), ("chats", settings.chats)):
        for source in sources:
            windows = _windows(source, reference, settings, progress)
            results.append(_judge(kind, loaded, against, windows, progress))
    answers = [_answers(model, settings, progress) for model in (loaded, against)]
    return Evaluation(
        model=loaded.source.reference,
        against=against.source.reference if against else None,
        seed=settings.seed,
        texts=tuple(results),
        prompts=settings.prompts,
        answers=answers[0],
        against_answers=answers[1],
    )


def format_evaluation(evaluation: Evaluation) -> str:
    """The figures as a table."""
    header = ["text", "tokens", "perplexity"]
    if evaluation.against:
        header += ["reference's", "ratio", "KL mean", "KL median", "KL p99.9", "same top-1"]
    rows = []
    for text in evaluation.texts:
        row = [f"{text.source} ({text.kind})", f"{text.n_tokens}", f"{text.perplexity:.3f}"]
        if text.divergence:
            d = text.divergence
            row += [f"{d.reference_perplexity:.3f}", f"{d.perplexity_ratio:.3f}", f"{d.kl_mean:.4f}"]
            row += [f"{d.kl_median:.4f}", f"{d.kl_p99_9:.3f}", f"{d.same_top1:.2%}"]
        rows.append(row)
    return format_rows(header, rows) if rows else ""


def format_answers(evaluation: Evaluation, names: Sequence[str]) -> str:
    """The answers below each other, question by question; `names` are of the reference model and the model."""
    lines = []
    columns = [evaluation.against_answers, evaluation.answers]
    for index, prompt in enumerate(evaluation.prompts):
        lines.append(f"Q: {prompt}")
        lines += [f"{n}: {' '.join(c[index].split())}" for n, c in zip(names, columns, strict=True) if c]
        lines.append("")
    return "\n".join(lines)


def _windows(
    source: str, reference: LoadedModel, settings: EvaluationSettings, progress: Progress
) -> TokenWindows:
    if source != SELF:
        return token_windows(
            source, reference.tokenizer, seqlen=settings.seqlen, max_windows=settings.max_windows
        )
    ids = sample_windows(
        reference,
        nsamples=settings.max_windows,
        seqlen=settings.seqlen,
        seed=settings.seed,
        progress=progress,
    )
    return TokenWindows(ids, SELF, tokens_sha256(ids))


def _judge(
    kind: str, loaded: LoadedModel, against: LoadedModel | None, windows: TokenWindows, progress: Progress
) -> TextResult:
    figures: Perplexity | Divergence
    if against is None:
        figures = perplexity(loaded.model, windows, progress=progress)
        scored, found = figures.n_scored, None
    else:
        figures = found = divergence(against.model, loaded.model, windows, progress=progress)
        scored = figures.n_tokens
    seqlen = windows.ids.shape[1]
    return TextResult(kind, windows.source, seqlen, scored, windows.sha256, figures.perplexity, found)


def _answers(loaded: LoadedModel | None, settings: EvaluationSettings, progress: Progress) -> tuple[str, ...]:
    if loaded is None or not settings.prompts:
        return ()
    return tuple(
        sample_answers(
            loaded.model,
            loaded.tokenizer,
            settings.prompts,
            max_new_tokens=settings.max_new_tokens,
            progress=progress,
        )
    )
