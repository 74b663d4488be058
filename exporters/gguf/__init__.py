"""Checkpoints to GGUF files for llama.cpp."""
