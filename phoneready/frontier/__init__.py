"""Dense and pruned files side by side: which is best at which size, and whether pruning pays."""
