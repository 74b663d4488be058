"""Modelling code that is stored in checkpoints, and imported from here when phoneready loads them itself."""
