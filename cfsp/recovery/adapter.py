"""Low-rank adapters on every Linear of the blocks: put on before training, merged after it.

Their ranks may follow the importance of blocks (CFSP, arXiv 2409.13199): important ones get more capacity.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cfsp.errors import InputError, require_extra
from cfsp.models.architectures import block_linears


def add_adapter(model: Any, ranks: Sequence[int], alpha: float) -> Any:
    """Put LoRA (arXiv 2106.09685) on all Linear layers of the blocks; only the adapters are trainable then.

        W_l x  becomes  W_l x + alpha * B_l A_l x,    A_l (r_l, in_features), B_l (out_features, r_l) zero

    Args:
        model: A causal LM of the architecture table; it is changed in place.
        ranks: r_l of every block.
        alpha: The scale, alpha_l / r_l in PEFT's terms.

    Raises:
        MissingExtraError: PEFT is not installed.
    """
    require_extra("peft", "recover")
    import peft

    by_name = {name: rank for rank, names in zip(ranks, block_linears(model), strict=True) for name in names}
    config = peft.LoraConfig(
        r=max(ranks),
        lora_alpha=alpha * max(ranks),
        target_modules=list(by_name),
        rank_pattern={re.escape(name): rank for name, rank in by_name.items()},
        alpha_pattern={re.escape(name): alpha * rank for name, rank in by_name.items()},
        lora_dropout=0.0,
        bias="none",
    )
    adapted = peft.get_peft_model(model, config)
    for module in adapted.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            # Under autocast PEFT would cast every input up to float32, only for autocast to cast it down again.
            module.cast_input_dtype_enabled = False
    return adapted


def merge_adapter(adapted: Any) -> Any:
    """Add the adapters to the weights (W + alpha * B A) and return the plain model, same modules and widths."""
    model = adapted.merge_and_unload()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def importance_ranks(importance: Sequence[float], mean_rank: int) -> tuple[int, ...]:
    """Integer ranks r_l proportional to importances I_l, with exactly the given mean and none below 1.

        r_l ~ L * mean_rank * I_l / sum(I),    sum(r) = L * mean_rank

    Blocks whose quota is below one get one, the others share the rest in proportion; fractions are rounded by
    largest remainder, ties to the earlier block.

    Args:
        importance: I_l of every block, not negative.
        mean_rank: 1 or more.

    Raises:
        InputError: No blocks, a negative or non-finite importance, or a mean rank below one.
    """
    if mean_rank < 1:
        raise InputError("out of range", field="rank", value=mean_rank, allowed="1 or more")
    if not importance or not all(0 <= value < float("inf") for value in importance):
        raise InputError(
            "importances must be finite and not negative", field="importance", value=tuple(importance)
        )
    count, total = len(importance), len(importance) * mean_rank
    weights = importance if sum(importance) > 0 else [1.0] * count
    free = list(range(count))
    while True:  # blocks whose share is below one leave it, which makes the others' smaller
        left, weight = total - (count - len(free)), sum(weights[i] for i in free)
        quotas = {i: left * weights[i] / weight for i in free}
        if min(quotas.values(), default=1) >= 1:
            break
        free = [i for i in free if quotas[i] >= 1]
    ranks = [int(quotas.get(i, 1)) for i in range(count)]
    by_remainder = sorted(quotas, key=lambda i: (-(quotas[i] - int(quotas[i])), i))
    for i in by_remainder[: total - sum(ranks)]:
        ranks[i] += 1
    return tuple(ranks)
