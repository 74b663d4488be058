"""One search: which vocabulary, channels, groups, training and file are best within limits."""
