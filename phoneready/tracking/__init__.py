"""Telling an experiment tracker about releases."""
