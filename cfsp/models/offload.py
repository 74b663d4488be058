"""Offloaded models: weights are float32, block by block, only while something computes with them.

A model is made of units: each decoder block, and each module outside the blocks that has weights. While a unit is not
in use, its parameters are tensors of 16 bits, or mapped from safetensors files: the model's own, or, once changed,
scratch files that hold them exactly in as few bytes as that takes. When a module is called, or `at_hand`, they are
float32 in memory; afterwards what was changed is stored and the rest let go. Of a further table of tokens, which may be
larger than all blocks, a call has only its tokens' rows. The bits that come out are those of a model in memory.
"""

from __future__ import annotations

import copy
import gc
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import finalize, ref

import safetensors
import safetensors.torch
import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.files import LargeScratch, large_temporary, no_space_as_input_error
from cfsp.memory import free_memory, give_back_large_tensors, require_memory
from cfsp.models.architectures import decoder_layers, last_norm, spec_for, state_size
from cfsp.models.weights import model_from_weights, safetensors_files, uniform_dtype, weight_count
from cfsp.progress import Progress, no_progress
from cfsp.reading import as_input_error
from cfsp.units import format_bytes

VARIABLE = "PHONEREADY_STREAM"  # environment variable: when weights stay in files
ALWAYS, NEVER, AUTO = "always", "never", "auto"
_SHARE = 0.5  # of free memory, which a model may take before its weights are kept in fewer bytes
NARROW: Mapping[str, torch.dtype] = MappingProxyType({"bfloat16": torch.bfloat16, "float16": torch.float16})
"""Names in `cfsp.precision.DTYPES` that weights may be kept in -> 16 bits."""


class Keeping(NamedTuple):
    """How weights are kept while nothing computes with them: in which dtype, and whether in files."""

    dtype: torch.dtype = torch.float32
    in_files: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether all are float32 in memory always."""
        return self == WHOLE


WHOLE = Keeping()


def keeping_of(n_weights: int, stored: torch.dtype | None, asked: str = AUTO) -> Keeping:
    """The first way that has room: whole, unless 16 bits are asked for; in 16 bits, if files have no others; in files.

    `asked`: a name in `cfsp.precision.DTYPES`. Raises InputError if the environment asks for something unknown.
    """
    wish = os.environ.get(VARIABLE) or AUTO
    if wish not in (ALWAYS, NEVER, AUTO):
        allowed = ", ".join((AUTO, ALWAYS, NEVER))
        raise InputError("unknown", field=VARIABLE, value=wish, allowed=allowed)

    def is_too_much(dtype: torch.dtype) -> bool:
        n_bytes = n_weights * dtype.itemsize
        return wish == ALWAYS or (wish == AUTO and (n_bytes > _SHARE * free_memory()))

    narrow = NARROW.get(asked)
    if narrow is None and not is_too_much(torch.float32):
        return WHOLE
    if asked == AUTO and stored in NARROW.values():
        narrow = stored
    if narrow is not None and not is_too_much(narrow):
        return Keeping(narrow)
    if stored is not None and (stored == narrow or asked not in NARROW):
        return Keeping(stored, in_files=True)
    return WHOLE if narrow is None else Keeping(narrow)  # refused if memory does not hold it


def keeping_of_files(folder: Path, asked: str = AUTO) -> Keeping:
    """`keeping_of` the weights of a Hugging Face folder; raises InputError if a file is missing or damaged."""
    files = safetensors_files(folder)
    return keeping_of(weight_count(files, tied=False), uniform_dtype(files), asked)


class _Stored:
    """Where a parameter is while its unit is not in use: in memory as `tensor`, or in a safetensors file by `name`."""

    def __init__(self, tensor: torch.Tensor | None = None, file: Path = Path(), name: str = "") -> None:
        self.tensor, self._file, self._name = tensor, file, name
        self._stamp = () if tensor is not None else _stamp(file)

    def read(self) -> torch.Tensor:
        """The tensor in memory, or mapped; raises InputError if the file is another one by now."""
        if self.tensor is not None:
            return self.tensor
        if _stamp(self._file) != self._stamp:
            raise InputError(f"{self._file} was changed while it was read")
        with safetensors.safe_open(self._file, "pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(self._name)
            return tensor


def _stamp(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except FileNotFoundError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _put_away(tensor: torch.Tensor, scratch: LargeScratch | None, *, narrowed: bool = True) -> _Stored:
    """Store a parameter, in memory or a scratch file, in the fewest bytes that hold it exactly."""
    tensor = tensor.detach().contiguous()
    for dtype in NARROW.values() if narrowed else ():
        narrow = tensor.to(dtype)
        if torch.equal(narrow.to(tensor.dtype), tensor):
            tensor = narrow
            break
    if scratch is None:
        return _Stored(tensor)
    with no_space_as_input_error(scratch.path):
        handle, name = tempfile.mkstemp(".safetensors", dir=scratch.path)
        os.close(handle)
        safetensors.torch.save_file({"weight": tensor}, name)
    stored = _Stored(None, Path(name), "weight")
    finalize(stored, _remove, Path(name), scratch)  # which keeps the folder until its last file is gone
    return stored


def _remove(file: Path, _: LargeScratch) -> None:
    file.unlink(missing_ok=True)


class _Unit:
    """Modules whose weights come and go together: one, or two that share a parameter."""

    def __init__(
        self, modules: Iterable[nn.Module], stored: Mapping[int, _Stored], scratch: LargeScratch | None
    ) -> None:
        # Weak: a unit lives as long as its modules, not the other way round.
        self._modules = tuple(map(ref, modules))
        self.scratch, self.users, self.calls = scratch, 0, 0
        self._known = {id(p): (p, stored[id(p)], p._version) for p in self._parameters() if id(p) in stored}
        for module in self.modules:
            vars(module)[_UNIT] = self

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Those that are still there."""
        return tuple(module for known in self._modules if (module := known()) is not None)

    def _parameters(self) -> list[nn.Parameter]:
        return list({id(p): p for module in self.modules for p in module.parameters()}.values())

    def _unchanged(self, parameter: nn.Parameter) -> _Stored | None:
        """Where a parameter's values are stored; None if it is new, or was changed since."""
        known = self._known.get(id(parameter))
        return known[1] if known and known[2] == parameter._version else None

    def share(self, modules: Iterable[nn.Module], own: Mapping[int, nn.Parameter]) -> None:
        """Make the unit of copies of the modules: what is stored is shared. `own`: id of a parameter -> its copy."""
        if self.users:
            raise RuntimeError("a model whose weights are at hand is not copied: they would be shared")
        stored = {id(own[id(p)]): one for p in self._parameters() if (one := self._unchanged(p))}
        _Unit(modules, stored, self.scratch)

    def take(self) -> None:
        """Have the weights in memory, as float32."""
        if not self.users:
            # Weights made in inference mode could not say whether they were changed.
            with torch.inference_mode(False), torch.no_grad():
                for parameter in self._parameters():
                    stored = self._unchanged(parameter)
                    is_shared = stored is not None and stored.tensor is not None
                    parameter.data = parameter.detach().to(torch.float32, copy=is_shared)
        self.users += 1

    def give_back(self) -> None:
        """Let them go, unless someone else has them still."""
        self.users -= 1
        if not self.users:
            self.let_go()

    def let_go(self) -> None:
        """Put every parameter away; those that were changed are stored now."""
        parameters = self._parameters()
        stored = [self._unchanged(p) or _put_away(p, self.scratch) for p in parameters]
        tensors = [one.read() for one in stored]
        with torch.inference_mode(False), torch.no_grad():
            for parameter, tensor in zip(parameters, tensors, strict=True):
                parameter.data = tensor
        self._known = {id(p): (p, one, p._version) for p, one in zip(parameters, stored, strict=True)}


_UNIT, _TABLE = "_offload_unit", "_offload_table"


def _unit_of(module: nn.Module) -> _Unit | None:
    unit: _Unit | None = vars(module).get(_UNIT)
    return unit


def _units_of(model: nn.Module) -> list[_Unit]:
    return list(dict.fromkeys(unit for module in model.modules() if (unit := _unit_of(module))))


def is_paged(model: Any) -> bool:
    """Whether a model is offloaded, to files or to 16 bits in memory."""
    return any(_unit_of(layer) for layer in decoder_layers(model))


def computing_dtype(model: Any) -> torch.dtype:
    """Of a model's hidden states."""
    dtype: torch.dtype = torch.float32 if is_paged(model) else model.dtype
    return dtype


@contextmanager
def at_hand(*modules: nn.Module) -> Iterator[None]:
    """Keep modules' weights in memory while the context is open, not only during calls."""
    with ExitStack() as stack:
        for unit in map(_unit_of, modules):
            if unit is not None:
                unit.take()
                stack.callback(unit.give_back)
        yield


def let_go(model: nn.Module) -> None:
    """Let go what was read of an offloaded model's weights outside `at_hand`."""
    for unit in _units_of(model):
        unit.let_go()


def copied(model: Any) -> Any:
    """A deep copy of a model; an offloaded one shares what is stored, and what was not changed in it."""
    if not is_paged(model):
        return copy.deepcopy(model)
    gc.collect()  # what the last copy has changed, which is not needed any more, goes from the disk
    own = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    units = _units_of(model)
    twin = copy.deepcopy(model, own | dict.fromkeys(map(id, units)))
    twins = dict(zip(model.modules(), twin.modules(), strict=True))
    for unit in units:
        unit.share([twins[module] for module in unit.modules], own)
    return twin


def offloaded_model(config: Any, files: Sequence[Path], *, where: str, cls: Any = None) -> Any:
    """A model in eval mode whose weights stay in files; raises InputError if those are damaged or do not fit."""
    weights: dict[str, torch.Tensor] = {}
    stored: dict[str, _Stored] = {}
    for file in map(Path.resolve, files):
        with as_input_error(f"{file} is damaged or cut short"), safetensors.safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                weights[name], stored[name] = opened.get_tensor(name), _Stored(None, file, name)
    dtype = next(iter(weights.values())).dtype
    model = model_from_weights(config, weights, dtype=dtype, where=where, cls=cls)
    give_back_large_tensors()
    return _offload(model, stored, LargeScratch("weights"))


def offloaded_copy(
    config: Any, weights: Iterable[tuple[str, torch.Tensor]], n_weights: int, *, where: str
) -> Any:
    """A model in eval mode whose weights are in scratch files; raises InputError without room or if they do not fit."""
    require_scratch(scratch_bytes(n_weights))
    scratch = LargeScratch("weights")
    stored = {name: _put_away(tensor, scratch, narrowed=False) for name, tensor in weights}
    mapped = {name: one.read() for name, one in stored.items()}
    model = model_from_weights(config, mapped, dtype=torch.float32, where=where)
    give_back_large_tensors()
    return _offload(model, stored, scratch)


def held_model(model: Any) -> Any:
    """A model in eval mode, on its device, whose weights stay in memory in the 16 bits that they are in."""
    return _offload(model, {name: _Stored(p.detach()) for name, p in model.named_parameters()}, None)


def _offload(model: Any, stored: Mapping[str, _Stored], scratch: LargeScratch | None) -> Any:
    """Have weights come and go unit by unit; buffers become float32. Raises InputError for an unknown one."""
    layers, names = list(decoder_layers(model)), model.state_dict().keys()
    known: dict[int, _Stored] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in stored:  # of one with two names the first is the embedding, which is what both are
            known.setdefault(id(parameter), stored[name])
    for prefix, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if not buffer.is_floating_point() or buffer.dtype == torch.float32:
                continue
            name, wide = f"{prefix}.{key}", buffer.float()
            if name not in names:
                if key != "embed_scale":
                    problem = "a model with this buffer cannot be read block by block"
                    raise InputError(problem, field=name, value=buffer.dtype)
                wide.fill_(getattr(module, "scalar_embed_scale", model.config.hidden_size**0.5))
            setattr(module, key, wide)
    ends = tuple(dict.fromkeys((model.get_input_embeddings(), model.get_output_embeddings())))
    inside = {id(module) for layer in layers for module in layer.modules()} | set(map(id, ends))
    others = [module for module in model.modules() if id(module) not in inside and module._parameters]
    is_tied = len({id(end.weight) for end in ends}) == 1
    for modules in (*([ends] if is_tied else zip(ends)), *zip((*layers, *others))):
        _Unit(modules, known, scratch)
        for module in modules:
            is_table = isinstance(module, nn.Embedding) and module not in ends
            before, after = (_take_rows, _put_rows_back) if is_table else (_before, _after)
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after, always_call=True)
    return model


def _before(module: nn.Module, _: Any) -> None:
    unit = _unit_of(module)
    if unit is not None and "forward" not in vars(module):  # `computing` reads no weights
        unit.take()
        unit.calls += 1


def _after(module: nn.Module, _: Any, __: Any) -> None:
    unit = _unit_of(module)
    if unit is not None and unit.calls:  # torch calls it, too, where something before us has failed
        unit.calls -= 1
        unit.give_back()


def _take_rows(module: nn.Embedding, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
    """Give an embedding of which nothing is in memory the rows of the tokens that it is called with."""
    unit = _unit_of(module)
    if unit is None or unit.users:
        return None
    (ids,) = arguments
    # torch has the padding token's row be there
    known = 0 if module.padding_idx is None else module.padding_idx + 1
    needed = torch.cat([ids.flatten(), torch.arange(known, device=ids.device)])
    rows, places = torch.unique(needed, return_inverse=True)
    table = module._parameters["weight"]
    assert table is not None
    vars(module)[_TABLE] = table
    module._parameters["weight"] = nn.Parameter(table.detach()[rows].float(), requires_grad=False)
    return (places[: ids.numel()].view(ids.shape),)


def _put_rows_back(module: nn.Module, _: Any, __: Any) -> None:
    table = vars(module).pop(_TABLE, None)
    if table is not None:
        module._parameters["weight"] = table


def scratch_bytes(n_weights: int) -> int:
    """Of weights that may be changed in scratch files: four bytes each, whatever they were stored in."""
    return n_weights * torch.float32.itemsize


def may_keep_states(n_bytes: int, n_weights: int) -> bool:
    """Whether n_bytes of hidden states may be kept in optional scratch files, with as much again left."""
    return 2 * n_bytes + scratch_bytes(n_weights) <= shutil.disk_usage(large_temporary()).free


def check_scratch(model: Any) -> None:
    """Raise InputError if a model in files is to be changed and scratch files have no room for its weights."""
    if any(unit.scratch for unit in _units_of(model)):
        require_scratch(scratch_bytes(sum(parameter.numel() for parameter in model.parameters())))


def require_scratch(needed: int) -> None:
    """Raise InputError if the folder for large temporary files has fewer bytes free than are needed."""
    folder = large_temporary()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"reading a model block by block takes up to {format_bytes(needed)} in {folder}, and "
            f"{format_bytes(free)} are free",
            allowed="another folder (TMPDIR)",
        )


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

    def _file(self, depth: int) -> Path:
        return self._folder.path / f"{depth}.safetensors"


Arguments = Mapping[str, Any]  # keyword arguments of a block


class Calls(NamedTuple):
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
        require_memory(n_bytes, what, "fewer windows (--set nsamples), or shorter ones (--set seqlen)")
    with computing(layers, passes_on), at_hand(model.get_input_embeddings()):
        for window in torch.split(input_ids.to(model.device), 1):
            record.clear()
            model.get_decoder()(input_ids=window, use_cache=False)
            hidden.append(record[0][0].clone())
            own.append([{name: call[name] for name in spec.own_arguments} for _, call in record])
    shared = spec.shared_keys.argument if spec.shared_keys else ""
    return hidden, Calls([call for _, call in record], own, shared)


@contextmanager
def computing(modules: Iterable[Any], forward: Callable[..., Any]) -> Iterator[None]:
    """Replace modules' `forward` by a function that reads no weights while the context is open."""
    with ExitStack() as stack:
        for module in modules:
            module.forward = forward
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
