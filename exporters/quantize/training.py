"""Training what few bits leave free, which costs nothing at run time: the scales of rows or blocks, and norms.

`tune_scales` distils a model into the scales of its rows and norms: what all errors do together only shows in the
logits (Chen et al., EfficientQAT, arXiv 2407.11062; Li et al., Norm Tweaking, arXiv 2309.02784). `RoundedModel` lets
recovery train the scale of every block (QAT): the codes stay, so the trained file has as many bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from cfsp.models.architectures import capped, logit_cap, spec_for
from cfsp.models.checkpoint import RoundedFormat, RoundedNumbers
from cfsp.models.weights import sha256_tensors
from cfsp.precision import bulk_products, products_in
from cfsp.progress import Progress, no_progress
from cfsp.recovery.losses import LossAndGradient, distillation_loss, head_loss, of_capped
from exporters.quantize import Placed

_WARM_UP = 4  # steps in which the learning rate rises; there is one a window


class TunedScales(NamedTuple):
    """What training leaves."""

    rows: Mapping[str, torch.Tensor]  # module -> what the rows of its weight are multiplied by, (rows,)
    norms: Mapping[str, torch.Tensor]  # parameter -> the weight of a norm


def tune_scales(
    model: Any,
    stored: Mapping[str, torch.Tensor],
    head: torch.Tensor,
    table: torch.Tensor,
    input_ids: torch.Tensor,
    learning_rate: float,
    *,
    progress: Progress = no_progress,
) -> TunedScales:
    """Train a factor of each row and norm, a step a window (nsamples, seqlen), on the KL divergence from the model.

    `stored` are weights of Linears (out_features, in_features) as a file has them; `head` and `table`, the output
    matrix and the token embedding, stay. The model, float32, is unchanged; the learning rate is Adam's at its peak.
    """
    decoder, dense = model.get_decoder(), model.get_output_embeddings().weight.detach()
    prefix = next(f"{name}." for name, module in model.named_modules() if module is decoder)
    given = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    input_ids = input_ids.to(dense.device)

    def last_hidden(weights: Mapping[str, torch.Tensor], window: torch.Tensor) -> torch.Tensor:
        """The output matrix's inputs (seqlen, hidden_size), with these weights in the decoder's place."""
        with bulk_products(window.device.type):
            arguments = {"input_ids": window[None], "use_cache": False}
            output = functional_call(decoder, dict(weights), kwargs=arguments)
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    targets = [last_hidden(given, window) for window in input_ids]
    weights = given | {f"{name.removeprefix(prefix)}.weight": weight for name, weight in stored.items()}
    weights |= {"embed_tokens.weight": table}
    norms = {name: weight for name, weight in given.items() if name.endswith("norm.weight")}
    offset, cap = spec_for(model.config).norm_offset, logit_cap(model.config)

    def scaled_norm(weight: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        return (weight + offset) * factors - offset if offset else weight * factors

    def divergence(target: torch.Tensor, logits: torch.Tensor, positions: slice) -> LossAndGradient:
        return distillation_loss(logits, capped(F.linear(target[positions], dense), cap))

    of_rows = {
        name: torch.ones(len(weight), device=dense.device, requires_grad=True)
        for name, weight in stored.items()
    }
    of_norms = {name: torch.ones_like(norm, requires_grad=True) for name, norm in norms.items()}
    optimizer = torch.optim.Adam([*of_rows.values(), *of_norms.values()])

    def scale(rows: torch.Tensor, linear: nn.Linear, _: Any, y: torch.Tensor) -> torch.Tensor:
        return y * rows if linear.bias is None else (y - linear.bias) * rows + linear.bias

    with ExitStack() as stack, torch.enable_grad():
        for name, rows in of_rows.items():
            hook = model.get_submodule(name).register_forward_hook(partial(scale, rows))
            stack.callback(hook.remove)
        for done, (window, target) in enumerate(zip(input_ids, targets, strict=True)):
            tuned = {name: scaled_norm(norm, of_norms[name]) for name, norm in norms.items()}
            hidden = last_hidden(weights | tuned, window)
            optimizer.zero_grad()
            with products_in("auto", dense.device.type):
                loss = head_loss(hidden, head, of_capped(partial(divergence, target), cap))
            with bulk_products(dense.device.type):
                torch.autograd.backward(loss / len(window))
            for group in optimizer.param_groups:  # a line down to zero
                group["lr"] = learning_rate * min(1, (done + 1) / _WARM_UP) * (1 - done / len(input_ids))
            optimizer.step()
            progress("tuning scales", done + 1, len(input_ids))
    return TunedScales(
        rows={name: rows.detach().cpu() for name, rows in of_rows.items()},
        norms={
            f"{prefix}{name}": scaled_norm(norm, of_norms[name].detach()).cpu()
            for name, norm in norms.items()
        },
    )


class ScaledBlocks(nn.Module):
    """A weight (rows, columns) whose blocks of neighbouring columns are each multiplied by a factor of its own."""

    def __init__(self, rows: int, columns: int, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        # By how much factors differ from 1: what weight decay draws to zero.
        self.changes = nn.Parameter(torch.zeros(rows, -(-columns // block_size)))

    def forward(self, stored: torch.Tensor) -> torch.Tensor:
        """The weight as it is then."""
        spread = (1 + self.changes).repeat_interleave(self.block_size, 1)[:, : stored.shape[1]]
        return stored * spread


@dataclass(frozen=True)
class RoundedModel:
    """See `cfsp.recovery.rounding.RoundedModel`; `placed` are the file's matrices, by their names there."""

    format: RoundedFormat
    placed: Mapping[str, Placed]

    @property
    def sha256(self) -> str:
        """Hash of all matrices."""
        return sha256_tensors(self._tensors().items())

    def attach(self, model: Any) -> None:
        """Give the model the file's weights; let norms and the scales of blocks be trained, and nothing else."""
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name, parameter in model.get_decoder().named_parameters():
            if name.endswith("norm.weight"):
                parameter.requires_grad_(True)
        self._hold(model)
        for placed in self.placed.values():
            for name in placed.modules:
                module = model.get_submodule(name)
                rows, columns = module.weight.shape
                blocks = ScaledBlocks(rows, columns, placed.block_size)
                parametrize.register_parametrization(module, "weight", blocks)

    def finish(self, model: Any) -> RoundedNumbers:
        """Leave the trained weights as a file will hold them, in plain modules, and return its numbers."""
        trained = {}
        for name, placed in self.placed.items():
            modules: list[Any] = [model.get_submodule(module) for module in placed.modules]
            factors = [(1 + m.parametrizations.weight[0].changes).detach().float().cpu() for m in modules]
            matrix = placed.matrix.scaled(placed.stack(factors)) if factors else placed.matrix
            trained[name] = placed._replace(matrix=matrix)
            for module in modules:
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        left = replace(self, placed=trained)
        left._hold(model)
        return RoundedNumbers(self.format, left._tensors())

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}{end}": tensor.contiguous()
            for name, placed in self.placed.items()
            for end, tensor in placed.matrix.pack().items()
        }

    @torch.no_grad()
    def _hold(self, model: Any) -> None:
        """Give the model what is stored."""
        for placed in self.placed.values():
            placed.hold(model, placed.matrix.dequantize())
