"""From a pruned checkpoint to files that phones run, each proven against the checkpoint."""
