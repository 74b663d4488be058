"""Names, order and limits of what is measured."""

from __future__ import annotations

import pytest

from cfsp.errors import InputError
from runtime_bench.records.jsonl import BOUNDS
from runtime_bench.workload import BenchSettings, Workload, workloads_of


@pytest.mark.parametrize(
    ("workload", "test", "n_ctx"),
    [
        (Workload("pp", n_prompt=512), "pp512", 512),
        (Workload("tg", n_gen=128), "tg128", 128),
        (Workload("pp", n_prompt=512, n_depth=1024), "pp512 @ d1024", 1536),
        (Workload("ttft", n_prompt=64, n_gen=1), "ttft64", 65),
        (Workload("load"), "load", 1),
    ],
)
def test_names_are_llama_benchs(workload: Workload, test: str, n_ctx: int) -> None:
    assert workload.test == test
    assert workload.n_ctx == n_ctx


def test_workloads_come_once_and_zero_leaves_out() -> None:
    settings = BenchSettings(n_prompt=(0, 64, 64), n_gen=(16,), ttft=(0,), load=False, n_depth=(0, 32))
    assert [w.test for w in workloads_of(settings)] == ["pp64", "tg16", "pp64 @ d32", "tg16 @ d32"]


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(InputError, match="nothing to measure"):
        workloads_of(BenchSettings(n_prompt=(0,), n_gen=(), ttft=(), load=False))


def test_all_wrong_settings_are_reported_together() -> None:
    with pytest.raises(InputError) as caught:
        BenchSettings(
            n_prompt=(-1,),
            n_threads=(0,),
            n_depth=(),
            repetitions=0,
            timeout_s=float("nan"),
            spread_limit=1.0,
        )
    names = ("n_prompt", "n_threads", "n_depth", "repetitions", "timeout_s", "spread_limit")
    assert all(f"{name}: " in str(caught.value) for name in names)
    assert "n_gen: " not in str(caught.value)


def test_threads_default_to_the_usable_cores_and_come_once() -> None:
    assert BenchSettings(n_threads=(4, 1, 4)).threads(cores=8) == (4, 1)
    assert BenchSettings().threads(cores=8) == (8,)
    assert BenchSettings().threads(cores=None) == (1,)


def test_no_more_samples_are_taken_than_a_record_holds() -> None:
    for name in ("repetitions", "samples_per_process"):
        BenchSettings(**{name: BOUNDS.items})  # type: ignore[arg-type]
        with pytest.raises(InputError, match=name.replace("_", ".")):
            BenchSettings(**{name: BOUNDS.items + 1})  # type: ignore[arg-type]
