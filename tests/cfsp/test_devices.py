"""Models on a device: what would run on a GPU runs on one that is none, and gives the CPU's bits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from far_device import FarTensor, brought, far_device, send

from cfsp.devices import OR_NARROW, find_device, moved
from cfsp.errors import InputError
from cfsp.evaluation.language_model import Branches
from cfsp.evaluation.loss import Divergence, divergence, perplexity
from cfsp.evaluation.torch_model import TorchLanguageModel
from cfsp.models.checkpoint import open_pruned, save_checkpoint
from cfsp.models.offload import Keeping
from cfsp.models.reference import load_model
from cfsp.models.source import LoadedModel
from cfsp.pruning.prune import PruneResult, prune_model
from cfsp.pruning.settings import PruneSettings
from cfsp.text.calibration import Calibration
from cfsp.text.self_sampling import generate
from cfsp.text.tokens import TokenWindows
from phoneready.main import main

Far = Callable[[], AbstractContextManager[torch.device]]
TinyLoaded = Callable[..., LoadedModel]
ROOT = Path(__file__).resolve().parents[2]
IDS = torch.randint(0, 300, (6, 32), generator=torch.Generator().manual_seed(1))
WINDOWS = TokenWindows(IDS, "random", "0" * 64)


@pytest.fixture
def eager(tiny_loaded: TinyLoaded) -> Callable[[], LoadedModel]:
    """Models whose attention is the same operations everywhere."""

    def make() -> LoadedModel:
        loaded = tiny_loaded()
        loaded.model.set_attn_implementation("eager")
        return loaded

    return make


@pytest.fixture(params=[True, False], ids=["float64", "no-float64"])
def far(request: pytest.FixtureRequest) -> Far:
    """A device like CUDA, and one like Apple's MPS."""
    return partial(far_device, float64=request.param)


def pruned(loaded: LoadedModel, settings: PruneSettings) -> PruneResult:
    return prune_model(loaded, Calibration(IDS, ("random",), 0, "0" * 64), settings)


def of_windows(found: Divergence) -> list[Any]:
    """Its numbers, and those of each window."""
    values = asdict(found)
    lists = {name: value for name, value in values.items() if isinstance(value, tuple)}
    return [{name: value for name, value in values.items() if name not in lists}, *lists.values()]


@pytest.mark.parametrize("how", [{}, {"kv_groups": 0.25, "attentions": 1, "blocks": 1, "vocabulary": 300}])
def test_a_model_is_pruned_where_it_is(
    how: dict[str, Any], eager: Callable[[], LoadedModel], far: Far
) -> None:
    settings = PruneSettings(**{"prune_ratio": 0.25, **how})
    here = pruned(eager(), settings)
    with far():
        loaded = eager()
        send(loaded.model)
        there = pruned(loaded, settings)
    assert there.plan == replace(here.plan, device=there.plan.device)
    assert (here.plan.device, there.plan.device) == (None, "meta")
    weights = here.loaded.model.state_dict()
    for name, tensor in there.loaded.model.state_dict().items():
        assert isinstance(tensor, FarTensor), name
        assert torch.equal(brought(tensor), weights[name]), name
    for name, moments in there.input_moments.items():
        assert torch.equal(moments, here.input_moments[name]), name


def test_a_model_is_judged_where_it_is(
    eager: Callable[[], LoadedModel], tiny_loaded: TinyLoaded, far: Far
) -> None:
    items = [Branches((5, 6, 7), ((8, 9), (10,)))]

    def judged(loaded: LoadedModel, other: LoadedModel) -> list[Any]:
        model = TorchLanguageModel(loaded)
        (scores,) = model.score(items)
        return [
            {"perplexity": perplexity(model, WINDOWS)},
            *of_windows(divergence(TorchLanguageModel(other), model, WINDOWS)),
            *of_windows(divergence(model, TorchLanguageModel(other), WINDOWS)),
            *(score._asdict() for score in scores),
            {"ids": generate(loaded, [[5, 6], [7, 8, 9]], 4, do_sample=False)},
        ]

    other = tiny_loaded(seed=1)
    here = judged(eager(), other)
    with far():
        loaded = eager()
        send(loaded.model)
        there = judged(loaded, other)
    for one, same in zip(there, here, strict=True):
        assert one == (same if isinstance(same, dict) and "ids" in same else pytest.approx(same, rel=1e-5))


def test_devices_that_are_none() -> None:
    for name in ("gpu", "cuda:x", "mps:1", "cuda:999", "cuda:01", "CUDA", "cpu\n"):
        with pytest.raises(InputError, match="device"):
            find_device(name)


def test_the_cpu_is_always_there() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("fill", "said"),
    [
        (lambda: bytearray(2**62), "too little memory"),
        (lambda: raised(torch.OutOfMemoryError("CUDA out of memory")), "the device `cpu`"),
    ],
)
def test_too_little_memory_is_no_bug(
    fill: Callable[[], Any],
    said: str,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("cfsp.models.reference.load_model", lambda *args, **options: fill())
    assert main(["prune", "smollm2-135m", "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "()" not in error
    assert "error:" in error.splitlines()[-1]  # behind what it would take, on a busy machine
    assert error.count("error:") == 1
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def raised(error: Exception) -> None:
    raise error


def test_a_full_gpu_is_told_of_16_bits_only_where_they_help(
    tiny_loaded: TinyLoaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, gpu = tiny_loaded(), torch.device("meta")
    for name, dtype in (("wide", torch.float32), ("narrow", torch.bfloat16)):
        save_checkpoint(replace(loaded, stored_dtype=dtype), tmp_path / name)
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    monkeypatch.setattr("cfsp.devices._FREE_BYTES", {"meta": lambda _: 0})
    asked: list[tuple[Callable[[], Any], str]] = [
        (lambda: load_model(wide, device=gpu), OR_NARROW),
        (lambda: load_model(wide, device=gpu, dtype="bfloat16"), "cpu"),
        (lambda: open_pruned(narrow, gpu), OR_NARROW),
        (lambda: open_pruned(narrow, gpu, Keeping(torch.bfloat16)), "cpu"),
        (lambda: open_pruned(wide, gpu), "cpu"),  # an export takes what the files have
        (lambda: moved(loaded.model, gpu).__enter__(), "cpu"),
    ]
    for ask, instead in asked:
        with pytest.raises(InputError) as raised:
            ask()
        assert str(raised.value).endswith(f"allowed: {instead}")
