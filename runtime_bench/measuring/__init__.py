"""Measuring: rounds of fresh processes over files, workloads and targets."""
