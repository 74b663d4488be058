"""llama.cpp's library: found, its version checked, its log caught; and its quantizer.

Everything here is reached through exporters.gguf.runtime, which with this module is all that knows llama_cpp's API.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cfsp.errors import InputError, MissingExtraError
from exporters.gguf.llama_log import Log

_DISTRIBUTION = "llama-cpp-python"
# 0.3.36 renamed fields that the runtime sets (use_mmap became load_mode); the low-level API may move again in 0.4.
_VERSIONS = ((0, 3, 36), (0, 4))

_FLOATS = ctypes.POINTER(ctypes.c_float)
FloatArray = npt.NDArray[np.float32]


log = Log()


@functools.cache
def library() -> Any:
    """The llama_cpp module: imported, its version checked, its log redirected, its backend initialized."""
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingExtraError(_DISTRIBUTION, "gguf") from error
    except (OSError, RuntimeError) as error:
        raise InputError(f"{_DISTRIBUTION} is installed but its library does not load: {error}") from error
    version = importlib.metadata.version(_DISTRIBUTION)
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if not _VERSIONS[0] <= numbers < _VERSIONS[1]:
        low, high = (".".join(map(str, bound)) for bound in _VERSIONS)
        raise InputError(
            "this version is not supported", field=_DISTRIBUTION, value=version, allowed=f">={low},<{high}"
        )
    callback = llama_cpp.llama_log_callback(log)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.phoneready_log_callback = callback  # C keeps only the address: the object must live as long
    llama_cpp.llama_backend_init()
    return llama_cpp


def runtime_version() -> str:
    """Names and versions of the binding and of llama.cpp.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        InputError: Its version is not one that this module was written for.
    """
    version = library().llama_version().decode()
    return f"{_DISTRIBUTION} {importlib.metadata.version(_DISTRIBUTION)}, llama.cpp {version}"


def system_info() -> str:
    """llama.cpp's line about the backends and processor features it was built with."""
    return str(library().llama_print_system_info().decode("utf-8", "replace")).strip(" |")


def quantize(
    source: Path,
    destination: Path,
    ftype: int,
    *,
    n_threads: int = 1,
    imatrix: Mapping[str, FloatArray] | None = None,
    types: Mapping[str, str] | None = None,
) -> None:
    """Quantize a float32 or float16 GGUF file.

    Args:
        source: The file to read.
        destination: The file to write.
        ftype: llama.cpp's `llama_ftype`, see exporters.gguf.quants.
        n_threads: Threads.
        imatrix: Tensor name to the mean squared input of each of its input channels, (in_features,) float32.
        types: Tensor name to a ggml type, of tensors that get another than the `ftype` says.

    Raises:
        InputError: llama.cpp refuses; the message has its reason.
        MissingExtraError: llama-cpp-python is not installed.
    """
    lib = library()
    params = lib.llama_model_quantize_default_params()
    params.ftype = ftype
    params.nthread = n_threads
    entries, keep_alive = _imatrix_array(imatrix or {})
    if imatrix:
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(lib.llama_model_imatrix_data))
    import gguf  # not in the memory of a process that runs a file alone

    overrides = (lib.llama_model_tensor_override * (len(types or {}) + 1))()
    for entry, (name, kind) in zip(overrides, (types or {}).items(), strict=False):
        entry.pattern, entry.type = f"^{re.escape(name)}$".encode(), int(gguf.GGMLQuantizationType[kind])
    if types:
        params.tt_overrides = ctypes.cast(overrides, ctypes.POINTER(lib.llama_model_tensor_override))
    log.clear()
    status = lib.llama_model_quantize(str(source).encode(), str(destination).encode(), ctypes.byref(params))
    del keep_alive
    if status != 0:
        raise InputError(f"llama.cpp cannot quantize {source.name}: {log.last()}")


def rounded(values: FloatArray, kind: str, importance: FloatArray | None) -> FloatArray:
    """What a matrix is after it was stored in a type; arguments as for `stored`."""
    return dequantized(stored(values, kind, importance), kind)


def stored(values: FloatArray, kind: str, importance: FloatArray | None) -> npt.NDArray[np.uint8]:
    """A matrix in a type, (rows, bytes of a row).

    Args:
        values: (rows, in_features) float32; rows divide into the type's blocks.
        kind: ggml's name of the type.
        importance: Mean squared inputs, (in_features,); ggml ends the process for a type that it cannot make without.
    """
    import gguf

    ggml_type = gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[ggml_type]
    rows, columns = values.shape
    values = np.ascontiguousarray(values, dtype=np.float32)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    data = np.empty((rows, columns // elements * size), dtype=np.uint8)
    address = None if weights is None else weights.ctypes.data_as(_FLOATS)
    _quantize_chunk()(
        int(ggml_type), values.ctypes.data_as(_FLOATS), data.ctypes.data, 0, rows, columns, address
    )
    return data


def dequantized(data: npt.NDArray[np.uint8], kind: str) -> FloatArray:
    """Values (rows, in_features) float32 of what is stored, (rows, bytes of a row), in a type of ggml's name."""
    import gguf

    return np.asarray(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]), dtype=np.float32)


@functools.cache
def _quantize_chunk() -> Any:
    """ggml's own function, which the quantizer calls for a tensor's rows."""
    library()
    from llama_cpp._ggml import libggml

    function = libggml.ggml_quantize_chunk
    integer = ctypes.c_int64
    function.argtypes = [ctypes.c_int, _FLOATS, ctypes.c_void_p, integer, integer, integer, _FLOATS]
    function.restype = ctypes.c_size_t
    return function


def _imatrix_array(imatrix: Mapping[str, FloatArray]) -> tuple[Any, list[Any]]:
    """A C array ended by an entry without a name, and the Python objects whose memory it points to."""
    lib = library()
    entries = (lib.llama_model_imatrix_data * (len(imatrix) + 1))()
    keep_alive: list[Any] = []
    for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
        data, raw = np.ascontiguousarray(values, dtype=np.float32), name.encode()
        entry.name, entry.size = raw, data.size
        entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        keep_alive += [data, raw]
    return entries, keep_alive
