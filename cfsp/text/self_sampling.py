"""Calibration text without data: sampled from the dense model itself.

A chat model writes chats in its own format, the user's turn included: it is given its template up to where the
user speaks and continues (Magpie, arXiv 2406.08464). A base model continues its start token.
Sampling is batched, deterministic for a seed on one machine, and cached. What built-in models wrote comes with the
package.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from cfsp.errors import InputError, PhonereadyError
from cfsp.files import atomic_file
from cfsp.models.builtin import cache_directory
from cfsp.models.paging import computing_dtype, let_go
from cfsp.models.source import LoadedModel
from cfsp.models.weights import sha256_tensors
from cfsp.progress import Progress, no_progress
from cfsp.text.encoding import encode
from cfsp.text.generation import stop_ids
from cfsp.text.templates import render_prompt
from cfsp.text.writers import TRANSFORMERS, Continue, Report, Writer
from cfsp.text.written import digest, read_written

logger = logging.getLogger(__name__)

BATCH_SIZE = 64
MAX_USER_TOKENS = 96
MAX_REPLY_TOKENS = 256
_SENTINEL = "\N{SNOWMAN}user-turn\N{SNOWMAN}"
_FORMAT = 1


def sample_windows(
    loaded: LoadedModel,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    use_written: bool = True,
    writers: Sequence[Writer] = (TRANSFORMERS,),
    progress: Progress = no_progress,
) -> torch.Tensor:
    """Windows (nsamples, seqlen) of text that the model wrote; read from the package or the cache where they are there.

    Args:
        loaded: The model that writes.
        nsamples: Windows.
        seqlen: Tokens in each.
        seed: Of sampling.
        use_written: Whether a text that comes with the package will do.
        writers: What may continue texts for it; the first that can does, or has done.
        progress: Told how much is written.

    Raises:
        InputError: The model writes nothing (every sample ends at once), or no writer can have it write.
    """
    origin = text_origin(loaded, seed)
    written = read_written(origin, nsamples * seqlen) if use_written else None
    if written is not None:
        return written.view(nsamples, seqlen)
    for place, writer in enumerate(writers, 1):
        try:
            key = {**origin, **writer.origin(loaded), "windows": [nsamples, seqlen]}
            return _windows_of(writer, loaded, key, progress)
        except PhonereadyError as error:
            if place == len(writers):
                raise
            logger.info("another way to sample is taken: %s", error)
    raise InputError("nothing is there that could write", field="writers")


def _windows_of(
    writer: Writer, loaded: LoadedModel, key: Mapping[str, Any], progress: Progress
) -> torch.Tensor:
    """The windows that a key stands for, from the cache, or written and kept there."""
    (nsamples, seqlen), path = key["windows"], _cache_path(key)
    cached = _read_cached(path, nsamples, seqlen)
    if cached is not None:
        return cached
    with writer.opened(loaded, key["seed"]) as continued:
        stream = _write(loaded, continued, nsamples * seqlen, progress)
    windows = torch.tensor(stream).view(nsamples, seqlen)
    try:
        with atomic_file(path) as temporary:
            safetensors.torch.save_file({"input_ids": windows}, temporary)
    except InputError as error:  # minutes of sampling are not lost for a cache
        logger.warning("the sampled text is not kept for the next run: %s", error)
    return windows


def _write(loaded: LoadedModel, continued: Continue, needed: int, progress: Progress) -> list[int]:
    """So many tokens of texts, one after the other."""
    stream: list[int] = []

    def report(before: int, written: int) -> None:
        progress("sampling calibration text", min(before + written, needed), needed)

    while len(stream) < needed:
        samples = _sample_batch(loaded, continued, partial(report, len(stream)))
        if not any(samples):
            raise InputError("the model writes nothing when sampled; calibrate on text instead of `self`")
        for ids in samples:
            stream += ids
    report(needed, 0)
    return stream[:needed]


def chat_frame(tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """Token ids of a chat's frame: (before the user's turn, between user's and assistant's turn).

    None for a tokenizer without a chat template, or whose template cannot be split around the user's turn.
    """
    if not tokenizer.chat_template:
        return None
    try:
        text = render_prompt(tokenizer, _SENTINEL)
    except InputError as error:
        logger.warning("chat template cannot be rendered (%s); sampling as from a base model", error)
        return None
    before, separator, between = text.partition(_SENTINEL)
    if not separator or not before:
        return None
    return encode(tokenizer, before), encode(tokenizer, between)


def plain_start(tokenizer: Any) -> list[int]:
    """Token ids with which a model begins a text that is no chat: its start token."""
    starts = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return [next((token for token in starts if token is not None), 0)]


def model_fingerprint(model: torch.nn.Module) -> str:
    """Hex SHA-256 over names, shapes and bytes of all parameters."""
    dtype = computing_dtype(model)
    found = sha256_tensors((name, p.detach().to(dtype).cpu()) for name, p in model.named_parameters())
    let_go(model)
    return found


def _sample_batch(loaded: LoadedModel, continued: Continue, report: Report) -> list[list[int]]:
    frame = chat_frame(loaded.tokenizer)
    if frame is None:
        prompts = [plain_start(loaded.tokenizer)] * BATCH_SIZE
        return continued(prompts, MAX_USER_TOKENS + MAX_REPLY_TOKENS, report)
    before, between = frame
    asked = continued([before] * BATCH_SIZE, MAX_USER_TOKENS, lambda written: None)
    stops = stop_ids(loaded)
    prompts = [
        (ids[:-1] if ids[-1] in stops else ids) + between for ids in asked if len(ids) > len(before) + 1
    ]
    return continued(prompts, MAX_REPLY_TOKENS, report) if prompts else []


def text_origin(loaded: LoadedModel, seed: int) -> dict[str, Any]:
    """What decides which text a model writes, but for the processor's arithmetic."""
    return {
        "format": _FORMAT,
        "model": model_fingerprint(loaded.model),
        "frame": chat_frame(loaded.tokenizer),
        "sizes": [BATCH_SIZE, MAX_USER_TOKENS, MAX_REPLY_TOKENS],
        "seed": seed,
    }


def _cache_path(key: Mapping[str, Any]) -> Path:
    return cache_directory() / "self" / f"{digest(key)}.safetensors"


def _read_cached(path: Path, nsamples: int, seqlen: int) -> torch.Tensor | None:
    if not path.is_file():
        return None
    try:
        windows = safetensors.torch.load_file(path)["input_ids"]
    except (safetensors.SafetensorError, KeyError, OSError) as error:
        logger.warning("ignoring unreadable cache file %s: %s", path, error)
        return None
    return windows if tuple(windows.shape) == (nsamples, seqlen) else None
