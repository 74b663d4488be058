"""Numbers of few bits that are chosen on a device: on one that is none the files are the CPU's, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from far_device import FAR, far_device
from torch.nn.attention import SDPBackend, sdpa_kernel

from exporters.family import ExportOptions
from exporters.onnx.quantize import QuantizedModel, choose_eight_bits, measure, rounded_model, tune
from exporters.onnx.variants import INT4

pytestmark = pytest.mark.usefixtures("no_avx512_bf16")  # a device that is not there has none

MakeCheckpoint = Callable[..., Path]
# Of few tokens, so that inputs depend on each other, as those of trained models do.
IDS = torch.randint(0, 24, (4, 64), generator=torch.Generator().manual_seed(3))


@contextmanager
def computing(device: str, float64: bool = True) -> Iterator[None]:
    """The same operations everywhere: devices have attention kernels of their own."""
    far = far_device(float64=float64) if device == FAR.type else nullcontext()
    with sdpa_kernel(SDPBackend.MATH), far:
        yield


PLACES = (("cpu", True), (FAR.type, True), (FAR.type, False))
"""Devices, and whether they have float64."""


@pytest.mark.parametrize(
    ("quant", "settings"),
    [
        pytest.param("Q4_0", {}, marks=pytest.mark.everything),
        pytest.param("IQ4_NL", {"tune_scales": True}, marks=pytest.mark.everything),
        pytest.param("Q6_K", {}, marks=pytest.mark.everything),
        ("Q3_K_M", {"use_imatrix": False}),
        pytest.param("mixed:130kB", {}, marks=pytest.mark.everything),
    ],
)
def test_a_gguf_file(
    quant: str, settings: dict[str, Any], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    from exporters.gguf.files import draft_gguf

    checkpoint, written = make_checkpoint("llama"), []
    for device, float64 in PLACES:
        folder = tmp_path / f"{device}-{float64}"
        folder.mkdir()
        options = ExportOptions(name="m", calibration=IDS, device=device, n_threads=1, **settings)
        with computing(device, float64):
            files = draft_gguf(checkpoint, folder, [quant], options)
        written += [path.read_bytes() for path in files.values()]
    assert written[0] == written[1] == written[2]


@pytest.mark.everything
def test_an_onnx_variant(tiny_model: Callable[..., Any]) -> None:
    made = []
    for device, float64 in PLACES:
        model = tiny_model()[0]
        model.set_attn_implementation("eager")
        with computing(device, float64):
            losses = measure(model, INT4, IDS, device=device)
            names = choose_eight_bits(model, INT4, losses)
            mixture = rounded_model(model, INT4, names, IDS, device=device)
            model.to(device)
            model.tie_weights()
            made.append((losses, tune(model, mixture, IDS)))
    (losses, here), *elsewhere = made
    for its, there in elsewhere:
        assert its == losses
        assert_equal(here, there)


def assert_equal(here: QuantizedModel, there: QuantizedModel) -> None:
    for name, layer in here.layers.items():
        assert torch.equal(layer.q, there.layers[name].q), name
        assert torch.equal(layer.scales, there.layers[name].scales), name
    assert here.norms is not None
    for name, norm in here.norms.items():
        assert torch.equal(norm, there.norms[name]), name
