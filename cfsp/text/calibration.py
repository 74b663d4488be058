"""The token windows that are calibrated on, as many from each source, or those that a file keeps of an earlier run."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from cfsp.errors import InputError
from cfsp.files import atomic_file
from cfsp.models.source import LoadedModel
from cfsp.progress import Progress, no_progress
from cfsp.reading import as_input_error
from cfsp.text.self_sampling import TRANSFORMERS, Writer, sample_windows
from cfsp.text.settings import SELF, reference_name
from cfsp.text.tokens import join_documents, load_documents, shuffled, started, tokens_sha256


@dataclass(frozen=True)
class Calibration:
    """Calibration windows (nsamples, seqlen) int64, names of their texts, seed, and the hash of the token ids."""

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
        references: `self`, or text references as in `cfsp.text.tokens`; or a single file of `save_windows`, which
            says what its windows were drawn from.
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
    if is_kept(references):
        kept = read_windows(Path(references[0]))
        if kept.input_ids.shape != (nsamples, seqlen):
            raise InputError(
                f"{references[0]} holds other windows", field="nsamples, seqlen", value=[nsamples, seqlen],
                allowed=str(list(kept.input_ids.shape)),
            )  # fmt: skip
        if int(kept.input_ids.max()) >= loaded.model.get_input_embeddings().weight.shape[0]:
            raise InputError(f"{references[0]} holds tokens that the model does not have")
        return kept
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
    return Calibration(ids, tuple(map(reference_name, references)), seed, tokens_sha256(ids))


def is_kept(references: Sequence[str]) -> bool:
    """Whether references are a file of `save_windows`."""
    return len(references) == 1 and Path(references[0]).suffix == ".safetensors"


def save_windows(drawn: Calibration, path: Path) -> None:
    """Write windows with what they were drawn from, atomically."""
    stated = {"sources": json.dumps(drawn.sources), "seed": str(drawn.seed)}
    with atomic_file(path) as temporary:
        safetensors.torch.save_file({"input_ids": drawn.input_ids.contiguous()}, temporary, stated)


def read_windows(path: Path) -> Calibration:
    """What `save_windows` wrote; raises InputError."""
    if not path.is_file():
        raise InputError(f"text file {path} does not exist")
    with as_input_error(f"{path} holds no windows of text"):
        with safetensors.safe_open(path, "pt") as opened:
            stated, ids = opened.metadata() or {}, opened.get_tensor("input_ids")
        if ids.dtype != torch.int64 or ids.ndim != 2 or not ids.numel() or int(ids.min()) < 0:
            raise ValueError("no token ids")
        return Calibration(ids, tuple(json.loads(stated["sources"])), int(stated["seed"]), tokens_sha256(ids))


def check_seqlen(loaded: LoadedModel, seqlen: int) -> None:
    """Raise InputError for windows of under two tokens, or longer than the model's context."""
    longest = getattr(loaded.model.config, "max_position_embeddings", None) or seqlen
    if not 2 <= seqlen <= longest:
        raise InputError("out of range", field="seqlen", value=seqlen, allowed=f"2 to {longest}")
