"""Is training data in a language that a trimmed vocabulary still has?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cfsp.errors import InputError
from cfsp.models.reference import load_tokenizer
from cfsp.recovery.data import IGNORED, RecoveryData, Sequences
from cfsp.recovery.inputs import RecoveryInputs
from cfsp.recovery.settings import STUDENT
from cfsp.text.encoding import encode

MOST_GROWTH = 1.3
"""Times as many tokens as before trimming, over what they are times for the text that was counted.

For SmolLM2-135M-Instruct, trimmed to 32,768 and 21,184 tokens for English chats and articles (1.00), other chats and
articles take 1.01 to 1.07, French, German, Spanish and Finnish 1.03 to 1.17, Python and C++ 1.10 to 1.26, Chinese,
Japanese and Greek 1.19 to 1.43, and Russian and Hindi 1.52 to 1.94.
"""
_MOST_SEQUENCES = 64


def check_vocabulary(drawn: RecoveryData, inputs: RecoveryInputs) -> RecoveryData:
    """Say of all data how much longer it is for a trimmed vocabulary, where the dense model's tokenizer can be read.

    Raises:
        InputError: Some of it is longer by more than MOST_GROWTH.
    """
    dense = _dense_tokenizer(inputs)
    if dense is None:
        return drawn
    planned = inputs.plan.vocabulary.growth if inputs.plan and inputs.plan.vocabulary else 1.0

    def judged(sequences: Sequences) -> Sequences:
        if sequences.source == STUDENT:  # which spells with what it has
            return sequences
        found = growth(sequences, inputs.loaded.tokenizer, dense)
        if found > MOST_GROWTH * planned:
            raise InputError(
                f"another language or script than the vocabulary was trimmed for: {found:.2f} times the dense model's "
                f"tokens, of the text that was counted {planned:.2f} times",
                field="data",
                value=sequences.source,
                allowed="data like that text, or a vocabulary that is trimmed for this data",
            )
        return replace(sequences, growth=found)

    training, validation = (tuple(map(judged, parts)) for parts in (drawn.training, drawn.validation))
    return replace(drawn, training=training, validation=validation)


def growth(sequences: Sequences, tokenizer: Any, dense: Any) -> float:
    """Tokens of what is learnt from, to those that a dense model reads it in.

    Args:
        sequences: Of many, some are read, spread over them.
        tokenizer: That of the sequences' tokens.
        dense: The dense model's.
    """
    count = len(sequences.input_ids)
    rows = torch.arange(0, count, max(1, count // _MOST_SEQUENCES))
    learnt = sequences.input_ids[rows][sequences.targets[rows].roll(1, dims=1) != IGNORED]
    return len(learnt) / max(1, len(encode(dense, tokenizer.decode(learnt))))


def _dense_tokenizer(inputs: RecoveryInputs) -> Any | None:
    """None where nothing was taken from the vocabulary, or what it was is not at hand."""
    if inputs.respelling is not None and inputs.teacher is not None:
        return inputs.teacher.tokenizer
    if inputs.plan is None or inputs.plan.vocabulary is None:
        return None
    try:
        return load_tokenizer(inputs.loaded.source.reference)
    except InputError:
        return None
