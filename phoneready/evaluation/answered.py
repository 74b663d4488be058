"""What models answer, greedily and sampled, and how much of it is degenerate."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cfsp.errors import InputError
from cfsp.evaluation.answers import answer
from cfsp.evaluation.degeneration import degenerate, system_text
from cfsp.evaluation.language_model import LanguageModel
from cfsp.models.builtin import BUILTIN_MODELS
from cfsp.progress import Progress
from cfsp.settings import check_settings
from cfsp.text.choosing import Sampling
from phoneready.evaluation.evaluation_record import Degeneration, SampledAnswers
from phoneready.evaluation.settings import EvaluationSettings


@dataclass(frozen=True)
class Said:
    """What one model answered.

    Attributes:
        texts: One a prompt.
        reasons: Why each is degenerate; None of a good one.
    """

    texts: tuple[str, ...]
    reasons: tuple[str | None, ...]

    @property
    def by_reason(self) -> dict[str, float]:
        """Reason -> share of the answers."""
        counts = Counter(reason for reason in self.reasons if reason)
        return {reason: count / len(self.reasons) for reason, count in sorted(counts.items())}

    @property
    def share(self) -> float:
        """Share of degenerate answers."""
        return sum(reason is not None for reason in self.reasons) / len(self.reasons)


def answers_of(
    models: Sequence[LanguageModel],
    settings: EvaluationSettings,
    progress: Progress,
    *,
    sampling: Sampling | None = None,
) -> list[Said]:
    """What each model answers to the prompts; sampled by the same numbers, or greedily without settings."""
    said = []
    for model in models if settings.prompts else ():
        texts = answer(
            model,
            settings.prompts,
            max_new_tokens=settings.max_new_tokens,
            sampling=sampling,
            seed=settings.seed,
            progress=progress,
        )
        pairs = zip(texts, settings.prompts, strict=True)
        reasons = (degenerate(text, prompt, system_text(model.tokenizer, prompt)) for text, prompt in pairs)
        said.append(Said(tuple(texts), tuple(reasons)))
    return said


def degeneration(settings: EvaluationSettings, said: Sequence[Said]) -> Degeneration:
    """How many answers of the model, and of the reference model after it, are degenerate."""
    text = json.dumps(settings.prompts, ensure_ascii=False)
    own = Degeneration(
        prompts_sha256=hashlib.sha256(text.encode()).hexdigest(),
        n_prompts=len(settings.prompts),
        max_new_tokens=settings.max_new_tokens,
        share=said[0].share,
        by_reason=said[0].by_reason,
        reasons=said[0].reasons,
    )
    for dense in said[1:]:
        own = replace(
            own,
            against_share=dense.share,
            against_by_reason=dense.by_reason,
            against_reasons=dense.reasons,
            difference_points=100 * (own.share - dense.share),
        )
    return own


def sampled_answers(
    models: Sequence[LanguageModel],
    settings: EvaluationSettings,
    sampling: Sampling | None,
    progress: Progress,
) -> SampledAnswers | None:
    """What models answer by settings, sampled, and how much of it is degenerate; None without settings."""
    if sampling is None:
        return None
    said = answers_of(models, settings, progress, sampling=sampling)
    others = next((one.texts for one in said[1:]), ())
    return SampledAnswers(sampling, settings.seed, degeneration(settings, said), said[0].texts, others)


def sampling_for(models: Sequence[LanguageModel], settings: EvaluationSettings) -> Sampling | None:
    """How answers are sampled: as asked for, else as the reference model recommends, or the model where it does not.

    Args:
        models: The model, and the reference model where there is one.
        settings: What is asked for.

    Returns:
        None where no answers are to be sampled.

    Raises:
        InputError: Neither says how, or settings out of range.
    """
    if not (settings.sampled and settings.prompts):
        return None
    recommended = next(filter(None, map(_recommended, reversed(models))), {})
    chosen = {**recommended, **settings.asked_sampling}
    if "temperature" not in chosen and not recommended:
        names = " and ".join(model.name for model in models)
        raise InputError(
            f"no settings to sample at come with {names}", allowed="--temperature T, or evaluate.temperature"
        )
    sampling = Sampling(**chosen)
    check_settings(sampling)
    return sampling


def _recommended(model: LanguageModel) -> Mapping[str, Any]:
    """What a model comes with, or what the card says of the built-in model that it is, or was made from."""
    hashes = {model.sha256, model.source_sha256}
    cards = (row.sampling for row in BUILTIN_MODELS.values() if row.sha256 in hashes)
    return model.stated_sampling or next(cards, {})
