"""Checkpoints to ONNX folders for ONNX Runtime and what is built on it."""
