"""Running a decoder block by block, so that memory holds one depth of hidden states instead of all, and one block."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.files import no_space_as_input_error
from cfsp.memory import require_memory
from cfsp.models.architectures import decoder_layers, last_norm
from cfsp.models.paging import at_hand, computing_dtype, weightless
from cfsp.progress import Progress, no_progress
from cfsp.scratch import LargeScratch


class StoredStates:
    """Hidden states of windows at several depths, in files."""

    def __init__(self) -> None:
        self._folder = LargeScratch("states")

    def put(self, depth: int, states: Sequence[torch.Tensor]) -> None:
        """Store each window's, (1, seqlen, hidden_size)."""
        with no_space_as_input_error(self._file(depth)):
            safetensors.torch.save_file({str(n): state for n, state in enumerate(states)}, self._file(depth))

    def take(self, depth: int) -> list[torch.Tensor]:
        """Each window's, which are not stored any more."""
        states = safetensors.torch.load_file(self._file(depth))
        self._file(depth).unlink()
        return [states[str(window)] for window in range(len(states))]

    def _file(self, depth: int) -> Path:
        return self._folder.path / f"{depth}.safetensors"


def run_layer(layer: nn.Module, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """A block's output, (batch, seqlen, hidden_size), whether the library returns a tensor or a tuple."""
    output = layer(hidden, **arguments)
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


def enter_blocks(
    model: Any, layers: Sequence[nn.Module], input_ids: torch.Tensor
) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """What runs through the blocks, for windows (nsamples, seqlen).

    The decoder is run with its blocks short-circuited: masks, positions and rotary tables then are exactly what
    the model itself passes, whatever the architecture and the library's version. All windows share them, as they are
    equally long.

    Returns:
        Each window's hidden states before the first block, (1, seqlen, hidden_size); every block's keyword arguments.
    """
    hidden: list[torch.Tensor] = []
    in_tuple = _returns_tuple(model, layers, input_ids)
    record: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def passes_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise InputError(
                "the decoder passes block arguments by position; this architecture is unsupported"
            )
        record.append((hidden_states, kwargs))
        return (hidden_states,) if in_tuple else hidden_states

    if model.device.type == "cpu" and len(input_ids) > 1:
        n_bytes = input_ids.numel() * model.config.hidden_size * computing_dtype(model).itemsize
        what = f"hidden states of {len(input_ids)} windows of {input_ids.shape[1]} tokens"
        require_memory(n_bytes, what, "fewer windows (--nsamples), or shorter ones (--seqlen)")
    with ExitStack() as stack:
        for layer in layers:
            layer.forward = weightless(passes_on)
            stack.callback(delattr, layer, "forward")
        stack.enter_context(at_hand(model.get_input_embeddings()))
        for window in torch.split(input_ids.to(model.device), 1):
            record.clear()
            model.get_decoder()(input_ids=window, use_cache=False)
            hidden.append(record[0][0].clone())
    return hidden, [arguments for _, arguments in record]


def last_hidden_states(
    model: Any, input_ids: torch.Tensor, what: str, *, progress: Progress = no_progress
) -> list[torch.Tensor]:
    """Each window's hidden states after the last norm, (1, seqlen, hidden_size), for windows (nsamples, seqlen).

    They are those of a pass over each window after the other.

    Args:
        model: A causal LM of the architecture table, in eval mode.
        input_ids: int64.
        what: Is done, in words.
        progress: Told after each block.
    """
    layers = decoder_layers(model)
    hidden, calls = enter_blocks(model, layers, input_ids)
    for index, layer in enumerate(layers):
        with at_hand(layer):
            for window, state in enumerate(hidden):
                hidden[window] = run_layer(layer, state, calls[index])
        progress(what, index + 1, len(layers))
    norm = last_norm(model)
    return [norm(state) for state in hidden]


_IN_TUPLES: dict[type[nn.Module], bool] = {}
"""Kind of block -> whether it returns its hidden states in a tuple, as transformers 4's Gemma 3 does."""


class _SeenError(Exception):
    """What was to be seen of a pass has been."""


def _returns_tuple(model: Any, layers: Sequence[nn.Module], input_ids: torch.Tensor) -> bool:
    """Whether the decoder expects its blocks to return tuples; of each kind of block one is asked."""
    kind = type(layers[0])
    if kind not in _IN_TUPLES:

        def look(_: nn.Module, __: Any, output: Any) -> None:
            _IN_TUPLES[kind] = isinstance(output, tuple)
            raise _SeenError

        with layers[0].register_forward_hook(look), suppress(_SeenError):
            model.get_decoder()(input_ids=input_ids[:1, :2].to(model.device), use_cache=False)
    return _IN_TUPLES[kind]
