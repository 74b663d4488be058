"""How much a model changes at ratios that it is not pruned to: from calibration alone, before any repair.

All ratios and the dense model run side by side through one block after the other, so that a model that memory cannot
hold is read once.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import torch

from cfsp.errors import InputError
from cfsp.models.architectures import decoder_layers, feed_forward, output_logits
from cfsp.models.offload import at_hand, enter_blocks, leave_blocks, run_windows
from cfsp.precision import products_in
from cfsp.progress import Progress, no_progress
from cfsp.pruning.parts import PROBE_TOKENS, PROBED, Forecast
from cfsp.pruning.plan import PruningPlan
from cfsp.pruning.statistics import spread_windows

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
_WINDOWS = 16


def forecast_losses(
    model: Any, plan: PruningPlan, input_ids: torch.Tensor, *, progress: Progress = no_progress
) -> Forecast | None:
    """The divergence from the dense model if channels of `RATIOS` are zero, on starts of calibration windows.

    Of a plan that takes channels alone; of ratios that its alignment can meet. None if there are none.

    Args:
        model: The dense model, in eval mode.
        plan: Made for it.
        input_ids: Calibration windows (nsamples, seqlen) int64.
    """
    plans = dict[float, PruningPlan]()
    if plan.settings.prune_ratio and not (plan.gone or plan.silent or plan.narrowed):
        for ratio in RATIOS:
            with suppress(InputError):
                plans[ratio] = plan.at_ratio(ratio)
    if not plans:
        return None
    ids, layers = spread_windows(input_ids, _WINDOWS)[:, :PROBE_TOKENS], decoder_layers(model)

    def without(gone: torch.Tensor, _: Any, given: tuple[torch.Tensor]) -> torch.Tensor:
        return given[0].index_fill(-1, gone, 0)

    with torch.inference_mode(), products_in(plan.settings.dtype, model.device.type):
        dense, calls = enter_blocks(model, layers, ids)
        runs = [(list(dense), calls.apart()) for _ in plans]
        for index, layer in enumerate(layers):
            down = feed_forward(model, layer).down
            with at_hand(layer):
                dense = run_windows(layer, index, dense, calls)
                for number, (planned, (hidden, own)) in enumerate(zip(plans.values(), runs, strict=True)):
                    block = planned.blocks[index]
                    gone = torch.tensor(block.ranking[block.width :], dtype=torch.long, device=model.device)
                    with down.register_forward_pre_hook(partial(without, gone)):
                        runs[number] = run_windows(layer, index, hidden, own), own
            progress("predicting", index + 1, len(layers))

        def log_probabilities(hidden: torch.Tensor) -> torch.Tensor:
            return output_logits(model, leave_blocks(model, hidden[..., ::PROBED, :])).log_softmax(-1)

        sums = [0.0] * len(plans)
        with at_hand(model.get_output_embeddings()):
            for window, reference in enumerate(dense):
                expected = log_probabilities(reference)
                for number, (states, _) in enumerate(runs):
                    actual = log_probabilities(states[window])
                    sums[number] += float((expected.exp() * (expected - actual)).sum(-1).mean())
    return Forecast(tuple(plans), tuple(round(max(total / len(ids), 0.0), 4) for total in sums), ids.numel())
