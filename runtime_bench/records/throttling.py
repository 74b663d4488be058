"""How a processor was slowed down to another one's speed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Throttling:
    """A processor slowed down to a score.

    Attributes:
        target_score: The device's score.
        host_score: This machine's, as it is.
        rate: How many times slower it was told to be.
        reached_score: What it had then.
    """

    target_score: float
    host_score: float
    rate: float
    reached_score: float

    @property
    def text(self) -> str:
        """For a reader of figures."""
        return (
            f"slowed down {self.host_score / self.reached_score:.1f} times: score {self.host_score:.0f} here, "
            f"{self.target_score:.0f} wanted, {self.reached_score:.0f} reached at the rate {self.rate:.2f}"
        )
