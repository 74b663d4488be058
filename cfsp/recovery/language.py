"""Is training data in a language that a trimmed vocabulary still has?"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from cfsp.errors import InputError
from cfsp.models.builtin import BUILTIN_MODELS
from cfsp.models.reference import load_tokenizer
from cfsp.recovery.data import RecoveryData, Sequences
from cfsp.recovery.inputs import RecoveryInputs
from cfsp.recovery.settings import STUDENT
from cfsp.text.encoding import decode, encode

_log = logging.getLogger(__name__)

MOST_GROWTH = 1.3
"""Times as many tokens as before trimming, over what they are times for the text that was counted.

For SmolLM2-135M-Instruct, trimmed to 32,768 and 21,184 tokens for English chats and articles (1.00), other chats and
articles take 1.01 to 1.07, French, German, Spanish and Finnish 1.03 to 1.17, Python and C++ 1.10 to 1.26, Chinese,
Japanese and Greek 1.19 to 1.43, and Russian and Hindi 1.52 to 1.94.
"""
_MOST_SEQUENCES = 64


def check_vocabulary(drawn: RecoveryData, inputs: RecoveryInputs) -> RecoveryData:
    """Say of all data how much longer it is for a trimmed vocabulary, where the dense model's tokenizer is at hand.

    What a student writes is left out: it spells with what it has.

    Raises:
        InputError: Some of it is longer by more than MOST_GROWTH.
    """
    dense = _dense_tokenizer(inputs)
    if dense is None:
        return drawn
    planned = inputs.plan.vocabulary.growth if inputs.plan and inputs.plan.vocabulary else None

    def judged(sequences: Sequences, field: str) -> Sequences:
        if sequences.source == STUDENT:
            return sequences
        found = growth(sequences, inputs.loaded.tokenizer, dense)
        if planned is not None and found > MOST_GROWTH * planned:
            raise InputError(
                f"it takes {found:.2f} times the dense model's tokens in the checkpoint's vocabulary, as another "
                f"language or script does; the text that this was trimmed for took {planned:.2f} times",
                field=field,
                value=sequences.source,
                allowed="data like that text, or a vocabulary that is trimmed for this data",
            )
        return replace(sequences, growth=found)

    training, validation = (
        tuple(judged(part, field) for part in parts)
        for field, parts in (("data", drawn.training), ("validation", drawn.validation))
    )
    return replace(drawn, training=training, validation=validation)


def growth(sequences: Sequences, tokenizer: Any, dense: Any) -> float:
    """Tokens of what is learnt from, to those that a dense model reads it in.

    Args:
        sequences: Of many, some are read, spread over them.
        tokenizer: That of the sequences' tokens.
        dense: The dense model's.
    """
    rows = slice(None, None, -(-len(sequences.input_ids) // _MOST_SEQUENCES))
    learnt = sequences.input_ids[rows][sequences.learnt[rows]]
    return len(learnt) / max(1, len(encode(dense, decode(tokenizer, learnt))))


def _dense_tokenizer(inputs: RecoveryInputs) -> Any | None:
    """None where nothing was taken from the vocabulary, or what it was is not on this machine."""
    if inputs.respelling is not None and inputs.teacher is not None:
        return inputs.teacher.tokenizer
    reference = inputs.loaded.source.again
    is_here = reference in BUILTIN_MODELS or Path(reference).exists()
    if inputs.plan is None or inputs.plan.vocabulary is None or not is_here:
        return None
    try:
        dense = load_tokenizer(reference)
    except InputError as error:
        _log.info("how much longer data is in the trimmed vocabulary is not known: %s", error)
        return None
    return dense if inputs.loaded.tokenizer.get_vocab().keys() <= dense.get_vocab().keys() else None
