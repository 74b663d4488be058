"""The token windows that pruning statistics are taken from, as many from each source."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cfsp.errors import InputError
from cfsp.models.source import LoadedModel
from cfsp.progress import Progress, no_progress
from cfsp.text.self_sampling import TRANSFORMERS, Writer, sample_windows
from cfsp.text.settings import SELF
from cfsp.text.tokens import join_documents, load_documents, shuffled, started, tokens_sha256


@dataclass(frozen=True)
class Calibration:
    """Calibration windows (nsamples, seqlen) int64, their references, seed, and the hash of the token ids."""

    input_ids: torch.Tensor
    sources: tuple[str, ...]
    seed: int
    sha256: str


def load_calibration(
    references: Sequence[str],
    loaded: LoadedModel,
    *,
    nsamples: int = 128,
    seqlen: int = 1024,
    seed: int = 0,
    writers: Sequence[Writer] = (TRANSFORMERS,),
    progress: Progress = no_progress,
) -> Calibration:
    """Draw `nsamples` windows of `seqlen` tokens, the same share from each reference.

    Args:
        references: `self`, or text references as in `cfsp.text.tokens`.
        writers: What may have the model write, for `self`; the first that can does.

    Raises:
        InputError: No reference, sizes below one, too little text, or a window longer than the model's context.
    """
    if not references:
        raise InputError("no calibration text given", allowed="self, or one or more text references")
    if nsamples < len(references):
        raise InputError(
            "too few", field="nsamples", value=nsamples, allowed=f"at least one a source ({len(references)})"
        )
    check_seqlen(loaded, seqlen)
    parts = []
    for index, reference in enumerate(references):
        share = nsamples // len(references) + (index < nsamples % len(references))
        if reference == SELF:
            windows = sample_windows(
                loaded, nsamples=share, seqlen=seqlen, seed=seed, writers=writers, progress=progress
            )
        else:
            # Random windows of a single text; of many documents, shuffled and packed one after another.
            documents, needed = load_documents(reference), share * seqlen
            single = len(documents) == 1
            order, limit = (documents, None) if single else (shuffled(documents, seed), needed)
            stream = join_documents(order, loaded.tokenizer, limit=limit)
            if len(stream) < needed:
                raise InputError(
                    f"calibration text {reference} has {len(stream)} tokens, too few for {share} windows of {seqlen}",
                    allowed=f"more text, or at most {len(stream) // seqlen} windows from it",
                )
            if single:
                generator = random.Random(seed)
                starts = [generator.randint(0, len(stream) - seqlen) for _ in range(share)]
                windows = torch.stack([stream[start : start + seqlen].long() for start in starts])
            else:
                windows = stream.view(share, seqlen).long()
        parts.append(started(windows, loaded.tokenizer))
    ids = torch.cat(parts)
    return Calibration(ids, tuple(references), seed, tokens_sha256(ids))


def check_seqlen(loaded: LoadedModel, seqlen: int) -> None:
    """Raise InputError for windows of under two tokens, or longer than the model's context."""
    longest = getattr(loaded.model.config, "max_position_embeddings", None) or seqlen
    if not 2 <= seqlen <= longest:
        raise InputError("out of range", field="seqlen", value=seqlen, allowed=f"2 to {longest}")
