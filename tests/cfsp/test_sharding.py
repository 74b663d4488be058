"""Weights that processes share out: what they hold, when they do, and that no family trains otherwise for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import distributed

from cfsp.devices import CPU
from cfsp.errors import InputError
from cfsp.forecast import Extent
from cfsp.models.architectures import ARCHITECTURES, decoder_layers
from cfsp.models.weights import cast_weights
from cfsp.recovery.settings import RecoverySettings
from cfsp.recovery.sharding import is_sharded, put_back, shard_out, whole
from cfsp.recovery.shares import is_to_be_sharded, training_bytes
from cfsp.recovery.student import Student, Teacher

TinyModel = Callable[..., tuple[Any, Any]]


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group that has this process in it."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def extent(*widths: int) -> Extent:
    return Extent(tuple(((width, 64), (64, width)) for width in widths), 1000, 64, tied=True)


def student_of(tiny_model: TinyModel, model_type: str, dtype: torch.dtype, *, sharded: bool) -> Student:
    """A student and its teacher, whose weights differ."""
    model, dense = (tiny_model(model_type, seed=seed)[0] for seed in (0, 1))
    teacher = Teacher(dense.requires_grad_(False)).eval()
    cast_weights(teacher, dtype)
    student = Student(model, RecoverySettings(loss="both"), dtype, teacher)
    if sharded:
        shard_out(teacher, dense, lambda _: None, CPU, dtype=dtype, products=dtype)
        shard_out(student, model, lambda _: None, CPU, dtype=torch.float32, products=dtype, methods=["sums"])
    return student


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_family_has_the_same_losses_and_gradients_block_by_block(
    one_process: None, tiny_model: TinyModel, model_type: str, dtype: torch.dtype
) -> None:
    ids = torch.arange(3, 43)[None]
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1)}
    plain, sharded = (student_of(tiny_model, model_type, dtype, sharded=it) for it in (False, True))
    assert all(map(is_sharded, decoder_layers(sharded.causal_lm)))
    assert torch.equal(plain.sums(batch), sharded.sums(batch))
    put_back(sharded)
    for student in (plain, sharded):
        student(**batch).backward()
    wanted = {name: p.grad for name, p in plain.trainable() if p.grad is not None}
    found = {name: whole(p.grad) for name, p in sharded.trainable() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        tolerance = (1e-6 if dtype == torch.float32 else 2e-2) * float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, atol=tolerance, rtol=0)


def test_memory_of_sharded_training_is_shared_but_for_what_is_whole_for_a_while() -> None:
    settings, teacher = (
        RecoverySettings(method="full", loss="both", seqlen=2, batch_size=1),
        extent(*[1024] * 40),
    )
    student = extent(*[512] * 40)
    one, two, many = (training_bytes(settings, student, teacher, shares=n) for n in (1, 2, 1000))
    assert one > 16 * student.n_weights + 4 * teacher.n_weights
    assert one / 2 < two < 0.6 * one
    # A block and the embedding, of the student with their gradients.
    assert many > 8 * (64_000 + 2 * 64 * 512) + 4 * (64_000 + 2 * 64 * 1024)
    muon = training_bytes(replace(settings, optimizer="muon"), student, teacher)
    assert one - muon == 4 * student.block_weights
    adapters = training_bytes(replace(settings, method="lora"), student, None)
    assert adapters < one / 4
    assert adapters - training_bytes(replace(settings, method="lora", batch_size=2), student, None) < 0


@pytest.mark.parametrize(
    ("asked", "settings", "processes", "sharded"),
    [
        ("never", {"method": "full"}, 2, False),
        ("always", {"method": "lora"}, 2, True),
        ("auto", {"method": "full", "batch_size": 2**16, "seqlen": 2**20}, 1, False),
        ("auto", {"method": "full", "batch_size": 2**16, "seqlen": 2**20}, 2, True),
        ("auto", {"method": "full"}, 2, False),
        ("auto", {"for_quant": "Q4_0", "batch_size": 2**16, "seqlen": 2**20}, 2, False),
    ],
)
def test_when_weights_are_shared_out(
    one_process: None, asked: str, settings: dict[str, Any], processes: int, sharded: bool
) -> None:
    student = extent(64, 64)
    where = {"dtype": torch.float32, "device": CPU, "processes": processes}
    extents = (lambda: (student, None)) if asked == "auto" else lambda: pytest.fail("files are read")
    assert is_to_be_sharded(asked, RecoverySettings(**settings), extents, **where) == sharded


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        ({}, 1, "there is one process alone .*; allowed: auto, never"),
        ({"for_quant": "Q4_0"}, 2, "through a rounding is not shared out .*; allowed: auto, never"),
    ],
)
def test_weights_that_cannot_be_shared_out(settings: dict[str, Any], processes: int, message: str) -> None:
    where = {"dtype": torch.float32, "device": CPU, "processes": processes}
    with pytest.raises(InputError, match=message):
        is_to_be_sharded("always", RecoverySettings(**settings), lambda: (extent(8), None), **where)
