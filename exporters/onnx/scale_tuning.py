"""Distilling a model into the scales and norms of its quantized self, which cost nothing more at run time.

Rounding makes each layer's own error small; what the errors of all layers do together shows in the logits alone. So a
factor for the scales of each row, and one for each number of the norms, is trained end to end on the KL divergence from
the model as it was, while the stored numbers stay (Chen et al., EfficientQAT, arXiv 2407.11062, train scales so; Li et
al., Norm Tweaking, arXiv 2309.02784, norms).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from cfsp.models.architectures import block_linears
from cfsp.progress import Progress, no_progress
from cfsp.recovery.losses import LossAndGradient, distillation_loss, head_loss
from exporters.onnx.block_quantize import Rounded
from exporters.onnx.weights import HEAD_PARTS, is_tied

_LEARNING_RATE, _WARM_UP = 1e-3, 4
"""Of Adam with one step a window."""


@dataclass(frozen=True)
class Quantized:
    """A model's weights as a variant of few bits stores them.

    Attributes:
        layers: Every Linear of the blocks and the output matrix's parts.
        norms: Parameter name -> the weight of a norm that is not the checkpoint's.
    """

    layers: Mapping[str, Rounded]
    norms: Mapping[str, torch.Tensor] = field(default_factory=dict)


def tune(
    model: Any, layers: Mapping[str, Rounded], input_ids: torch.Tensor, *, progress: Progress = no_progress
) -> Quantized:
    """Train the factors, one step a window; the output matrix stays, as a tied one is looked up too.

    Args:
        model: A causal LM of the architecture table, float32; unchanged.
        layers: It in few bits, by `quantize_linears`.
        input_ids: Text, (nsamples, seqlen).
        progress: Told after each window.
    """
    decoder, dense = model.get_decoder(), model.get_output_embeddings().weight.detach()
    prefix = next(f"{name}." for name, module in model.named_modules() if module is decoder)
    given = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    targets = [_last_hidden(decoder, given, window) for window in input_ids]

    linears = {name: linear for block in block_linears(model) for name, linear in block.items()}
    head = torch.cat([layers[part].dequantized() for part in HEAD_PARTS])
    stored = given | ({"embed_tokens.weight": head} if is_tied(model) else {})
    stored |= {f"{name.removeprefix(prefix)}.weight": layers[name].dequantized() for name in linears}
    norms = {name: weight for name, weight in given.items() if name.endswith("norm.weight")}
    of_rows = {name: torch.ones(len(layers[name].q), requires_grad=True) for name in linears}
    of_norms = {name: torch.ones_like(norm, requires_grad=True) for name, norm in norms.items()}
    optimizer = torch.optim.Adam([*of_rows.values(), *of_norms.values()])

    with _scaled(linears, of_rows), torch.enable_grad():
        for done, (window, target) in enumerate(zip(input_ids, targets, strict=True)):
            tuned = {name: norm * of_norms[name] for name, norm in norms.items()}
            hidden = _last_hidden(decoder, stored | tuned, window)

            def divergence(
                logits: torch.Tensor, positions: slice, target: torch.Tensor = target
            ) -> LossAndGradient:
                return distillation_loss(logits, F.linear(target[positions], dense))

            optimizer.zero_grad()
            torch.autograd.backward(head_loss(hidden, head, divergence) / len(window))
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * min(1, (done + 1) / _WARM_UP) * (1 - done / len(input_ids))
            optimizer.step()
            progress("tuning scales", done + 1, len(input_ids))
    scaled = {name: layers[name].scaled(rows.detach()) for name, rows in of_rows.items()}
    return Quantized(
        {**layers, **scaled},
        {f"{prefix}{name}": norm * of_norms[name].detach() for name, norm in norms.items()},
    )


def _last_hidden(
    decoder: nn.Module, weights: Mapping[str, torch.Tensor], window: torch.Tensor
) -> torch.Tensor:
    """The output matrix's inputs (seqlen, hidden_size) for one window, with these weights in the decoder's place."""
    output = functional_call(decoder, dict(weights), kwargs={"input_ids": window[None], "use_cache": False})
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


@contextmanager
def _scaled(linears: Mapping[str, nn.Linear], factors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let each Linear's rows be multiplied: y = f * x W^T + b."""

    def hook(rows: torch.Tensor) -> Any:
        def scale(linear: nn.Linear, _: Any, y: torch.Tensor) -> torch.Tensor:
            return y * rows if linear.bias is None else (y - linear.bias) * rows + linear.bias

        return scale

    with ExitStack() as stack:
        for name, linear in linears.items():
            stack.callback(linear.register_forward_hook(hook(factors[name])).remove)
        yield
