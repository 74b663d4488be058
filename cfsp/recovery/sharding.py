"""Weights that several processes share out: each keeps a part of every matrix, of its gradient and of its moments.

torch's FSDP (`fully_shard`): a block is whole in a process only while it computes with it, and what is outside the
blocks, embedding, last norm and output matrix, from the beginning of a pass to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from cfsp.models.architectures import decoder_layers
from cfsp.models.weights import cast_weights


def shard_out(
    root: nn.Module,
    model: Any,
    bring: Callable[[nn.Module], None],
    device: torch.device,
    *,
    dtype: torch.dtype,
    products: torch.dtype,
    methods: Sequence[str] = (),
) -> None:
    """Leave this process a part of every weight, block by block.

    Args:
        root: What is called, with the model in it; no block of a model is called outside of that.
        model: A causal LM.
        bring: Told a module before its weights are read.
        device: Where the parts are kept.
        dtype: What they are kept in.
        products: What a block's matrices are multiplied in, and come together in; vectors come as they are kept, as no
            product rounds them, with what is in a module that has some itself.
        methods: Of the root, which are called beside its forward pass.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    # Not inputs: what is added up between the blocks stays float32, as it does where every process has all weights.
    policy = MixedPrecisionPolicy(param_dtype=products, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in decoder_layers(model):
        bring(layer)
        cast_weights(layer, dtype)
        for module in _vector_modules(layer) if products != dtype else ():
            fully_shard(module, mesh=mesh)
        if not is_sharded(layer):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    bring(root)
    cast_weights(root, dtype)
    fully_shard(root, mesh=mesh)
    for name in methods:  # have it whole while they run, as it is in its forward pass
        register_fsdp_forward_method(root, name)


def _vector_modules(layer: nn.Module) -> Iterator[nn.Module]:
    """What has vectors of its own, such as norms, the innermost first; of a linear attention all that is in it."""
    for module in reversed(list(layer.modules())):
        if {parameter.dim() for parameter in module.parameters(recurse=False)} == {1}:
            yield module


def is_sharded(module: nn.Module) -> bool:
    """Whether this process has a part of its weights."""
    return isinstance(module, FSDPModule)


def put_back(module: nn.Module) -> None:
    """Leave a part of what the last call of a sharded module has left whole."""
    if isinstance(module, FSDPModule):
        module.reshard()


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's values on the CPU; all processes ask for those of a sharded one."""
    values = parameter.detach()
    return (values.full_tensor() if isinstance(values, DTensor) else values).cpu()


@torch.no_grad()
def give(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Give a parameter values, or this process's part of it."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(values)
        return
    mesh = parameter.device_mesh
    chunks = values.chunk(mesh.size())
    number = mesh.get_local_rank()
    parameter.to_local().copy_(chunks[number] if number < len(chunks) else values[:0])


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_state(optimizer: Any) -> dict[str, Any]:
    """An optimizer's state dict, with this process's part of every tensor."""
    stored: dict[str, Any] = optimizer.state_dict()
    state = {
        index: {key: own_part(value) for key, value in of_one.items()}
        for index, of_one in stored["state"].items()
    }
    return stored | {"state": state}


def load_own_state(optimizer: Any, stored: Mapping[str, Any]) -> None:
    """Give an optimizer of sharded parameters what `own_state` told of it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {key: _of_part(value, parameters[index]) for key, value in of_one.items()}
        for index, of_one in stored["state"].items()
    }
    optimizer.load_state_dict(dict(stored) | {"state": state})


def _of_part(part: Any, parameter: Any) -> Any:
    """The tensor as large as a parameter that has a part; counts of steps are no such tensors."""
    if not part.dim():
        return part
    part = part.to(parameter.device)
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """That this process holds of tensors."""
    return sum(own_part(tensor).numel() * tensor.dtype.itemsize for tensor in tensors)
