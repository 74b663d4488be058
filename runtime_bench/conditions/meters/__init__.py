"""Meters of energy: where a machine has some, what they count in, and what their readings come to."""
