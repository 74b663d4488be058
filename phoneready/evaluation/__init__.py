"""Judging models: against text, against the dense model, on tasks, by what they write, and against a baseline."""
