"""Models that are not in memory as float32: a module's weights are, only while something computes with them.

A block is a page, and so is every module outside the blocks that has weights of its own: the embedding, the last norm,
the output matrix. Their parameters are mapped files, read when they are looked at, or tensors of 16 bits. When a module
is called, or `at_hand`, they are float32 tensors in memory; afterwards they are put away again, which lets what was
read go, and what was changed meanwhile is written to a scratch file, or kept in memory, in as few bytes as hold it
exactly. Of a further table of tokens, which may be larger than all blocks, a call has the rows of its tokens. So a
model is never in memory as float32 whole, and everything that runs it block after block computes the same bits as with
a model that is.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import safetensors
import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.memory import give_back_large_tensors
from cfsp.models.architectures import decoder_layers
from cfsp.models.homes import Home, InFile, InMemory, Memory, Reading, Scratch, Store
from cfsp.models.weights import model_from_weights
from cfsp.reading import as_input_error


@dataclass(frozen=True)
class _Handed:
    """A parameter as it was put into a module.

    Attributes:
        home: Where its values are; None where in memory alone.
        parameter: The object.
        version: torch's count of what was done to it in place.
    """

    home: Home | None
    parameter: nn.Parameter
    version: int

    def is_untouched(self, parameter: nn.Parameter) -> bool:
        """Whether a module's parameter is still this one, with the values that it had."""
        return parameter is self.parameter and parameter._version == self.version


class _Page:
    """Modules whose weights come and go together.

    Args:
        modules: One, or two that share a parameter.
        homes: id of a parameter -> where it is.
        store: For what is changed.
    """

    def __init__(self, modules: tuple[nn.Module, ...], homes: Mapping[int, Home], store: Store) -> None:
        # Not the modules themselves: the page lives as long as they do, not the other way round.
        self._modules, self.store, self._users = tuple(map(ref, modules)), store, 0
        self.calls = 0
        self._handed: dict[str, _Handed] = {}
        for name, (owner, key) in self._places().items():
            parameter = owner._parameters[key]
            self._handed[name] = _Handed(homes.get(id(parameter)), parameter, parameter._version)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Its modules that are still there."""
        return tuple(module for known in self._modules if (module := known()) is not None)

    def of_copies(self, modules: tuple[nn.Module, ...]) -> _Page:
        """The page of copies of its modules, which share their parameters."""
        if self._users:
            raise RuntimeError("a model whose weights are at hand is not copied: they would be shared")
        homes, places = self._homes(), self._places()
        known = {id(owner._parameters[key]): homes[name] for name, (owner, key) in places.items()}
        return _Page(modules, {number: home for number, home in known.items() if home}, self.store)

    @property
    def is_at_hand(self) -> bool:
        """Whether someone has the weights in memory."""
        return self._users > 0

    def take(self) -> None:
        """Have the weights in memory, as float32; what stood for them goes with the parameters that were there."""
        if not self._users:
            self._replace(
                self._homes(),
                lambda home, stood: home.at_hand(stood.detach()) if home else stood.detach().float(),
            )
        self._users += 1

    def give_back(self) -> None:
        """Let them go, unless someone else has them still."""
        self._users -= 1
        if not self._users:
            self.let_go()

    def emptied(self) -> dict[int, tuple[nn.Parameter, Home]]:
        """Put parameters without memory in the place of all, and tell id -> each of them, and where its values are."""
        homes = self._homes()
        self._replace(homes, lambda _, parameter: torch.zeros(()).expand(parameter.shape))
        return {id(h.parameter): (h.parameter, h.home) for h in self._handed.values() if h.home is not None}

    def let_go(self) -> None:
        """Put every parameter away; those that were changed are stored now."""
        homes, places = self._homes(), self._places()
        changed = {name: place for name, place in places.items() if homes[name] is None}
        homes |= self.store.write({name: owner._parameters[key] for name, (owner, key) in changed.items()})
        with Reading() as reading:

            def put_away(home: Home | None, _: nn.Parameter) -> torch.Tensor:
                assert home is not None
                return home.put_away(reading)

            self._replace(homes, put_away)

    def _homes(self) -> dict[str, Home | None]:
        """Where each parameter is; None of one that was changed since it was handed out."""
        homes: dict[str, Home | None] = {}
        for name, (owner, key) in self._places().items():
            handed = self._handed.get(name)
            untouched = handed is not None and handed.is_untouched(owner._parameters[key])
            homes[name] = handed.home if handed is not None and untouched else None
        return homes

    def _replace(
        self,
        homes: Mapping[str, Home | None],
        make: Callable[[Home | None, nn.Parameter], torch.Tensor],
    ) -> None:
        """Put other parameters in the place of all, one for those that are one."""
        made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # what was there keeps its id for as long
        self._handed = {}
        # Weights made in inference mode could not say whether they were changed.
        with torch.inference_mode(False), torch.no_grad():
            for name, (owner, key) in self._places().items():
                before = owner._parameters[key]
                if id(before) not in made:
                    after = nn.Parameter(make(homes[name], before), requires_grad=before.requires_grad)
                    made[id(before)] = before, after
                owner._parameters[key] = after = made[id(before)][1]
                self._handed[name] = _Handed(homes[name], after, after._version)

    def _places(self) -> dict[str, tuple[Any, str]]:
        """Name of a parameter -> the module that has it, and its name there; of one in two places, both."""
        return {
            f"{number}.{prefix}.{key}": (owner, key)
            for number, module in enumerate(self.modules)
            for prefix, owner in module.named_modules()
            for key, parameter in owner._parameters.items()
            if parameter is not None
        }


_Forward = TypeVar("_Forward", bound=Callable[..., Any])
_PAGES: WeakKeyDictionary[nn.Module, _Page] = WeakKeyDictionary()


def is_paged(model: Any) -> bool:
    """Whether a model's weights come and go block by block: they stay in files, or in memory in 16 bits."""
    return any(layer in _PAGES for layer in decoder_layers(model))


def computing_dtype(model: Any) -> torch.dtype:
    """Of a model's hidden states."""
    dtype: torch.dtype = torch.float32 if is_paged(model) else model.dtype
    return dtype


@contextmanager
def at_hand(*modules: nn.Module) -> Iterator[None]:
    """Have modules' weights in memory while the context is open, and not only for the time of a call.

    Nothing is to be done for a model that is in memory whole.
    """
    pages = [page for module in modules if (page := _PAGES.get(module)) is not None]
    with ExitStack() as stack:
        for page in pages:
            page.take()
            stack.callback(page.give_back)
        yield


def let_go(model: nn.Module) -> None:
    """Let what was read of a paged model's weights go, where it was read outside `at_hand`."""
    for page in _pages_of(model):
        page.let_go()


def parts(model: Any) -> Iterator[nn.Module]:
    """Modules that have all weights between them, each `at_hand` alone; of a model in memory the model."""
    pages = _pages_of(model)
    yield from (page.modules[0] for page in pages)
    if not pages:
        yield model


def emptied(model: Any) -> Callable[[nn.Module], None]:
    """Take the weights of an unchanged paged model away, for whoever brings each of them to stay.

    Its parameters are float32 then and take no memory; nothing comes and goes any more. Of a model that is in memory
    nothing is changed.

    Returns:
        Told a module of the model: its weights are in memory afterwards, float32, in the parameters that it has.
    """
    homes: dict[int, tuple[nn.Parameter, Home]] = {}
    for page in _pages_of(model):
        homes |= page.emptied()
    for module in model.modules():
        _PAGES.pop(module, None)

    def bring(module: nn.Module) -> None:
        for parameter in module.parameters():
            if id(parameter) in homes:
                _, home = homes.pop(id(parameter))
                with Reading() as reading:
                    parameter.data = home.at_hand(home.put_away(reading))

    return bring


def copied(model: Any) -> Any:
    """A deep copy of a model; one that is paged shares the files, and what was not changed in them."""
    if not is_paged(model):
        return copy.deepcopy(model)
    gc.collect()  # what the last copy has changed, which is not needed any more, goes from the disk
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    twins = dict(zip(model.modules(), twin.modules(), strict=True))
    for page in _pages_of(model):
        _register(page.of_copies(tuple(twins[module] for module in page.modules)))
    return twin


def check_scratch(model: Any) -> None:
    """Refuse to change a model in files where the folder for temporary files has no room for all of its weights.

    Raises:
        InputError: So much is not free there.
    """
    for page in _pages_of(model)[:1]:  # all of a model have one store
        page.store.require(sum(parameter.numel() for parameter in model.parameters()))


def paged_model(config: Any, files: Sequence[Path], *, where: str, cls: Any = None) -> Any:
    """A model in eval mode whose weights stay in files.

    Args:
        config: transformers configuration.
        files: safetensors files, which hold all of its weights in one dtype.
        where: Folder named in errors.
        cls: Model class; transformers' own for the configuration unless given.

    Raises:
        InputError: A file is damaged, or tensors are missing, unknown, or of the wrong shape.
    """
    weights: dict[str, torch.Tensor] = {}
    homes: dict[str, InFile] = {}
    for file in map(Path.resolve, files):
        with as_input_error(f"{file} is damaged or cut short"), safetensors.safe_open(file, "pt") as opened:
            inside = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        weights, homes = weights | inside, homes | InFile.of(file, inside)
    dtype = next(iter(weights.values())).dtype
    model = model_from_weights(config, weights, dtype=dtype, where=where, cls=cls)
    give_back_large_tensors()
    return _paged(model, homes, Scratch())


def paged_copy(
    config: Any, weights: Iterable[tuple[str, torch.Tensor]], n_weights: int, *, where: str
) -> Any:
    """A model in eval mode whose weights are in scratch files, one for each as it comes.

    Args:
        config: transformers configuration.
        weights: Parameter names and tensors, float32; no two are in memory.
        n_weights: All numbers in them.
        where: File named in errors.

    Raises:
        InputError: No room for them; or they are missing, unknown, or of the wrong shape.
    """
    scratch = Scratch()
    scratch.require(n_weights)
    homes: dict[str, InFile] = {}
    for name, tensor in weights:
        homes |= scratch.write({name: tensor}, narrowed=False)
    mapped = {}
    for name, home in homes.items():
        with home.open() as opened:
            mapped[name] = opened.get_tensor(name)
    model = model_from_weights(config, mapped, dtype=torch.float32, where=where)
    give_back_large_tensors()
    return _paged(model, homes, scratch)


def held_model(model: Any) -> Any:
    """A model whose weights are in memory in 16 bits, and float32 while they are at hand.

    Args:
        model: In eval mode, on its device, of bfloat16 or float16.

    Raises:
        InputError: Something that is computed from its configuration is of that, too.
    """
    homes = {name: InMemory(parameter.detach()) for name, parameter in model.named_parameters()}
    return _paged(model, homes, Memory())


def _paged(model: Any, homes: Mapping[str, Home], store: Store) -> Any:
    """Have the weights of a model, all of them put away, come and go page by page."""
    layers = list(decoder_layers(model))
    known: dict[int, Home] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in homes:  # of one with two names the first is the embedding, which is what both are
            known.setdefault(id(parameter), homes[name])
    _widen_buffers(model)
    ends = tuple(dict.fromkeys((model.get_input_embeddings(), model.get_output_embeddings())))
    inside = {id(module) for layer in layers for module in layer.modules()} | set(map(id, ends))
    others = [module for module in model.modules() if id(module) not in inside and module._parameters]
    is_tied = len({id(end.weight) for end in ends}) == 1
    for modules in (*([ends] if is_tied else zip(ends)), *zip((*layers, *others))):
        _register(_Page(modules, known, store))
        for module in modules:
            is_table = isinstance(module, nn.Embedding) and module not in ends
            before, after = (_take_rows, _put_back) if is_table else (_before, _after)
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


def _register(page: _Page) -> None:
    for module in page.modules:
        _PAGES[module] = page


def _pages_of(model: nn.Module) -> list[_Page]:
    pages = (page for module in model.modules() if (page := _PAGES.get(module)))
    return list({id(page): page for page in pages}.values())


def _before(module: nn.Module, _: Any) -> None:
    page = _PAGES.get(module)
    if page is not None and not getattr(vars(module).get("forward"), _MARK, False):
        page.take()
        page.calls += 1


def _after(module: nn.Module, _: Any, __: Any) -> None:
    page = _PAGES.get(module)
    if page is not None and page.calls:  # torch calls it, too, where something before us has failed
        page.calls -= 1
        page.give_back()


_TABLES: WeakKeyDictionary[nn.Module, nn.Parameter] = WeakKeyDictionary()
"""Embeddings that have some of their rows now -> the parameter with all of them."""


def _take_rows(module: nn.Embedding, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
    """Let an embedding of which nothing is at hand have the rows of the tokens that it is called with."""
    page = _PAGES.get(module)
    if page is None or page.is_at_hand:
        return None
    (ids,) = arguments
    known = (
        0 if module.padding_idx is None else module.padding_idx + 1
    )  # torch has the padding token's row be there
    needed = torch.cat([ids.flatten(), torch.arange(known, device=ids.device)])
    rows, places = torch.unique(needed, return_inverse=True)
    table = module._parameters["weight"]
    assert table is not None
    _TABLES[module] = table
    module._parameters["weight"] = nn.Parameter(table.detach()[rows].float(), requires_grad=False)
    return (places[: ids.numel()].view(ids.shape),)


def _put_back(module: nn.Module, _: Any, __: Any) -> None:
    table = _TABLES.pop(module, None)
    if table is not None:
        module._parameters["weight"] = table


_MARK = "reads_no_weights"


def weightless(forward: _Forward) -> _Forward:
    """Say of a function that takes the place of a module's `forward` that it reads none of its weights."""
    setattr(forward, _MARK, True)
    return forward
