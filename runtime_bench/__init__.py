"""Measure exported model files and keep the records."""
