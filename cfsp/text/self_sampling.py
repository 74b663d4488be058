"""Calibration text without data: sampled from the dense model itself.

A chat model writes chats in its own format, the user's turn included: it is given its template up to where the
user speaks and continues (Magpie, arXiv 2406.08464). A base model continues its start token.
Sampling is batched, deterministic for a seed on one machine, and cached. What built-in models wrote comes with the
package.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from cfsp.errors import InputError
from cfsp.files import atomic_file
from cfsp.memory import require_memory
from cfsp.models.builtin import cache_directory
from cfsp.models.paging import computing_dtype, is_paged, let_go
from cfsp.models.source import LoadedModel
from cfsp.precision import fast_dtype
from cfsp.progress import Progress, no_progress
from cfsp.text.encoding import encode
from cfsp.text.generation import generate, stop_ids
from cfsp.text.templates import render_prompt
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
    progress: Progress = no_progress,
) -> torch.Tensor:
    """Windows (nsamples, seqlen) of text that the model wrote; read from the package or the cache where they are there.

    Args:
        loaded: The model that writes.
        nsamples: Windows.
        seqlen: Tokens in each.
        seed: Of sampling.
        use_written: Whether a text that comes with the package will do.
        progress: Told how much is written.

    Raises:
        InputError: The model writes nothing (every sample ends at once).
    """
    needed, origin = nsamples * seqlen, text_origin(loaded, seed)
    written = read_written(origin, needed) if use_written else None
    if written is not None:
        return written.view(nsamples, seqlen)
    dtype = _sampling_dtype(loaded)
    path = _cache_path(origin, nsamples, seqlen, loaded.model.device.type, dtype)
    usual = _cache_path(
        origin, nsamples, seqlen, loaded.model.device.type, fast_dtype(loaded.model.device.type)
    )
    for place in (usual, path):
        cached = _read_cached(place, nsamples, seqlen)
        if cached is not None:
            return cached
    if is_paged(loaded.model):
        # Every token that it writes reads all of its weights.
        what = "writing calibration text (`self`)"
        n_bytes = dtype.itemsize * sum(parameter.numel() for parameter in loaded.model.parameters())
        require_memory(n_bytes, what, "other calibration text (--calibration)")
    stream: list[int] = []

    def report(before: int, written: int) -> None:
        progress("sampling calibration text", min(before + written, needed), needed)

    device = loaded.model.device
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), torch.inference_mode():
        torch.manual_seed(seed)
        sampler = _copy_in(loaded, dtype)
        while len(stream) < needed:
            samples = _sample_batch(sampler, partial(report, len(stream)))
            if not any(samples):
                raise InputError("the model writes nothing when sampled; calibrate on text instead of `self`")
            for ids in samples:
                stream += ids
    report(needed, 0)
    windows = torch.tensor(stream[:needed]).view(nsamples, seqlen)
    try:
        with atomic_file(path) as temporary:
            safetensors.torch.save_file({"input_ids": windows}, temporary)
    except InputError as error:  # minutes of sampling are not lost for a cache
        logger.warning("the sampled text is not kept for the next run: %s", error)
    return windows


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


def model_fingerprint(model: torch.nn.Module) -> str:
    """Hex SHA-256 over names, shapes and bytes of all parameters."""
    hasher = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().to(computing_dtype(model)).cpu().contiguous()
        hasher.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        hasher.update(values.view(torch.uint8).numpy().data)
    let_go(model)
    return hasher.hexdigest()


def _sampling_dtype(loaded: LoadedModel) -> torch.dtype:
    """That which samples fastest, as sampling does not need the precision, or of a large model the smallest."""
    return torch.bfloat16 if is_paged(loaded.model) else fast_dtype(loaded.model.device.type)


def _copy_in(loaded: LoadedModel, dtype: torch.dtype) -> LoadedModel:
    """The model in memory, in a dtype."""
    if loaded.model.dtype == dtype and not is_paged(loaded.model):
        return loaded
    # Parameters are replaced, tied ones by one; buffers keep their dtype, which rotary frequencies need.
    rounded = {id(p): torch.nn.Parameter(p.to(dtype), requires_grad=False) for p in loaded.model.parameters()}
    return replace(loaded, model=copy.deepcopy(loaded.model, rounded))


def _sample_batch(loaded: LoadedModel, report: Callable[[int], None]) -> list[list[int]]:
    frame = chat_frame(loaded.tokenizer)
    if frame is None:
        starts = (loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id)
        prompts = [[next((token for token in starts if token is not None), 0)]] * BATCH_SIZE
        return _continue(loaded, prompts, MAX_USER_TOKENS + MAX_REPLY_TOKENS, report)
    before, between = frame
    asked = _continue(loaded, [before] * BATCH_SIZE, MAX_USER_TOKENS, lambda written: None)
    stops = stop_ids(loaded)
    prompts = [
        (ids[:-1] if ids[-1] in stops else ids) + between for ids in asked if len(ids) > len(before) + 1
    ]
    return _continue(loaded, prompts, MAX_REPLY_TOKENS, report) if prompts else []


def _continue(
    loaded: LoadedModel, prompts: list[list[int]], max_new_tokens: int, report: Callable[[int], None]
) -> list[list[int]]:
    """Sample a continuation of each prompt; the result holds prompt and continuation up to the stop token."""
    from transformers import StoppingCriteriaList

    steps = itertools.count(1)

    def stops_nothing(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Transformers calls it after each step, and ends the texts for which it says True."""
        step = next(steps)
        if step % 16 == 0:
            report(step * len(prompts))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    rows = generate(
        loaded,
        prompts,
        max_new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        stopping_criteria=StoppingCriteriaList([stops_nothing]),
        cache_implementation="static",
        disable_compile=True,  # which transformers does for such a cache on a GPU
    )
    return [prompt + row for prompt, row in zip(prompts, rows, strict=True)]


def text_origin(loaded: LoadedModel, seed: int) -> dict[str, Any]:
    """What decides which text a model writes, but for the processor's arithmetic."""
    return {
        "format": _FORMAT,
        "model": model_fingerprint(loaded.model),
        "frame": chat_frame(loaded.tokenizer),
        "sizes": [BATCH_SIZE, MAX_USER_TOKENS, MAX_REPLY_TOKENS],
        "seed": seed,
    }


def _cache_path(
    origin: Mapping[str, Any], nsamples: int, seqlen: int, device: str, dtype: torch.dtype
) -> Path:
    key = {**origin, "dtype": str(dtype), "windows": [nsamples, seqlen]}
    if device != "cpu":
        key["device"] = device
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
