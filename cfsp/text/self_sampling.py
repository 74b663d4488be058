"""Text that a model writes itself, as calibration or training text without data.

A chat model writes chats in its own format, the user's turn included: it is given its template up to where the
user speaks and continues (Magpie, arXiv 2406.08464). A base model continues its start token.
Sampling is batched, deterministic for a seed on one machine, and cached. What built-in models wrote comes with the
package, as the beginning of what each writes from a seed on; tools/write_text.py makes these files.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

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
from cfsp.settings import declared
from cfsp.text.choosing import Chooser, Sampling
from cfsp.text.degeneration import is_loop
from cfsp.text.tokens import encode, render_prompt


def stop_ids(loaded: LoadedModel) -> set[int]:
    """Tokens that end a text: the generation config's and the tokenizer's."""
    return stop_tokens(loaded.model.generation_config, loaded.tokenizer)


def stop_tokens(generation_config: Any, tokenizer: Any) -> set[int]:
    """The same without a model; the generation config may be None."""
    configured = getattr(generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}


def stated_sampling(generation_config: Any) -> dict[str, Any]:
    """Fields of `Sampling` that a generation config, or None, states, whether or not it asks for sampling by default.

    One that asks for it and states none has transformers' temperature of 1; else there are none.
    """
    stated = generation_config.to_diff_dict() if generation_config is not None else {}
    fields = (row.name for row in declared(Sampling))
    values = {name: stated[name] for name in fields if stated.get(name) is not None}
    return values or ({"temperature": 1.0} if stated.get("do_sample") else {})


def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    choosers: Sequence[Chooser] = (),
    **options: Any,
) -> list[list[int]]:
    """What the model writes after each prompt, the token that ends it included.

    Args:
        choosers: One for each prompt, of its tokens, where options ask for no sampling; or none.
        options: Further ones of transformers' `generate`.
    """
    if len(set(map(len, prompts))) > 1 and spec_for(loaded.model.config).sees_neighbours:
        # Tokens would see the padding before them in some releases of transformers.
        return [
            generate(loaded, [prompt], max_new_tokens, choosers=choosers[index : index + 1], **options)[0]
            for index, prompt in enumerate(prompts)
        ]
    pad = loaded.tokenizer.pad_token_id or 0  # any token will do: padding is masked
    longest, stops = max(map(len, prompts)), stop_ids(loaded)
    device = loaded.model.device
    if choosers:
        options["logits_processor"] = [_chosen_alone(choosers, prompts)]
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


def _chosen_alone(choosers: Sequence[Chooser], prompts: Sequence[Sequence[int]]) -> Any:
    """A logits processor of transformers that leaves each row the token that its prompt's chooser takes."""
    from transformers import LogitsProcessor

    longest = max(map(len, prompts))

    class ChosenAlone(LogitsProcessor):  # type: ignore[misc]  # transformers has no types
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            written, logits = input_ids[:, longest:].tolist(), scores.float().cpu().numpy()
            rows = zip(choosers, prompts, written, logits, strict=True)
            tokens = [choose(prompt, so_far, row) for choose, prompt, so_far, row in rows]
            chosen = torch.tensor(tokens, device=scores.device)[:, None]
            return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    return ChosenAlone()


Report = Callable[[int], None]
"""Told now and then how many tokens were written since the call began."""
STEPS_A_REPORT = 16
Continue = Callable[[Sequence[Sequence[int]], int, Report], list[list[int]]]
"""(texts as token ids, most tokens that follow, report) -> each with what the model wrote after it, drawn from its own
probabilities, the token that ends it included."""


@dataclass(frozen=True)
class Writer:
    """A way to have a model continue texts.

    Attributes:
        origin: What of it decides, beside model and seed, which text is written; the model is the argument.
        opened: (model, seed of what is drawn) -> what continues texts, as a context.

    `opened` raises InputError or MissingExtraError where it cannot serve that model.
    """

    origin: Callable[[LoadedModel], dict[str, str]]
    opened: Callable[[LoadedModel, int], AbstractContextManager[Continue]]


def require_room(n_bytes: int) -> None:
    """Raise InputError where memory does not hold what writing takes at least."""
    require_memory(n_bytes, "writing calibration text (`self`)", "other calibration text (--calibration)")


def _origin(loaded: LoadedModel) -> dict[str, str]:
    """That a model which stays in its files writes in other bits is the arithmetic of a machine, not another text."""
    device = loaded.model.device.type
    place = {} if device == "cpu" else {"device": device}
    return {"dtype": str(fast_dtype(device)), **place}


@contextmanager
def _opened(loaded: LoadedModel, seed: int) -> Iterator[Continue]:
    device = loaded.model.device
    with (
        forked_random(device),
        torch.inference_mode(),
    ):
        torch.manual_seed(seed)
        yield partial(_continue, _copy_in(loaded, _sampling_dtype(loaded)))


TRANSFORMERS = Writer(_origin, _opened)


def _sampling_dtype(loaded: LoadedModel) -> torch.dtype:
    """That which samples fastest, as sampling does not need the precision, or of a model that is not whole 16 bits."""
    return torch.bfloat16 if is_paged(loaded.model) else fast_dtype(loaded.model.device.type)


def _copy_in(loaded: LoadedModel, dtype: torch.dtype) -> LoadedModel:
    """The model in memory, in a dtype."""
    if loaded.model.dtype == dtype and not is_paged(loaded.model):
        return loaded
    if is_paged(loaded.model):
        # Every token that it writes reads all of its weights.
        require_room(dtype.itemsize * sum(parameter.numel() for parameter in loaded.model.parameters()))
    # Parameters are replaced, tied ones by one; buffers keep their dtype, which rotary frequencies need.
    rounded = {id(p): torch.nn.Parameter(p.to(dtype), requires_grad=False) for p in loaded.model.parameters()}
    return replace(loaded, model=copy.deepcopy(loaded.model, rounded))


def _continue(
    loaded: LoadedModel, texts: Sequence[Sequence[int]], max_new_tokens: int, report: Report
) -> list[list[int]]:
    from transformers import StoppingCriteriaList

    steps = itertools.count(1)

    def stops_nothing(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Transformers calls it after each step, and ends the texts for which it says True."""
        step = next(steps)
        if step % STEPS_A_REPORT == 0:
            report(step * len(texts))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    rows = generate(
        loaded,
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


FOLDER = Path(__file__).with_name("written")
_NAME = "input_ids"


def digest(origin: Mapping[str, Any]) -> str:
    """32 hex digits that stand for where a text comes from: the model, how it is asked, the seed."""
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:32]


def read_written(origin: Mapping[str, Any], n_tokens: int) -> torch.Tensor | None:
    """The first tokens of a text that comes with the package, (n_tokens,) int64; None where so many do not."""
    path = FOLDER / f"{digest(origin)}.safetensors"
    if not path.is_file():
        return None
    ids = safetensors.torch.load_file(path)[_NAME]
    return ids[:n_tokens].to(torch.int64) if len(ids) >= n_tokens else None


def write_written(origin: Mapping[str, Any], ids: torch.Tensor, about: Mapping[str, str]) -> Path:
    """Keep a text for the package."""
    small = torch.from_numpy(ids.numpy().astype(np.uint16))
    if not torch.equal(small.to(torch.int64), ids):
        raise ValueError("token ids beyond 16 bits")
    path = FOLDER / f"{digest(origin)}.safetensors"
    with atomic_file(path) as temporary:
        safetensors.torch.save_file({_NAME: small}, temporary, metadata=dict(about))
    return path


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
        use_written: Whether a text that comes with the package will do.
        writers: What may continue texts for it; the first that can does, or has done.

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


@dataclass(frozen=True)
class Winnowed:
    """What is left of a model's texts.

    Attributes:
        windows: (n, seqlen) int64, as `cfsp.text.self_sampling.sample_windows` has them.
        n_texts: Texts that were there.
        n_loops: Those among them that say the same over and over; these are left out.
    """

    windows: torch.Tensor
    n_texts: int
    n_loops: int


def without_loops(windows: torch.Tensor, author: LoadedModel) -> Winnowed:
    """Leave out the texts in which a turn is a loop (`cfsp.text.degeneration`), and close the ranks."""
    seqlen, tokenizer, stops = windows.shape[1], author.tokenizer, stop_ids(author)
    begins, between = chat_frame(tokenizer) or (plain_start(tokenizer), [])
    texts = _texts(windows.flatten().tolist(), begins)
    good = [text for text in texts if not any(map(is_loop, _turns(text, tokenizer, between, stops)))]
    if len(good) == len(texts):
        return Winnowed(windows, len(texts), 0)
    stream = torch.tensor([token for text in good for token in text], dtype=windows.dtype)
    count = len(stream) // seqlen
    return Winnowed(stream[: count * seqlen].view(count, seqlen), len(texts), len(texts) - len(good))


def _texts(stream: list[int], begins: list[int]) -> list[list[int]]:
    """A stream's texts, each of which begins so; where a text ends with the token that begins one, the last of two."""
    size = len(begins)
    places = [place for place in range(len(stream) - size) if stream[place : place + size] == begins]
    starts = [place for place in places if stream[place + size : place + 2 * size] != begins]
    return [stream[start:end] for start, end in pairwise(sorted({0, *starts, len(stream)}))]


def _turns(text: list[int], tokenizer: Any, between: list[int], stops: set[int]) -> list[str]:
    """What is said in a text, split where a turn ends and where an answer begins."""
    ends = [place + 1 for place, token in enumerate(text) if token in stops]
    size = len(between)
    answers = [place for place in range(len(text)) if size and text[place : place + size] == between]
    parts = [text[start:end] for start, end in pairwise(sorted({0, *ends, *answers, len(text)}))]
    return [tokenizer.decode(part, skip_special_tokens=True) for part in parts]
