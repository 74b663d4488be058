"""Are a file's matrices the model's? Row by row, against what they were quantized from.

Of a stored row q and the exact row w, the slope q w / w w is near 1, whatever the rounding: 0.8 in two bits, 1 in
eight. It is near 0 if q is another row, and 0 if q is gone. Over a whole matrix it is what the plain quantizer gives
some rows, or what it was when numbers were chosen for a text: scales that are off by 5 % show.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cfsp.errors import LimitError

FloatArray = npt.NDArray[np.float32]
Rows = Callable[[int, int], FloatArray]
"""(first row, row behind the last) -> these rows, (n, columns) float32."""

ROW_SLOPE, MATRIX_SLOPE = 0.5, 0.025
"""How far slopes may lie from what they should be: a row's, and a matrix's relative to it."""
_PLAIN_ROWS, _AT_ONCE = 64, 8192
_TINY = 1e-6
"""Of the mean row's sum of squares: below it a type's own scales may not hold a row."""


def check_matrix(
    name: str,
    n_rows: int,
    exact: Rows,
    stored: Rows,
    plain: Callable[[FloatArray], FloatArray],
    chosen: float | None = None,
) -> None:
    """Hold a matrix of a file against the one that it was quantized from.

    Args:
        name: Of the matrix, for the message.
        n_rows: Of it.
        exact: What it was quantized from.
        stored: What the file's runtime reads.
        plain: Exact rows -> what the plain quantizer makes of them.
        chosen: The slope of numbers that were chosen for a text, when they were; None for the plain quantizer's.

    Raises:
        LimitError: A row is not the exact one's, or all numbers are too large or too small.
    """
    inner, squares = np.empty(n_rows), np.empty(n_rows)
    for start in range(0, n_rows, _AT_ONCE):
        some = slice(start, min(start + _AT_ONCE, n_rows))
        w, q = exact(some.start, some.stop), stored(some.start, some.stop)
        inner[some], squares[some] = np.einsum("ij,ij->i", q, w), np.einsum("ij,ij->i", w, w)
    if not squares.any():
        return
    if not np.isfinite(inner).all():
        raise LimitError(f"{name} has numbers that are not finite")
    # A row that its type holds badly is held to what the plain quantizer makes of it.
    odd = (np.abs(inner - squares) > ROW_SLOPE * squares) & (squares > _TINY * squares.mean())
    for row in np.flatnonzero(odd).tolist():
        w = exact(row, row + 1)
        slope, like = inner[row] / squares[row], np.vdot(plain(w), w) / squares[row]
        if abs(slope - like) > ROW_SLOPE:
            raise LimitError(
                f"row {row} of {name} is not the checkpoint's: "
                f"its slope is {slope:.2f}, the plain quantizer's {like:.2f}"
            )
    if chosen is None:
        rows = np.flatnonzero(squares)
        sample = rows[np.unique(np.linspace(0, len(rows) - 1, _PLAIN_ROWS).astype(int))]
        chosen = slope_of(plain(w := np.concatenate([exact(row, row + 1) for row in sample.tolist()])), w)
    times = inner.sum() / squares.sum() / chosen
    if abs(times - 1) > MATRIX_SLOPE:
        raise LimitError(
            f"the numbers of {name} are {times:.3f} times what they should be; "
            f"allowed: {1 - MATRIX_SLOPE:g} to {1 + MATRIX_SLOPE:g}"
        )


def slope_of(stored: FloatArray, exact: FloatArray) -> float:
    """Of a matrix; 1 of zeros."""
    squares = float(np.vdot(exact, exact))
    return float(np.vdot(stored, exact)) / squares if squares else 1.0
