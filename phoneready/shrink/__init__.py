"""Prune and recover in steps, judge each, and keep the smallest model that is good enough."""
