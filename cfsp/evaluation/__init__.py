"""How good a pruned model is: perplexity, divergence from the dense model, and what it says."""

from cfsp.evaluation.answers import PROMPTS, sample_answers
from cfsp.evaluation.divergence import Divergence, divergence, divergence_from_logits
from cfsp.evaluation.perplexity import Perplexity, next_token_logits, perplexity

__all__ = [
    "PROMPTS",
    "Divergence",
    "Perplexity",
    "divergence",
    "divergence_from_logits",
    "next_token_logits",
    "perplexity",
    "sample_answers",
]
