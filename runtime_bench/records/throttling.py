"""How a processor was slowed down to another one's speed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Throttling:
    """A processor slowed down to a score."""

    target_score: float  # The device's score
    host_score: float  # This machine's, as it is
    rate: float  # How many times slower it was told to be
    reached_score: float  # What it had then

    @property
    def text(self) -> str:
        """For a reader of figures."""
        return (
            f"slowed down {self.host_score / self.reached_score:.1f} times: score {self.host_score:.0f} here, "
            f"{self.target_score:.0f} wanted, {self.reached_score:.0f} reached at the rate {self.rate:.2f}"
        )
