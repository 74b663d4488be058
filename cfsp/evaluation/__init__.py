"""How good a model is: perplexity, divergence from the dense model, tasks, and what it says."""
