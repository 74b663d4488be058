"""Conditions of a run: looks at the machine beside the measuring process, and what they say."""
