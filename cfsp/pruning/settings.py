"""How to prune: settings that name rows of the tables of scores and allocations."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

from cfsp.errors import InputError
from cfsp.settings import Reads, Setting, Settings, setting
from cfsp.validation import WhereSet

ALIGN = Setting("Widths are multiples of this.", ge=1)
DEFAULT_ALIGN = 32
RECONSTRUCTIONS = ("none", "block-by-block")


def parse_amount(text: str, field: str) -> int | float:
    """A number of parts, or a share of them below 1.

    Raises:
        InputError: Neither.
    """
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError):
        share = float(text)
        if 0 < share < 1:
            return share
    raise InputError("neither a number nor a share", field=field, value=text, allowed="such as 2, or 0.1")


def _amount(what: str) -> Any:
    """The setting of how many parts go."""
    return setting(
        0,
        f"{what}: how many, or a share below 1; 0 removes none.",
        ge=0,
        le=512,
        parse=parse_amount,
        metavar="N|SHARE",
        shown="0",
    )


@dataclass(frozen=True)
class PruneSettings(Settings):
    """How to prune; the defaults are what phoneready recommends.

    The order of the fields is that of the plan's file, whose hash exported files carry: add new ones at the end.
    """

    prune_ratio: float = setting(
        0.2, "Share of FFN channels to remove (not of all parameters), 0 <= ratio < 1.", ge=0, lt=1
    )
    allocation: str = setting(
        "cfsp",
        "Widths of the blocks: cfsp or uniform.",
        choices="cfsp.pruning.allocation:ALLOCATIONS",
        removed=dict.fromkeys(("loss", "mixed"), "cfsp"),
    )
    strength: float = setting(1.0, "CFSP's a; 1 is the paper's.", ge=0, le=1e6, option="--coarse-strength")
    score: str = setting(
        "cfsp",
        "Importance of a channel inside its block.",
        choices="cfsp.pruning.scoring:SCORES",
        removed=dict.fromkeys(
            ("taylor", "fisher", "obs", "obs_loss", "wanda_sp", "flap", "magnitude"), "cfsp"
        ),
    )
    align: int = setting(DEFAULT_ALIGN, ALIGN)
    uniform_width: bool = setting(False, "Give every block the same width.", option="--uniform")
    reconstruct: str = setting(
        "block-by-block",
        "How down_proj is solved anew: block-by-block or none.",
        choices=RECONSTRUCTIONS,
        removed=dict.fromkeys(("one-pass", "mean"), "block-by-block"),
    )
    ridge: float = setting(
        1e-2, "Ridge of that solution, relative to the mean of the Gram matrix's diagonal.", gt=0
    )
    correction: float = setting(
        0.4, "Share of earlier blocks' error that a block takes back, 0 to 1.", ge=0, le=1
    )
    dtype: str = setting(
        "auto",
        "Of matrix products over the calibration text: auto, float32 or bfloat16.",
        choices="cfsp.precision:PRODUCTS",
    )
    vocabulary: Annotated[int, WhereSet] = setting(
        0, "Tokens of the vocabulary to keep; 0 keeps all.", ge=0, le=2**24
    )
    blocks: Annotated[int | float, WhereSet] = _amount("Whole decoder blocks to remove")
    attentions: Annotated[int | float, WhereSet] = _amount("Attentions to remove from blocks that stay")
    kv_groups: Annotated[float, WhereSet] = setting(
        0.0,
        "Share of key-value groups (a key-value head with its query heads) to remove, of attentions that stay; "
        "0 <= share < 1.",
        ge=0,
        lt=1,
    )

    @property
    def keeps_blocks(self) -> bool:
        """Whether every block stays as it is."""
        return not (self.prune_ratio or self.blocks or self.attentions or self.kv_groups)

    @property
    def repairs(self) -> bool:
        """Whether what is left is solved anew for what goes."""
        return self.reconstruct != "none"


READS: Reads = MappingProxyType(
    {
        "strength": (
            lambda asked: asked.allocation == "cfsp" and not asked.uniform_width,
            "without the allocation cfsp, and widths of their own",
        ),
        "ridge": (lambda asked: asked.repairs, "without the reconstruction block-by-block"),
        "correction": (lambda asked: asked.repairs, "without the reconstruction block-by-block"),
    }
)
