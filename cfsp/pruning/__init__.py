"""CFSP (arXiv 2409.13199) and what goes beyond it; `prune.prune_model` goes through it from start to end."""
