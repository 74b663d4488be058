"""Slow the page down to a device's score.

The score is a speed of one thread in WebAssembly (`page/score.html`, which any phone can open). Chromium's throttling
is told a rate, which it keeps only roughly, so what it reaches is measured, and the rate corrected.

It stops the page's main thread alone: threads that a page starts run on at full speed. So whatever is throttled has to
run on the main thread, and there is one thread.
"""

from __future__ import annotations

from cfsp.errors import InputError
from runtime_bench.browser.chromium import BrowserError, Page
from runtime_bench.records.reported import Throttling

TOLERANCE = 0.1
"""Relative distance from the score that is near enough."""
_ATTEMPTS = 6


def calibrate(page: Page, target_score: float) -> Throttling:
    """Throttle the page until it has a device's score.

    Raises:
        InputError: This machine's score is below the device's.
        BrowserError: Its speed changes too much to be held to the score.
    """
    page.visit("score.html?quiet")
    page.throttle(1)
    host_score = float(page.call("score"))
    if host_score < target_score * (1 - TOLERANCE):  # nothing is made faster than it is
        raise InputError(
            f"this machine's browser has the score {host_score:.0f}: too weak to stand for the device",
            field="score",
            value=target_score,
            allowed=f"up to {host_score:.0f}",
        )
    rate, reached = corrected_rate(1.0, host_score, target_score), host_score
    for _ in range(_ATTEMPTS):
        if rate > 1:
            page.throttle(rate)
            reached = float(page.call("score"))
        if abs(reached / target_score - 1) <= TOLERANCE:
            return Throttling(target_score, host_score, rate, reached)
        rate = corrected_rate(rate, reached, target_score)
    raise BrowserError(
        f"the page could not be held to the score {target_score:g}: it had {reached:.0f} at the rate {rate:.2f}; "
        "other programs may be using the processor"
    )


def corrected_rate(rate: float, reached: float, target_score: float) -> float:
    """The rate that would have reached the score, were throttling exact; at least 1."""
    return max(1.0, rate * reached / target_score)
