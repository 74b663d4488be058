"""What continues texts for a model that writes its own calibration text; transformers does, wherever the model is."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from cfsp.devices import forked_random
from cfsp.memory import require_memory
from cfsp.models.paging import is_paged
from cfsp.models.source import LoadedModel
from cfsp.precision import fast_dtype
from cfsp.text.generation import generate

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
