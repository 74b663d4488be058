"""The numbers of a checkpoint that was trained through its rounding, put into a file of that format."""

from __future__ import annotations

from pathlib import Path

import torch

from cfsp.errors import InputError
from cfsp.models.gguf_file import read_gguf
from cfsp.models.rounded_numbers import RoundedNumbers
from exporters.gguf.llama_library import dequantized
from exporters.quantize.scaled import stands_for


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
            values = dequantized(data.reshape(len(weight), -1), place.kind.name)
            if not stands_for(torch.from_numpy(values), torch.from_numpy(weight)):
                raise InputError(
                    f"the checkpoint's rounded numbers are not what its weights stand for: {name}"
                )
            stream.seek(place.offset)
            stream.write(data.tobytes())
    return len(numbers.tensors)
