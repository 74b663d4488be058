"""Models: where they are found, how they are read, and the checkpoints that pruned ones are kept in."""
