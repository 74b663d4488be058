"""The numbers of a checkpoint that was trained through its rounding, put into a file of that format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cfsp.errors import InputError
from cfsp.models.gguf_file import read_gguf
from cfsp.models.rounded_numbers import RoundedNumbers
from exporters.gguf.llama_library import dequantized

_TOLERANCE = 2.0**-7
"""Of a row's largest number: weights of 16 bits are not quite what the numbers stand for."""


def put_numbers(base: Path, path: Path, numbers: RoundedNumbers) -> int:
    """Write them into a file, in place.

    Args:
        base: The unquantized file of the checkpoint.
        path: A file of the format, whose types are those of the numbers.
        numbers: The checkpoint's.

    Returns:
        Matrices that were written.

    Raises:
        InputError: They are not what the checkpoint's weights stand for, or not of its shape.
    """
    exact = {tensor.name: tensor for tensor in read_gguf(base).tensors}
    places = {tensor.name: tensor for tensor in read_gguf(path).tensors}
    with path.open("r+b") as stream:
        for name, stored in numbers.tensors.items():
            data, place = stored.numpy(), places.get(name)
            if (
                place is None
                or place.kind.name != numbers.format.types.get(name)
                or place.data.size != data.size
            ):
                raise InputError(f"the checkpoint's rounded numbers are not of its tensor {name}")
            weight = exact[name].dequantize()
            difference = np.abs(dequantized(data.reshape(len(weight), -1), place.kind.name) - weight).max(1)
            if (difference > _TOLERANCE * np.abs(weight).max(1) + np.finfo(np.float32).tiny).any():
                raise InputError(
                    f"the checkpoint's rounded numbers are not what its weights stand for: {name}"
                )
            stream.seek(place.offset)
            stream.write(data.tobytes())
    return len(numbers.tensors)
