"""Text that a model writes itself, as calibration or training text without data.

A chat model is given its template up to the user's turn and writes the whole chat (Magpie, arXiv 2406.08464); a base
model continues its start token. Sampling is batched, deterministic for a seed on one machine, and cached. What built-in
models write from a seed on comes with the package (tools/write_text.py).
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch

from cfsp.devices import forked_random
from cfsp.errors import InputError, PhonereadyError
from cfsp.files import atomic_file
from cfsp.memory import require_memory
from cfsp.models.architectures import spec_for
from cfsp.models.builtin import cache_directory
from cfsp.models.offload import computing_dtype, is_paged, let_go
from cfsp.models.source import LoadedModel
from cfsp.models.weights import sha256_tensors
from cfsp.precision import fast_dtype
from cfsp.progress import Progress, no_progress
from cfsp.text.degeneration import is_loop
from cfsp.text.tokens import encode, render_prompt

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).with_name("written")
_NAME = "input_ids"
BATCH_SIZE = 64
MAX_USER_TOKENS = 96
MAX_REPLY_TOKENS = 256
STEPS_A_REPORT = 16
_SENTINEL = "\N{SNOWMAN}user-turn\N{SNOWMAN}"
_FORMAT = 1


def stop_ids(loaded: LoadedModel) -> set[int]:
    """Tokens that end a text: the generation config's and the tokenizer's."""
    return stop_tokens(loaded.model.generation_config, loaded.tokenizer)


def stop_tokens(generation_config: Any, tokenizer: Any) -> set[int]:
    """The same without a model; the generation config may be None."""
    configured = getattr(generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}


def generate(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any
) -> list[list[int]]:
    """What the model writes after each prompt, the token that ends it included; options are transformers'."""
    if len(set(map(len, prompts))) > 1 and spec_for(loaded.model.config).sees_neighbours:
        # Tokens would see the padding before them in some releases of transformers.
        return [generate(loaded, [prompt], max_new_tokens, **options)[0] for prompt in prompts]
    pad = loaded.tokenizer.pad_token_id or 0  # any token will do: padding is masked
    longest, stops = max(map(len, prompts)), stop_ids(loaded)
    device = loaded.model.device
    output = loaded.model.generate(
        input_ids=torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device),
        attention_mask=torch.tensor(
            [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device
        ),
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,
        pad_token_id=pad,
        eos_token_id=sorted(stops) or None,
        **options,
    )
    written = []
    for row in output[:, longest:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        written.append(row[:end])
    return written


Report = Callable[[int], None]  # told now and then how many tokens were written since the call began
Continue = Callable[[Sequence[Sequence[int]], int, Report], list[list[int]]]
"""(texts as token ids, most new tokens, report) -> each with what the model drew after it, its end token included."""


class Writer(NamedTuple):
    """A way to have a model continue texts: what of it, beside model and seed, decides which text is written; and
    (model, seed) -> what continues texts, as a context, which raises InputError or MissingExtraError if it cannot."""

    origin: Callable[[LoadedModel], dict[str, str]]
    opened: Callable[[LoadedModel, int], AbstractContextManager[Continue]]


def require_room(n_bytes: int) -> None:
    """Raise InputError if memory does not hold what writing takes at least."""
    require_memory(n_bytes, "writing calibration text (`self`)", "other calibration text (--calibration)")


def _origin(loaded: LoadedModel) -> dict[str, str]:
    device = loaded.model.device.type
    return {"dtype": str(fast_dtype(device)), **({} if device == "cpu" else {"device": device})}


def _copy_in(loaded: LoadedModel, dtype: torch.dtype) -> LoadedModel:
    """The model in memory, in a dtype."""
    if loaded.model.dtype == dtype and not is_paged(loaded.model):
        return loaded
    if is_paged(loaded.model):
        # Every token that it writes reads all of its weights.
        require_room(dtype.itemsize * sum(parameter.numel() for parameter in loaded.model.parameters()))
    # Parameters are replaced, tied ones by one; buffers keep their dtype, which RoPE's frequencies need.
    rounded = {id(p): torch.nn.Parameter(p.to(dtype), requires_grad=False) for p in loaded.model.parameters()}
    return replace(loaded, model=copy.deepcopy(loaded.model, rounded))


@contextmanager
def _opened(loaded: LoadedModel, seed: int) -> Iterator[Continue]:
    from transformers import StoppingCriteriaList

    device = loaded.model.device
    # Sampling needs no precision: the fastest dtype, or 16 bits if the model is offloaded.
    dtype = torch.bfloat16 if is_paged(loaded.model) else fast_dtype(device.type)

    def go_on(texts: Sequence[Sequence[int]], max_new_tokens: int, report: Report) -> list[list[int]]:
        steps = itertools.count(1)

        def stops_nothing(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            """Transformers calls it after each step, and ends the texts for which it says True."""
            step = next(steps)
            if step % STEPS_A_REPORT == 0:
                report(step * len(texts))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        rows = generate(
            fast,
            texts,
            max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            stopping_criteria=StoppingCriteriaList([stops_nothing]),
            cache_implementation="static",
            disable_compile=True,  # which transformers does for such a cache on a GPU
        )
        return [[*text, *row] for text, row in zip(texts, rows, strict=True)]

    with forked_random(device), torch.inference_mode():
        torch.manual_seed(seed)
        fast = _copy_in(loaded, dtype)
        yield go_on


TRANSFORMERS = Writer(_origin, _opened)


def _file(folder: Path, origin: Mapping[str, Any]) -> Path:
    """Where a text is kept, by what decides it."""
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:32]
    return folder / f"{digest}.safetensors"


def read_written(origin: Mapping[str, Any], n_tokens: int) -> torch.Tensor | None:
    """The first tokens of a text that comes with the package, (n_tokens,) int64; None if it has fewer."""
    path = _file(FOLDER, origin)
    if not path.is_file():
        return None
    ids = safetensors.torch.load_file(path)[_NAME]
    return ids[:n_tokens].to(torch.int64) if len(ids) >= n_tokens else None


def write_written(origin: Mapping[str, Any], ids: torch.Tensor, about: Mapping[str, str]) -> Path:
    """Keep a text for the package."""
    small = torch.from_numpy(ids.numpy().astype(np.uint16))
    if not torch.equal(small.to(torch.int64), ids):
        raise ValueError("token ids beyond 16 bits")
    path = _file(FOLDER, origin)
    with atomic_file(path) as temporary:
        safetensors.torch.save_file({_NAME: small}, temporary, metadata=dict(about))
    return path


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
    """Windows (nsamples, seqlen) of text that the model wrote; from the package or the cache if they are there.

    Args:
        use_written: Whether a text that comes with the package will do.
        writers: What may continue texts for it; the first that can does.

    Raises:
        InputError: The model writes nothing (every sample ends at once), or no writer can have it write.
    """
    origin = text_origin(loaded, seed)
    written = read_written(origin, nsamples * seqlen) if use_written else None
    if written is not None:
        return written.view(nsamples, seqlen)
    for place, writer in enumerate(writers, 1):
        try:
            path = _file(
                cache_directory() / "self",
                {**origin, **writer.origin(loaded), "windows": [nsamples, seqlen]},
            )
            if path.is_file():
                try:
                    cached = safetensors.torch.load_file(path)[_NAME]
                    if tuple(cached.shape) == (nsamples, seqlen):
                        return cached
                except (safetensors.SafetensorError, KeyError, OSError) as error:
                    logger.warning("ignoring unreadable cache file %s: %s", path, error)
            with writer.opened(loaded, seed) as continued:
                stream = _write(loaded, continued, nsamples * seqlen, progress)
        except PhonereadyError as error:
            if place == len(writers):
                raise
            logger.info("another way to sample is taken: %s", error)
            continue
        windows = torch.tensor(stream).view(nsamples, seqlen)
        try:
            with atomic_file(path) as temporary:
                safetensors.torch.save_file({_NAME: windows}, temporary)
        except InputError as error:  # minutes of sampling are not lost for a cache
            logger.warning("the sampled text is not kept for the next run: %s", error)
        return windows
    raise InputError("nothing is there that could write", field="writers")


def _write(loaded: LoadedModel, continued: Continue, needed: int, progress: Progress) -> list[int]:
    """So many tokens of texts, one after the other."""
    stream: list[int] = []

    def report(written: int) -> None:
        progress("sampling calibration text", min(len(stream) + written, needed), needed)

    while len(stream) < needed:
        samples = _sample_batch(loaded, continued, report)
        if not any(samples):
            raise InputError("the model writes nothing when sampled; calibrate on text instead of `self`")
        stream += itertools.chain.from_iterable(samples)
    report(0)
    return stream[:needed]


def _sample_batch(loaded: LoadedModel, continued: Continue, report: Report) -> list[list[int]]:
    frame = chat_frame(loaded.tokenizer)
    if frame is None:
        prompts = [_plain_start(loaded.tokenizer)] * BATCH_SIZE
        return continued(prompts, MAX_USER_TOKENS + MAX_REPLY_TOKENS, report)
    before, between = frame
    asked = continued([before] * BATCH_SIZE, MAX_USER_TOKENS, lambda written: None)
    stops = stop_ids(loaded)
    prompts = [
        (ids[:-1] if ids[-1] in stops else ids) + between for ids in asked if len(ids) > len(before) + 1
    ]
    return continued(prompts, MAX_REPLY_TOKENS, report) if prompts else []


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


def _plain_start(tokenizer: Any) -> list[int]:
    """The start token, with which a text begins that is no chat."""
    starts = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return [next((token for token in starts if token is not None), 0)]


def model_fingerprint(model: torch.nn.Module) -> str:
    """Hex SHA-256 over names, shapes and bytes of all parameters."""
    dtype = computing_dtype(model)
    found = sha256_tensors((name, p.detach().to(dtype).cpu()) for name, p in model.named_parameters())
    let_go(model)
    return found


def text_origin(loaded: LoadedModel, seed: int) -> dict[str, Any]:
    """What decides which text a model writes, but for the processor's arithmetic."""
    return {
        "format": _FORMAT,
        "model": model_fingerprint(loaded.model),
        "frame": chat_frame(loaded.tokenizer),
        "sizes": [BATCH_SIZE, MAX_USER_TOKENS, MAX_REPLY_TOKENS],
        "seed": seed,
    }


def without_loops(windows: torch.Tensor, author: LoadedModel) -> tuple[torch.Tensor, int, int]:
    """Leave out the texts of windows (n, seqlen) in which a turn is a loop (`cfsp.text.degeneration`).

    Returns:
        The windows of the other texts, the number of all texts, and that of loops.
    """
    seqlen, tokenizer, stops = windows.shape[1], author.tokenizer, stop_ids(author)
    begins, between = chat_frame(tokenizer) or (_plain_start(tokenizer), [])
    stream, size = windows.flatten().tolist(), len(begins)
    places = [place for place in range(len(stream) - size) if stream[place : place + size] == begins]
    # One token may end a text and begin the next: the latter of two in a row begins it.
    starts = [place for place in places if stream[place + size : place + 2 * size] != begins]
    texts = [stream[start:end] for start, end in pairwise(sorted({0, *starts, len(stream)}))]
    good = []
    for text in texts:
        # A turn ends with a stop token, or where an answer begins.
        cuts = {0, len(text), *(place + 1 for place, token in enumerate(text) if token in stops)}
        if count := len(between):
            cuts |= {place for place in range(len(text)) if text[place : place + count] == between}
        turns = (text[start:end] for start, end in pairwise(sorted(cuts)))
        if not any(is_loop(tokenizer.decode(turn, skip_special_tokens=True)) for turn in turns):
            good.append(text)
    if len(good) == len(texts):
        return windows, len(texts), 0
    left = torch.tensor([token for text in good for token in text], dtype=windows.dtype)
    n_windows = len(left) // seqlen
    return left[: n_windows * seqlen].view(n_windows, seqlen), len(texts), len(texts) - len(good)
