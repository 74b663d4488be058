"""The model that is trained: its adapters, its loss as its forward pass, and its teacher."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cfsp.errors import InputError, require_extra
from cfsp.models.architectures import block_linears, capped, logit_cap
from cfsp.precision import casting
from cfsp.recovery.data import IGNORED, INSIDE
from cfsp.recovery.losses import (
    ChunkLoss,
    LossAndGradient,
    distillation_loss,
    head_loss,
    next_token_loss,
    of_capped,
)
from cfsp.recovery.settings import LOSSES
from cfsp.text.respelling import Respelling

_IMPOSSIBLE = -80.0
"""Logit of what is certainly not next: exp of it is still a float32."""

Batch = dict[str, torch.Tensor]
"""Sequences of `cfsp.recovery.data`, (batch, seqlen) int64 each: input_ids, labels, and for a teacher of other tokens
teacher_ids and teacher_places."""


def add_adapter(model: Any, ranks: Sequence[int], alpha: float) -> Any:
    """Put LoRA (arXiv 2106.09685) on all Linear layers of the blocks, in place; only adapters are trainable then.

        W_l x  becomes  W_l x + alpha * B_l A_l x,    A_l (r_l, in_features), B_l (out_features, r_l) zero

    `ranks` are r_l of every block; alpha is alpha_l / r_l in PEFT's terms. Raises MissingExtraError: PEFT is not
    installed.
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
    """CFSP's ranks of adapters, r_l ~ L * mean_rank * I_l / sum(I), with exactly that mean and none below 1.

    Blocks whose quota is below one get one, the others share the rest in proportion; fractions are rounded by largest
    remainder, ties to the earlier block. Raises InputError: no blocks, a negative or non-finite importance, or a mean
    rank below one.
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


class Teacher(nn.Module):
    """The dense model, which is never trained or saved, and how the student spells its tokens, if it has fewer."""

    def __init__(self, model: Any, respelling: Respelling | None = None) -> None:
        super().__init__()
        self.model, self.respelling = model, respelling

    @torch.no_grad()
    def forward(self, batch: Batch) -> Callable[[slice], torch.Tensor]:
        """Logits (n, vocab_size) float32 of any of the labelled positions, in the student's tokens.

        If a position is inside one of the teacher's tokens, all probability is on the label: the next part.
        """
        ids = batch.get("teacher_ids", batch["input_ids"])
        states = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        labelled = batch["labels"] != IGNORED
        if self.respelling is None:
            hidden = states[labelled]
            return lambda positions: self._logits(hidden[positions])
        places, targets = batch["teacher_places"][labelled], batch["labels"][labelled]
        hidden, inside = states[labelled.nonzero()[:, 0], places.clamp_min(0)], places == INSIDE
        log_probabilities_of = self.respelling.log_probabilities

        def respelled_logits(positions: slice) -> torch.Tensor:
            found = log_probabilities_of(self._logits(hidden[positions]))
            rows = inside[positions].nonzero()[:, 0]
            found[rows] = _IMPOSSIBLE
            found[rows, targets[positions][rows]] = 0.0
            return found

        return respelled_logits

    @torch.no_grad()
    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, self.model.get_output_embeddings().weight).float()
        return capped(logits, logit_cap(self.model.config))


class Student(nn.Module):
    """A causal LM, or the PEFT model around it, whose forward pass is a loss summed over labelled positions.

    `loss` names a row of LOSSES, and needs a teacher if that has distillation in it. `dtype` is that of matrix products
    (autocast); weights keep their own.
    """

    teacher: Teacher | None

    def __init__(self, model: Any, loss: str, dtype: torch.dtype, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.model, self.loss, self.dtype = model, loss, dtype
        # No submodule: whoever trains, wraps or moves the student leaves the teacher as it is.
        vars(self)["teacher"] = teacher

    @property
    def causal_lm(self) -> Any:
        """The causal LM itself, adapters in place."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        """The objective's sum over labelled positions of a `Batch`."""
        hidden, targets = self._labelled_hidden(batch)
        return self._head_loss(hidden, self._chunk_loss(batch, targets))

    @torch.no_grad()
    def sums(self, batch: Batch) -> torch.Tensor:
        """For validation: sums of objective and next-token loss over labelled positions, and their number, float64."""
        hidden, targets = self._labelled_hidden(batch)
        next_token, loss = 0.0, self._chunk_loss(batch, targets)

        def with_next_token(logits: torch.Tensor, chunk: slice) -> LossAndGradient:
            nonlocal next_token
            next_token += float(next_token_loss(logits, targets[chunk])[0])
            return loss(logits, chunk)

        objective = float(self._head_loss(hidden, with_next_token))
        return torch.tensor([objective, next_token, len(targets)], dtype=torch.float64)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and weights that training changes."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def _labelled_hidden(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        input_ids, labels = batch["input_ids"], batch["labels"]
        with casting(self.dtype, input_ids.device.type):
            decoder = self.causal_lm.get_decoder()
            states = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        mask = labels != IGNORED
        return states[mask], labels[mask]

    def _head_loss(self, hidden: torch.Tensor, loss: ChunkLoss) -> torch.Tensor:
        head = self.causal_lm.get_output_embeddings().weight
        return head_loss(hidden, head, of_capped(loss, logit_cap(self.causal_lm.config)), self.dtype)

    def _chunk_loss(self, batch: Batch, targets: torch.Tensor) -> ChunkLoss:
        next_weight, distill_weight = LOSSES[self.loss]
        predictions = None if self.teacher is None else self.teacher(batch)

        def loss(logits: torch.Tensor, positions: slice) -> LossAndGradient:
            terms = []
            if next_weight:
                terms.append((next_weight, next_token_loss(logits, targets[positions])))
            if predictions is not None:
                expected = predictions(positions)
                if beyond := logits.shape[-1] - expected.shape[-1]:  # rows that no token has
                    expected = F.pad(expected, (0, beyond), value=_IMPOSSIBLE)
                terms.append((distill_weight, distillation_loss(logits, expected)))
            if len(terms) == 1:
                return terms[0][1]
            losses = torch.stack([weight * value for weight, (value, _) in terms])
            gradients = [weight * gradient for weight, (_, gradient) in terms]
            return losses.sum(), sum(gradients[1:], gradients[0])

        return loss
