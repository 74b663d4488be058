"""How good a model is: perplexity, divergence from the dense model, tasks, and what it says."""

from cfsp.evaluation.answers import CHECK_PROMPTS, PROMPTS, answer, sample_answers
from cfsp.evaluation.degeneration import degenerate
from cfsp.evaluation.divergence import Divergence, divergence, divergence_from_logits
from cfsp.evaluation.language_model import Branches, LanguageModel, Score
from cfsp.evaluation.perplexity import Perplexity, perplexity
from cfsp.evaluation.torch_model import TorchLanguageModel, next_token_logits

__all__ = [
    "CHECK_PROMPTS",
    "PROMPTS",
    "Branches",
    "Divergence",
    "LanguageModel",
    "Perplexity",
    "Score",
    "TorchLanguageModel",
    "answer",
    "degenerate",
    "divergence",
    "divergence_from_logits",
    "next_token_logits",
    "perplexity",
    "sample_answers",
]
