"""Running a decoder block by block, so that memory holds one depth of hidden states instead of all, and one block."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from cfsp.files import LargeScratch, no_space_as_input_error
from cfsp.memory import require_memory
from cfsp.models.architectures import decoder_layers, last_norm, spec_for, state_size
from cfsp.models.offload import at_hand, computing_dtype, weightless
from cfsp.progress import Progress, no_progress


class StoredStates:
    """Hidden states of windows at several depths, in files."""

    def __init__(self) -> None:
        self._folder = LargeScratch("states")

    def put(self, depth: int, states: Sequence[torch.Tensor]) -> None:
        """Store each window's, (..., 1, seqlen, hidden_size)."""
        with no_space_as_input_error(self._file(depth)):
            named = {str(n): state.cpu() for n, state in enumerate(states)}
            safetensors.torch.save_file(named, self._file(depth))

    def get(self, depth: int, device: torch.device) -> list[torch.Tensor]:
        """Each window's, on a device."""
        states = safetensors.torch.load_file(self._file(depth))
        return [states[str(window)].to(device) for window in range(len(states))]

    def take(self, depth: int, device: torch.device) -> list[torch.Tensor]:
        """As `get`; they are not stored any more."""
        states = self.get(depth, device)
        self._file(depth).unlink()
        return states

    def _file(self, depth: int) -> Path:
        return self._folder.path / f"{depth}.safetensors"


Arguments = Mapping[str, Any]
"""Keyword arguments of a block."""


@dataclass(frozen=True)
class Calls:
    """Keyword arguments of every block, for every window.

    Blocks leave keys and values for later ones in them, so each run of windows through the blocks has calls of its own.
    """

    common: Sequence[Arguments]  # of every block, shared by all windows, which are equally long
    own: Sequence[Sequence[Arguments]]  # of every window, and of every block of it, its own
    shared: str = ""  # name of that in which blocks leave keys and values for others; empty if none does

    def of(self, block: int, window: int = 0) -> dict[str, Any]:
        """Of a block, for a window."""
        return {**self.common[block], **self.own[window][block]}

    def apart(self) -> Calls:
        """For another run of the windows that goes on from here: neither sees what the other leaves."""
        return Calls(self.common, [self._copied(blocks) for blocks in self.own], self.shared)

    def together(self) -> Calls:
        """For a run of all windows as one batch, from the first block on."""
        blocks = [dict(arguments) for arguments in self._copied(self.own[0])]
        for index, arguments in enumerate(blocks):
            for name, value in arguments.items():
                if name != self.shared and isinstance(value, torch.Tensor):
                    arguments[name] = torch.cat([blocks[index][name] for blocks in self.own])
        return Calls(self.common, [blocks], self.shared)

    def _copied(self, blocks: Sequence[Arguments]) -> Sequence[Arguments]:
        if not self.shared:
            return blocks
        left = copy.copy(blocks[0][self.shared])
        return [{**arguments, self.shared: left} for arguments in blocks]


def run_layer(layer: nn.Module, hidden: torch.Tensor, arguments: Arguments) -> torch.Tensor:
    """A block's output, of its input's shape; transformers returns a tensor or a tuple."""
    output = layer(hidden, **arguments)
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


def run_windows(
    layer: nn.Module, index: int, windows: Sequence[torch.Tensor], calls: Calls
) -> list[torch.Tensor]:
    """A block's output for each window's hidden states; index: of the block."""
    return [run_layer(layer, hidden, calls.of(index, window)) for window, hidden in enumerate(windows)]


_IN_TUPLES: dict[type[nn.Module], bool] = {}
"""Kind of block -> whether it returns a tuple, and so has to, as transformers 4's Gemma 3 does."""


class _SeenError(Exception):
    """What was to be seen of a pass has been."""


def enter_blocks(
    model: Any, layers: Sequence[nn.Module], input_ids: torch.Tensor
) -> tuple[list[torch.Tensor], Calls]:
    """What runs through the blocks, for windows (nsamples, seqlen).

    The decoder is run with its blocks short-circuited: masks, positions and rotary tables then are exactly what
    the model itself passes, whatever the architecture and the library's version.

    Returns:
        Each window's hidden states before the first block, (..., 1, seqlen, hidden_size); every block's keyword
        arguments.
    """
    hidden: list[torch.Tensor] = []
    own: list[list[Arguments]] = []
    kind, spec = type(layers[0]), spec_for(model.config)
    if kind not in _IN_TUPLES:

        def look(_: nn.Module, __: Any, output: Any) -> None:
            _IN_TUPLES[kind] = isinstance(output, tuple)
            raise _SeenError

        with layers[0].register_forward_hook(look), suppress(_SeenError):
            model.get_decoder()(input_ids=input_ids[:1, :2].to(model.device), use_cache=False)
    in_tuple = _IN_TUPLES[kind]
    parameters = inspect.signature(type(layers[0]).forward)
    record: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def passes_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        named = parameters.bind_partial(layers[0], hidden_states, *args).arguments
        record.append((hidden_states, dict(list(named.items())[2:]) | kwargs))
        return (hidden_states,) if in_tuple else hidden_states

    if model.device.type == "cpu" and len(input_ids) > 1:
        n_bytes = input_ids.numel() * state_size(model.config) * computing_dtype(model).itemsize
        what = f"hidden states of {len(input_ids)} windows of {input_ids.shape[1]} tokens"
        require_memory(n_bytes, what, "fewer windows (--nsamples), or shorter ones (--seqlen)")
    with computing(layers, passes_on), at_hand(model.get_input_embeddings()):
        for window in torch.split(input_ids.to(model.device), 1):
            record.clear()
            model.get_decoder()(input_ids=window, use_cache=False)
            hidden.append(record[0][0].clone())
            own.append([{name: call[name] for name in spec.own_arguments} for _, call in record])
    return hidden, Calls(
        [call for _, call in record], own, spec.shared_keys.argument if spec.shared_keys else ""
    )


@contextmanager
def computing(modules: Iterable[Any], forward: Callable[..., Any]) -> Iterator[None]:
    """Replace modules' `forward` by a function that reads no weights while the context is open."""
    with ExitStack() as stack:
        for module in modules:
            module.forward = weightless(forward)
            stack.callback(delattr, module, "forward")
        yield


def leave_blocks(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What the output matrix reads, of what comes out of the last block: both (..., hidden_size)."""
    normed: torch.Tensor = last_norm(model)(hidden)
    return normed


def last_hidden_states(
    model: Any, input_ids: torch.Tensor, what: str, *, progress: Progress = no_progress
) -> list[torch.Tensor]:
    """Each window's hidden states after the last norm, (1, seqlen, hidden_size), for windows (nsamples, seqlen)."""
    layers = decoder_layers(model)
    hidden, calls = enter_blocks(model, layers, input_ids)
    for index, layer in enumerate(layers):
        with at_hand(layer):
            for window, state in enumerate(hidden):
                hidden[window] = run_layer(layer, state, calls.of(index, window))
        progress(what, index + 1, len(layers))
    return [leave_blocks(model, state) for state in hidden]
