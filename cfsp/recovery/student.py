"""The model that is trained, with its loss: what a trainer calls, and what is wrapped for several processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cfsp.recovery.data import IGNORED
from cfsp.recovery.losses import (
    ChunkLoss,
    LossAndGradient,
    distillation_loss,
    head_loss,
    next_token_loss,
)
from cfsp.recovery.settings import RecoverySettings, loss_weights


@dataclass(frozen=True)
class Teacher:
    """The dense model; it is never trained, moved by a trainer, or saved."""

    model: Any

    @torch.no_grad()
    def hidden(self, input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Final hidden states of the labelled positions, (n, hidden_size)."""
        states = self.model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        labelled: torch.Tensor = states[targets != IGNORED]
        return labelled

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, vocab_size) float32."""
        return F.linear(hidden, self.model.get_output_embeddings().weight).float()


class Student(nn.Module):
    """A causal LM whose forward pass is a loss, summed over labelled positions.

    Args:
        model: The causal LM, or the PEFT model around it.
        settings: They say the objective: next-token loss and distillation, each with its weight.
        dtype: Of the matrix products (autocast); weights keep their own.
        teacher: Where the objective has distillation in it.
    """

    # Tells transformers' Trainer to count the labels of all accumulated batches before the first of them.
    accepts_loss_kwargs = True

    def __init__(
        self, model: Any, settings: RecoverySettings, dtype: torch.dtype, teacher: Teacher | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.settings, self.dtype, self.teacher = settings, dtype, teacher

    @property
    def causal_lm(self) -> Any:
        """The causal LM itself, adapters in place."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The objective's sum over labelled positions of one batch.

        Args:
            input_ids: (batch, seqlen) int64.
            labels: (batch, seqlen) int64, what each position predicts, or IGNORED.
        """
        hidden, targets = self._labelled_hidden(input_ids, labels)
        loss = self._chunk_loss(input_ids, labels, targets)
        return head_loss(hidden, self.causal_lm.get_output_embeddings().weight, loss, self.dtype)

    @torch.no_grad()
    def sums(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """For validation: (3,) float64 over one batch's labelled positions.

        The sums of the objective and of the next-token loss, and how many positions.
        """
        hidden, targets = self._labelled_hidden(input_ids, labels)
        loss = self._chunk_loss(input_ids, labels, targets)
        next_token = 0.0

        def with_next_token(logits: torch.Tensor, chunk: slice) -> LossAndGradient:
            nonlocal next_token
            next_token += float(next_token_loss(logits, targets[chunk])[0])
            return loss(logits, chunk)

        head = self.causal_lm.get_output_embeddings().weight
        objective = float(head_loss(hidden, head, with_next_token, self.dtype))
        return torch.tensor([objective, next_token, len(targets)], dtype=torch.float64)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and weights that training changes."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def _labelled_hidden(
        self, input_ids: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(input_ids.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            decoder = self.causal_lm.get_decoder()
            states = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        mask = labels != IGNORED
        return states[mask], labels[mask]

    def _chunk_loss(self, input_ids: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> ChunkLoss:
        next_weight, distill_weight = loss_weights(self.settings)
        temperature, teacher = self.settings.temperature, self.teacher
        teacher_hidden = None if teacher is None else teacher.hidden(input_ids, labels)

        def loss(logits: torch.Tensor, chunk: slice) -> LossAndGradient:
            terms = []
            if next_weight:
                terms.append((next_weight, next_token_loss(logits, targets[chunk])))
            if teacher is not None and teacher_hidden is not None:
                dense = teacher.logits(teacher_hidden[chunk])
                terms.append((distill_weight, distillation_loss(logits, dense, temperature)))
            return _weighted(terms)

        return loss


def _weighted(terms: Sequence[tuple[float, LossAndGradient]]) -> LossAndGradient:
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]
    losses, gradients = zip(
        *((weight * loss, weight * gradient) for weight, (loss, gradient) in terms), strict=True
    )
    return torch.stack(losses).sum(), sum(gradients[1:], gradients[0])
