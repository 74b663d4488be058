"""CFSP (arXiv 2409.13199) and what goes beyond it, in the order in which `prune.prune_model` does it.

statistics.py       coarse scores of blocks, and what fine ones read
scoring.py          fine scores of channels inside a block
allocation.py       widths of the blocks
plan.py             what goes, written down
surgery.py          the cut
block_by_block.py   the repair
vocabulary.py, spelling.py, parts.py    what else goes: tokens; blocks, attentions, key-value groups
"""
