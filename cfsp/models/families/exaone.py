"""EXAONE 4: norms behind attention and MLP; where there are windows, blocks that see everything do not rotate."""

from __future__ import annotations

from cfsp.models.families.row import NORMS_BEHIND, Family, HeadNorms, Layout

FAMILIES = (
    Family(
        "exaone4",
        (
            Layout(
                "exaone4",
                rope_factors=True,
                free_head_dim=False,
                rotates_windowed=True,
                full_step=4,
                windowed_depth=64,
            ),
        ),
        head_norms=HeadNorms(),
        rotates_windowed=True,
        attention_norm="",
        ffn_norm="",
        added_norms=NORMS_BEHIND,
    ),
)
