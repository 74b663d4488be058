"""Models that memory does not hold as float32: weights are, block by block, only while something computes with them.

An offloaded model is made of units: each decoder block, and each module outside the blocks that has weights. While a
unit is not in use, its parameters are tensors of 16 bits, or mapped from safetensors files: the model's own, or, once
changed, scratch files that hold them in as few bytes as hold them exactly. When a module is called, or `at_hand`, they
are float32 in memory; afterwards what was changed is stored and the rest let go. Of a further table of tokens, which
may be larger than all blocks, a call has the rows of its tokens. Whatever runs block after block computes the same bits
as with a model in memory.
"""

from __future__ import annotations

import copy
import gc
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar
from weakref import finalize, ref

import safetensors
import safetensors.torch
import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.files import large_temporary, no_space_as_input_error
from cfsp.memory import free_memory, give_back_large_tensors
from cfsp.models.architectures import decoder_layers
from cfsp.models.weights import model_from_weights, safetensors_files, uniform_dtype, weight_count
from cfsp.processes import count
from cfsp.reading import as_input_error
from cfsp.scratch import LargeScratch
from cfsp.units import format_bytes

VARIABLE = "PHONEREADY_STREAM"
"""The environment's word on when weights stay in files."""
ALWAYS, NEVER, AUTO = "always", "never", "auto"
_SHARE = 0.5
"""Of free memory, which a model may take before its weights are kept in fewer bytes."""
NARROW: Mapping[str, torch.dtype] = MappingProxyType({"bfloat16": torch.bfloat16, "float16": torch.float16})
"""Names in `cfsp.precision.DTYPES` that weights may be kept in -> 16 bits."""


@dataclass(frozen=True)
class Keeping:
    """How weights are kept while nothing computes with them: in which dtype, and whether in files."""

    dtype: torch.dtype = torch.float32
    in_files: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether all are float32 in memory always."""
        return self == WHOLE


WHOLE = Keeping()


def keeping_of(n_weights: int, stored: torch.dtype | None, asked: str = AUTO) -> Keeping:
    """The first way that has room: whole, if 16 bits are not asked for; in 16 bits, if files have no others; in files.

    Args:
        asked: A name in `cfsp.precision.DTYPES`.

    Raises:
        InputError: The environment asks for something that is not known.
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
    return WHOLE if narrow is None else Keeping(narrow)  # refused where memory does not hold it


def keeping_of_files(folder: Path, asked: str = AUTO) -> Keeping:
    """`keeping_of` the weights of a Hugging Face folder; raises InputError if a file is missing or damaged."""
    files = safetensors_files(folder)
    return keeping_of(weight_count(files, tied=False), uniform_dtype(files), asked)


class _ScratchFile:
    """Deletes a scratch file with the last parameter that is stored in it."""

    def __init__(self, file: Path, folder: LargeScratch) -> None:
        self.folder = folder  # deleted with the last file of it
        finalize(self, file.unlink, missing_ok=True)


@dataclass(frozen=True)
class _Stored:
    """Where a parameter is while its unit is not in use: in memory as `tensor`, or in a safetensors file by `name`.

    `stamp` is the file's, which another one in its place does not have; `owner` a scratch file's.
    """

    tensor: torch.Tensor | None = None
    file: Path = Path()
    name: str = ""
    stamp: tuple[int, ...] = ()
    owner: _ScratchFile | None = None


def _in_file(file: Path, names: Iterable[str], owner: _ScratchFile | None = None) -> dict[str, _Stored]:
    stamp = _stamp(file)
    return {name: _Stored(None, file, name, stamp, owner) for name in names}


def _stamp(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except FileNotFoundError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _offloaded(stored: Sequence[_Stored]) -> list[torch.Tensor]:
    """Tensors in memory as they are, those in files mapped; raises InputError if a file is another one by now."""
    files: dict[Path, Any] = {}
    tensors = []
    with ExitStack() as stack:
        for one in stored:
            if one.tensor is not None:
                tensors.append(one.tensor)
                continue
            if one.file not in files:
                if _stamp(one.file) != one.stamp:
                    raise InputError(f"{one.file} was changed while it was read")
                files[one.file] = stack.enter_context(safetensors.safe_open(one.file, "pt"))
            tensors.append(files[one.file].get_tensor(one.name))
    return tensors


class _Store:
    """Takes changed parameters, into memory or scratch files, in the fewest bytes that hold them exactly."""

    def __init__(self, *, in_files: bool) -> None:
        self.folder = LargeScratch("weights") if in_files else None
        self._count = 0

    def write(self, tensors: Mapping[str, torch.Tensor], *, narrowed: bool = True) -> dict[str, _Stored]:
        """Store tensors; name -> where each is now."""
        stored = {name: _narrowed(t.detach()) if narrowed else t for name, t in tensors.items()}
        if self.folder is None or not stored:
            return {name: _Stored(tensor) for name, tensor in stored.items()}
        self._count += 1
        file = self.folder.path / f"{self._count}.safetensors"
        with no_space_as_input_error(file):
            safetensors.torch.save_file(stored, file)
        return _in_file(file, stored, _ScratchFile(file, self.folder))


def _narrowed(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the fewest bytes that hold it exactly."""
    for dtype in NARROW.values():
        narrow = tensor.to(dtype)
        if torch.equal(narrow.to(tensor.dtype), tensor):
            return narrow.contiguous()
    return tensor.contiguous()


class _Unit:
    """Modules whose weights come and go together: one, or two that share a parameter."""

    def __init__(self, modules: Iterable[nn.Module], stored: Mapping[int, _Stored], store: _Store) -> None:
        self._modules = tuple(
            map(ref, modules)
        )  # a unit lives as long as its modules, not the other way round
        self.store, self.users, self.calls = store, 0, 0
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
        _Unit(modules, stored, self.store)

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
        parameters = {str(number): p for number, p in enumerate(self._parameters())}
        kept = {name: self._unchanged(p) for name, p in parameters.items()}
        written = self.store.write({name: p for name, p in parameters.items() if kept[name] is None})
        stored = {name: one or written[name] for name, one in kept.items()}
        with torch.inference_mode(False), torch.no_grad():
            for parameter, tensor in zip(parameters.values(), _offloaded(list(stored.values())), strict=True):
                parameter.data = tensor
        self._known = {id(p): (p, stored[name], p._version) for name, p in parameters.items()}


_UNIT, _MARK, _TABLE = "_offload_unit", "reads_no_weights", "_offload_table"


def _unit_of(module: nn.Module) -> _Unit | None:
    unit: _Unit | None = vars(module).get(_UNIT)
    return unit


def _units_of(model: nn.Module) -> list[_Unit]:
    units = (unit for module in model.modules() if (unit := _unit_of(module)))
    return list(dict.fromkeys(units))


def is_paged(model: Any) -> bool:
    """Whether a model is offloaded: its weights stay in files, or in memory in 16 bits."""
    return any(_unit_of(layer) for layer in decoder_layers(model))


def computing_dtype(model: Any) -> torch.dtype:
    """Of a model's hidden states."""
    dtype: torch.dtype = torch.float32 if is_paged(model) else model.dtype
    return dtype


@contextmanager
def at_hand(*modules: nn.Module) -> Iterator[None]:
    """Have modules' weights in memory while the context is open, and not only for the time of a call."""
    with ExitStack() as stack:
        for unit in map(_unit_of, modules):
            if unit is not None:
                unit.take()
                stack.callback(unit.give_back)
        yield


def let_go(model: nn.Module) -> None:
    """Let what was read of an offloaded model's weights go, if it was read outside `at_hand`."""
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
    """A model in eval mode whose weights stay in files.

    Raises:
        InputError: A file is damaged, or tensors are missing, unknown, or of the wrong shape.
    """
    weights: dict[str, torch.Tensor] = {}
    stored: dict[str, _Stored] = {}
    for file in map(Path.resolve, files):
        with as_input_error(f"{file} is damaged or cut short"), safetensors.safe_open(file, "pt") as opened:
            inside = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        weights, stored = weights | inside, stored | _in_file(file, inside)
    dtype = next(iter(weights.values())).dtype
    model = model_from_weights(config, weights, dtype=dtype, where=where, cls=cls)
    give_back_large_tensors()
    return _offload(model, stored, _Store(in_files=True))


def offloaded_copy(
    config: Any, weights: Iterable[tuple[str, torch.Tensor]], n_weights: int, *, where: str
) -> Any:
    """A model in eval mode whose weights are in scratch files, one for each as it comes.

    Raises:
        InputError: No room for them; or they are missing, unknown, or of the wrong shape.
    """
    require_scratch(scratch_bytes(n_weights))
    store = _Store(in_files=True)
    stored: dict[str, _Stored] = {}
    for name, tensor in weights:
        stored |= store.write({name: tensor}, narrowed=False)
    mapped = {name: _offloaded([one])[0] for name, one in stored.items()}
    model = model_from_weights(config, mapped, dtype=torch.float32, where=where)
    give_back_large_tensors()
    return _offload(model, stored, store)


def held_model(model: Any) -> Any:
    """A model in eval mode, on its device, whose weights stay in memory in the 16 bits that they are in.

    Raises:
        InputError: Something that is computed from its configuration is in 16 bits, too.
    """
    stored = {name: _Stored(parameter.detach()) for name, parameter in model.named_parameters()}
    return _offload(model, stored, _Store(in_files=False))


def _offload(model: Any, stored: Mapping[str, _Stored], store: _Store) -> Any:
    """Have the weights of a model, all of them put away, come and go unit by unit."""
    layers = list(decoder_layers(model))
    known: dict[int, _Stored] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in stored:  # of one with two names the first is the embedding, which is what both are
            known.setdefault(id(parameter), stored[name])
    _widen_buffers(model)
    ends = tuple(dict.fromkeys((model.get_input_embeddings(), model.get_output_embeddings())))
    inside = {id(module) for layer in layers for module in layer.modules()} | set(map(id, ends))
    others = [module for module in model.modules() if id(module) not in inside and module._parameters]
    is_tied = len({id(end.weight) for end in ends}) == 1
    for modules in (*([ends] if is_tied else zip(ends)), *zip((*layers, *others))):
        _Unit(modules, known, store)
        for module in modules:
            is_table = isinstance(module, nn.Embedding) and module not in ends
            before, after = (_take_rows, _put_rows_back) if is_table else (_before, _after)
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after, always_call=True)
    return model


_COMPUTED: Mapping[str, Callable[[Any, Any], float]] = MappingProxyType(
    {
        "embed_scale": lambda module, config: getattr(module, "scalar_embed_scale", config.hidden_size**0.5),
        "router_input_scale": lambda _, config: config.hidden_size**-1.0,
        "per_layer_projection_scale": lambda _, config: config.hidden_size**-0.5,
        "per_layer_input_scale": lambda *_: 2**-0.5,
    }
)
"""Name of a number that transformers computes from the configuration, in the weights' dtype -> what it is."""


def _widen_buffers(model: Any) -> None:
    """Make float32 what is no parameter: what is stored as it is, and what is computed as float32 has it.

    Raises:
        InputError: Something that is not known.
    """
    stored = model.state_dict().keys()
    for prefix, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if not buffer.is_floating_point() or buffer.dtype == torch.float32:
                continue
            name = f"{prefix}.{key}"
            if name in stored:
                setattr(module, key, buffer.float())
            elif key in _COMPUTED:
                value = _COMPUTED[key](module, model.config)
                setattr(module, key, torch.tensor(value, dtype=torch.float32, device=buffer.device))
            else:
                raise InputError(
                    "a model with this buffer cannot be read block by block", field=name, value=buffer.dtype
                )


def _before(module: nn.Module, _: Any) -> None:
    unit = _unit_of(module)
    if unit is not None and not getattr(vars(module).get("forward"), _MARK, False):
        unit.take()
        unit.calls += 1


def _after(module: nn.Module, _: Any, __: Any) -> None:
    unit = _unit_of(module)
    if unit is not None and unit.calls:  # torch calls it, too, where something before us has failed
        unit.calls -= 1
        unit.give_back()


def _take_rows(module: nn.Embedding, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
    """Let an embedding of which nothing is in memory have the rows of the tokens that it is called with."""
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


_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def weightless(forward: _Forward) -> _Forward:
    """Say of a function that takes the place of a module's `forward` that it reads none of its weights."""
    setattr(forward, _MARK, True)
    return forward


def scratch_bytes(n_weights: int) -> int:
    """Of weights that may be changed in scratch files: four bytes each, whatever they were stored in."""
    return n_weights * torch.float32.itemsize


def may_keep_states(n_bytes: int, n_weights: int, beside: int = 0) -> bool:
    """Whether hidden states may be kept in scratch files that are of use but need not be there.

    Args:
        n_bytes: Of the states that a process keeps; as much again must be left.
        n_weights: Of the model, which each process may change in such files meanwhile.
        beside: Bytes of other scratch files of each.
    """
    needed = 2 * n_bytes + scratch_bytes(n_weights) + beside
    return count() * needed <= shutil.disk_usage(large_temporary()).free


def check_scratch(model: Any) -> None:
    """Raise InputError if a model in files is to be changed and scratch files have no room for its weights."""
    if any(unit.store.folder for unit in _units_of(model)):
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
