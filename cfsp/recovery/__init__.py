"""Recovery: training back what pruning has cost, by adapters that are merged or on all weights."""
