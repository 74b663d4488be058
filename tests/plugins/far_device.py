"""A device that is not there: tensors with real numbers that say they are elsewhere, and refuse what a GPU refuses.

Inside `far_device()` a tensor that is sent to `FAR` becomes one that computes on the CPU and mixes with no tensor of
the CPU but numbers and indices, which CUDA takes from there, too. It has no `.numpy()`. So a whole run shows whether
code that is meant for a GPU would run there, and gives the same bits as on the CPU where the operations are the same.
A device without float64 refuses it as MPS does, so what would end there ends here.

`FAR` is torch's meta device, the only one without numbers of its own that every build knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from cfsp import devices

FAR, _NEAR = torch.device("meta"), torch.device("cpu")
_MOVES, _INDEXES = ("_to_copy", "to.", "copy_"), ("index.", "index_put")


class FarTensor(torch.Tensor):
    """A tensor that is elsewhere; `near` holds its numbers."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> FarTensor:
        if near.dtype == torch.float64 and FAR.type in devices.WITHOUT_FLOAT64:
            raise TypeError("the device has no float64")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            layout=near.layout,
            device=FAR,
            requires_grad=near.requires_grad,
        )
        made.near = near
        return made

    def __repr__(self, **options: Any) -> str:
        return f"FarTensor({self.near})"

    def item(self) -> Any:
        return self.near.item()

    def tolist(self) -> Any:
        return self.near.tolist()

    def __float__(self) -> float:
        return float(self.near)

    def __int__(self) -> int:
        return int(self.near)

    def __bool__(self) -> bool:
        return bool(self.near)

    def __index__(self) -> int:
        return self.near.__index__()

    @property
    def data(self) -> Any:  # a device's own tensors take their numbers along
        return self.detach()

    @data.setter
    def data(self, tensor: Any) -> None:
        torch.Tensor.data.__set__(self, tensor)  # type: ignore[attr-defined]
        self.near = tensor.near

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


@contextmanager
def far_device(*, float64: bool = True) -> Iterator[torch.device]:
    """`FAR` is a device while the context is open, which has float64 or, like Apple's MPS, has none."""
    with ExitStack() as stack:
        if not float64:
            stack.enter_context(patch.object(devices, "WITHOUT_FLOAT64", frozenset({FAR.type})))
        stack.enter_context(patch.object(torch, "Generator", _Generator))
        stack.enter_context(_Functions())
        stack.enter_context(_Dispatch())
        yield FAR


def send(model: Any) -> Any:
    """A model on `FAR`; tied parameters stay one, as they do on the way to a GPU."""
    model.to(FAR)
    model.tie_weights()
    return model


def brought(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's numbers."""
    return tensor.near if isinstance(tensor, FarTensor) else tensor


def _run(function: Any, args: Any, kwargs: Any) -> Any:
    tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)]
    far = [each for each in tensors if isinstance(each, FarTensor)]
    named = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.device)]
    target = named[0] if named else FAR if far else _NEAR
    name = function.__name__
    if far and not name.startswith((*_MOVES, *_INDEXES)):
        near = [each for each in tensors if not isinstance(each, FarTensor) and each.dim()]
        if near:
            raise RuntimeError(f"{function}: tensors on two devices, {tuple(near[0].shape)} on the CPU")
    if name.startswith(_INDEXES) and far and not isinstance(args[0], FarTensor):
        raise RuntimeError(f"{function}: an index elsewhere")

    def near_of(each: Any) -> Any:
        return (
            _NEAR
            if isinstance(each, torch.device)
            else brought(each)
            if isinstance(each, FarTensor)
            else each
        )

    result = function(*tree_map(near_of, args), **tree_map(near_of, kwargs))
    if name.startswith("copy_"):
        return args[0]
    if target.type == _NEAR.type:
        return result
    same = {id(each.near): each for each in far}  # what is changed in place is the tensor that it was

    def far_of(each: Any) -> Any:
        if not isinstance(each, torch.Tensor):
            return each
        return same[id(each)] if id(each) in same else FarTensor(each)

    return tree_map(far_of, result)


class _Generator(torch.Generator):
    """Random numbers are drawn on the CPU."""

    def __new__(cls, device: Any = None) -> _Generator:
        return super().__new__(cls)


class _Dispatch(TorchDispatchMode):
    """What makes tensors, or sends them."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What torch does before anything is dispatched: there a meta tensor has no numbers."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and str(kwargs.get("device")) == FAR.type:
            return function(*args, **(kwargs | {"device": _NEAR})).to(FAR)
        far = bool(args) and isinstance(args[0], FarTensor)
        if far and function is torch.Tensor.new_tensor:
            return torch.tensor(args[1], dtype=args[0].dtype).to(FAR)
        if far and function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            lists = tuple(torch.tensor(each) if isinstance(each, list) else each for each in index)
            args = (args[0], lists, *args[2:])
        return function(*args, **kwargs)
