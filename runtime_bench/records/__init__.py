"""Records of benchmarks: one row, files of rows, groups, summaries and comparisons."""
