"""What logits may differ by: a number, or a share of the checkpoint's largest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from cfsp.errors import LimitError
from cfsp.text.tokens import TokenWindows
from exporters.proof import Reference, check_limits, compare


@pytest.mark.parametrize(
    ("largest", "difference", "fits"),
    [(5, 0.9e-3, True), (5, 1.1e-3, False), (40, 3.8e-3, True), (40, 4.2e-3, False)],
)
def test_larger_logits_may_differ_by_as_large_a_share(largest: float, difference: float, fits: bool) -> None:
    ids = torch.arange(16).reshape(2, 8)
    draws = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, 8, 32, generator=draws), torch.randn(64, 32, generator=draws)
    head *= largest / (hidden @ head.T).abs().max()
    reference = Reference(TokenWindows(ids, "text", ""), hidden, head)

    def run(window: Any) -> Iterator[Any]:
        logits = (hidden[int(window[0]) // 8] @ head.T).numpy()
        logits[3, 5] += difference
        yield from np.split(logits, 2)

    report = compare(reference, run, {"max_logit_diff": 1e-3, "kl_mean": 0.1})
    assert report.limits == {"max_logit_diff": pytest.approx(max(1e-3, largest * 1e-4)), "kl_mean": 0.1}
    if fits:
        check_limits(report, "file")
    else:
        with pytest.raises(LimitError, match="max_logit_diff"):
            check_limits(report, "file")
