"""The model that is trained, with its loss as its forward pass, and its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cfsp.models.architectures import capped, logit_cap
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
from cfsp.recovery.settings import RecoverySettings, loss_weights
from cfsp.text.respelling import Respelling

_IMPOSSIBLE = -80.0
"""Logit of what is not the label, where that is certain: exp of it is still a float32."""


Batch = dict[str, torch.Tensor]
"""Sequences of `cfsp.recovery.data`, (batch, seqlen) int64 each: input_ids, labels, and for a teacher of other tokens
teacher_ids and teacher_places."""


class Teacher(nn.Module):
    """The dense model, which is never trained or saved; its logits will be divided by the temperature."""

    def __init__(self, model: Any, respelling: Respelling | None = None, temperature: float = 1.0) -> None:
        super().__init__()
        self.model, self.respelling = model, respelling
        self.impossible = _impossible(temperature)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Callable[[slice], torch.Tensor]:
        """Logits (n, vocab_size) float32 of any of the labelled positions, in the student's tokens.

        Where a position is inside one of the teacher's tokens, all probability is on the label: the next part.
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
            found[rows] = self.impossible
            found[rows, targets[positions][rows]] = 0.0
            return found

        return respelled_logits

    @torch.no_grad()
    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, self.model.get_output_embeddings().weight).float()
        return capped(logits, logit_cap(self.model.config))


class Student(nn.Module):
    """A causal LM whose forward pass is a loss, summed over labelled positions.

    Args:
        model: The causal LM, or the PEFT model around it.
        settings: They say the objective: next-token loss and distillation, each with its weight.
        dtype: Of the matrix products (autocast); weights keep their own.
        teacher: Where the objective has distillation in it.
    """

    teacher: Teacher | None

    def __init__(
        self,
        model: Any,
        settings: RecoverySettings,
        dtype: torch.dtype,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.settings, self.dtype = settings, dtype
        # No submodule: whoever trains, wraps or moves the student leaves the teacher as it is.
        vars(self)["teacher"] = teacher

    @property
    def causal_lm(self) -> Any:
        """The causal LM itself, adapters in place."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        """The objective's sum over labelled positions of a `Batch`."""
        hidden, targets = self._labelled_hidden(batch)
        loss = of_capped(self._chunk_loss(batch, targets), logit_cap(self.causal_lm.config))
        return head_loss(hidden, self.causal_lm.get_output_embeddings().weight, loss, self.dtype)

    @torch.no_grad()
    def sums(self, batch: Batch) -> torch.Tensor:
        """For validation: (3,) float64 over one batch's labelled positions.

        The sums of the objective and of the next-token loss, and how many positions.
        """
        hidden, targets = self._labelled_hidden(batch)
        next_token, loss = 0.0, self._chunk_loss(batch, targets)

        def with_next_token(logits: torch.Tensor, chunk: slice) -> LossAndGradient:
            nonlocal next_token
            next_token += float(next_token_loss(logits, targets[chunk])[0])
            return loss(logits, chunk)

        head = self.causal_lm.get_output_embeddings().weight
        watched = of_capped(with_next_token, logit_cap(self.causal_lm.config))
        objective = float(head_loss(hidden, head, watched, self.dtype))
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

    def _chunk_loss(self, batch: Batch, targets: torch.Tensor) -> ChunkLoss:
        next_weight, distill_weight = loss_weights(self.settings)
        temperature = self.settings.temperature
        predictions = None if self.teacher is None else self.teacher(batch)

        def loss(logits: torch.Tensor, positions: slice) -> LossAndGradient:
            terms = []
            if next_weight:
                terms.append((next_weight, next_token_loss(logits, targets[positions])))
            if predictions is not None:
                expected = predictions(positions)
                # What no token has is not said.
                beyond = logits.shape[-1] - expected.shape[-1]
                expected = (
                    F.pad(expected, (0, beyond), value=_impossible(temperature)) if beyond else expected
                )
                terms.append((distill_weight, distillation_loss(logits, expected, temperature)))
            if len(terms) == 1 and terms[0][0] == 1:
                return terms[0][1]
            losses = torch.stack([weight * value for weight, (value, _) in terms])
            gradients = [weight * gradient for weight, (_, gradient) in terms]
            return losses.sum(), sum(gradients[1:], gradients[0])

        return loss


def _impossible(temperature: float) -> float:
    """Logit of what is not said, so far below all others that it is not said either once a temperature divides them."""
    return _IMPOSSIBLE * max(1.0, temperature)
