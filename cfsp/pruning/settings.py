"""How to prune."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

from cfsp.errors import InputError
from cfsp.settings import Reads, Setting, Settings, setting
from cfsp.validation import WhereSet

ALIGN = Setting("Widths are multiples of this.", ge=1, rare=True)
SCORES = ("activation_norm", "cfsp")
RECONSTRUCTIONS = ("none", "block-by-block")


def _amount(what: str) -> Any:
    """The setting of how many parts go: a number, or a share below 1."""

    def parse(text: str, field: str) -> int | float:
        with suppress(ValueError):
            return int(text)
        with suppress(ValueError):
            if 0 < (share := float(text)) < 1:
                return share
        raise InputError("neither a number nor a share", field=field, value=text, allowed="such as 2, or 0.1")

    text = f"{what}: how many, or a share below 1; 0 removes none."
    return setting(0, text, ge=0, le=512, parse=parse, metavar="N|SHARE", shown="0")


@dataclass(frozen=True)
class PruneSettings(Settings):
    """How to prune; the defaults are what phoneready recommends.

    The order of the fields is that of the plan's file, whose hash exported files carry: add new ones at the end.
    """

    prune_ratio: float = setting(
        0.2, "Share of FFN channels to remove (not of all parameters), 0 <= ratio < 1.", ge=0, lt=1
    )
    strength: float = setting(
        1.0,
        "CFSP's a, by which important blocks stay wider; 1 is the paper's, 0 gives every block the same share.",
        ge=0,
        le=1e6,
        rare=True,
    )
    score: str = setting(
        "cfsp",
        "Importance of a channel inside its block.",
        choices=SCORES,
        rare=True,
    )
    align: int = setting(32, ALIGN)
    uniform_width: bool = setting(False, "Give every block the same width.", rare=True)
    reconstruct: str = setting(
        "block-by-block",
        "How down_proj is solved anew: block-by-block or none.",
        choices=RECONSTRUCTIONS,
        rare=True,
    )
    ridge: float = setting(
        1e-2, "Ridge of that solution, relative to the mean of the Gram matrix's diagonal.", gt=0, rare=True
    )
    correction: float = setting(
        0.4, "Share of earlier blocks' error that a block takes back, 0 to 1.", ge=0, le=1, rare=True
    )
    dtype: str = setting(
        "auto",
        "Of matrix products over the calibration text: auto, float32 or bfloat16.",
        choices="cfsp.precision:PRODUCTS",
        rare=True,
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
        """Whether what is left is solved anew."""
        return self.reconstruct != "none"


READS: Reads = MappingProxyType(
    {
        "strength": (lambda asked: not asked.uniform_width, "with one width for all blocks"),
        "ridge": (lambda asked: asked.repairs, "without the reconstruction block-by-block"),
        "correction": (lambda asked: asked.repairs, "without the reconstruction block-by-block"),
    }
)
