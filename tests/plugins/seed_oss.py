"""A family of models as another distribution brings it: one row.

[project.entry-points."phoneready.families"]
seed_oss = "seed_oss:FAMILY"
"""

from __future__ import annotations

from cfsp.models.families.row import BIAS_OF_ATTENTION, QKV_LAYERS, Family, Layout

FAMILY = Family("seed_oss", (Layout("seed_oss", biases=QKV_LAYERS),), bias_settings=BIAS_OF_ATTENTION)
