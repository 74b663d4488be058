"""Distilling a model into the scales and norms of its quantized self, which cost nothing more at run time.

Rounding makes each layer's own error small; what the errors of all layers do together shows in the logits alone. So a
factor for the scales of each row, and one for each number of the norms, is trained end to end on the KL divergence from
the model as it was, while the stored numbers stay (Chen et al., EfficientQAT, arXiv 2407.11062, train scales so; Li et
al., Norm Tweaking, arXiv 2309.02784, norms).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from cfsp.models.architectures import capped, logit_cap, spec_for
from cfsp.precision import bulk_products, products_in
from cfsp.progress import Progress, no_progress
from cfsp.recovery.losses import LossAndGradient, distillation_loss, head_loss, of_capped

_WARM_UP = 4
"""Steps in which the learning rate rises; there is one a window."""


@dataclass(frozen=True)
class TunedScales:
    """What training leaves.

    Attributes:
        rows: Module -> what the rows of its weight are multiplied by, (rows,).
        norms: Parameter name -> the weight of a norm.
    """

    rows: Mapping[str, torch.Tensor]
    norms: Mapping[str, torch.Tensor]


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
    """Train the factors, one step a window; the output matrix stays, as a tied one is looked up too.

    Args:
        model: A causal LM of the architecture table, float32; unchanged.
        stored: Linear of the blocks -> its weight as it is stored (out_features, in_features); others stay.
        head: The output matrix as it is stored, (vocab_size, hidden_size).
        table: The token embedding likewise; the same where they are tied.
        input_ids: Text, (nsamples, seqlen).
        learning_rate: Adam's, at its peak.
        progress: Told after each window.
    """
    decoder, dense = model.get_decoder(), model.get_output_embeddings().weight.detach()
    prefix = next(f"{name}." for name, module in model.named_modules() if module is decoder)
    given = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    input_ids = input_ids.to(dense.device)
    targets = [_last_hidden(decoder, given, window) for window in input_ids]

    weights = given | {f"{name.removeprefix(prefix)}.weight": weight for name, weight in stored.items()}
    weights |= {"embed_tokens.weight": table}
    norms = {name: weight for name, weight in given.items() if name.endswith("norm.weight")}
    offset, cap = spec_for(model.config).norm_offset, logit_cap(model.config)

    def scaled_norm(weight: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        return (weight + offset) * factors - offset if offset else weight * factors

    of_rows = {
        name: torch.ones(len(weight), device=dense.device, requires_grad=True)
        for name, weight in stored.items()
    }
    of_norms = {name: torch.ones_like(norm, requires_grad=True) for name, norm in norms.items()}
    optimizer = torch.optim.Adam([*of_rows.values(), *of_norms.values()])

    with _scaled(model, of_rows), torch.enable_grad():
        for done, (window, target) in enumerate(zip(input_ids, targets, strict=True)):
            tuned = {name: scaled_norm(norm, of_norms[name]) for name, norm in norms.items()}
            hidden = _last_hidden(decoder, weights | tuned, window)
            optimizer.zero_grad()
            with products_in("auto", dense.device.type):
                loss = head_loss(hidden, head, of_capped(partial(_divergence, target, dense, cap), cap))
            with bulk_products(dense.device.type):
                torch.autograd.backward(loss / len(window))
            _set_rate(optimizer, learning_rate, done, len(input_ids))
            optimizer.step()
            progress("tuning scales", done + 1, len(input_ids))
    return TunedScales(
        rows={name: rows.detach().cpu() for name, rows in of_rows.items()},
        norms={
            f"{prefix}{name}": scaled_norm(norm, of_norms[name].detach()).cpu()
            for name, norm in norms.items()
        },
    )


def _set_rate(optimizer: torch.optim.Optimizer, peak: float, done: int, steps: int) -> None:
    """Warm-up, then a line down to zero."""
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1, (done + 1) / _WARM_UP) * (1 - done / steps)


def _divergence(
    target: torch.Tensor, dense: torch.Tensor, cap: float | None, logits: torch.Tensor, positions: slice
) -> LossAndGradient:
    """From the dense model, whose output matrix's inputs are `target`."""
    theirs = F.linear(target[positions], dense)
    return distillation_loss(logits, capped(theirs, cap))


def _last_hidden(
    decoder: nn.Module, weights: Mapping[str, torch.Tensor], window: torch.Tensor
) -> torch.Tensor:
    """The output matrix's inputs (seqlen, hidden_size) for one window, with these weights in the decoder's place."""
    with bulk_products(window.device.type):
        output = functional_call(
            decoder, dict(weights), kwargs={"input_ids": window[None], "use_cache": False}
        )
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


@contextmanager
def _scaled(model: Any, factors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let the rows of Linears of the blocks be multiplied."""
    with ExitStack() as stack:
        for name, rows in factors.items():
            linear = model.get_submodule(name)
            stack.callback(linear.register_forward_hook(partial(_scale_rows, rows)).remove)
        yield


def _scale_rows(rows: torch.Tensor, linear: nn.Linear, _: Any, y: torch.Tensor) -> torch.Tensor:
    """y = f * x W^T + b of y = x W^T + b."""
    return y * rows if linear.bias is None else (y - linear.bias) * rows + linear.bias
