"""Facts of files, projected memory against measured memory, and bands that know what they rest on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cfsp.errors import InputError
from runtime_bench.devices import (
    MIB,
    DeviceProfile,
    Memory,
    gguf_facts,
    project,
    project_memory,
)
from runtime_bench.engines import SessionSettings
from runtime_bench.measuring.measure import run_bench
from runtime_bench.process import run_worker
from runtime_bench.worker import WorkerRequest
from runtime_bench.workload import BenchSettings, Workload

FIGURES: dict[str, Any] = {
    "soc": "A chip",
    "cores": [
        {"core": "Cortex-A76", "count": 2, "max_mhz": 2000},
        {"core": "Cortex-A55", "count": 6, "max_mhz": 1800},
    ],
    "isa": ["asimd", "dotprod"],
    "ram_mib": 4096,
    "dram_gb_s": 20.0,
    "dram_sustained_gb_s": None,
    "app_memory_mib": None,
}


def device(**changes: Any) -> DeviceProfile:
    head = {"schema_version": 1, "id": "x", "name": "X", "form": "phone", "tier": "budget", "os": "android"}
    known = {"basis": "vendor", "source": "a data sheet", "date": "2026-01-01"}
    figures = {
        name: {"basis": "unknown"} if value is None else {"value": value} | known
        for name, value in (FIGURES | changes).items()
    }
    return DeviceProfile.model_validate(head | figures)


@pytest.mark.parametrize("tied", [True, False])
def test_facts_are_the_files_own(tiny_gguf: Callable[..., Path], tied: bool) -> None:
    facts = gguf_facts(tiny_gguf("llama", tied))
    block = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128
    table = 384 * 64
    assert facts.n_multiplied == 4 * block + table
    norms = (2 * 4 + 1) * 64
    assert facts.weight_bytes == 4 * (facts.n_multiplied + norms + (0 if tied else table))
    # A table that is only looked up is not read for every token.
    assert facts.read_bytes == 4 * (facts.n_multiplied + norms)
    assert facts.key_value_width == 4 * 2 * (16 + 16)
    assert (facts.hidden_size, facts.ffn_width) == (64, 128)
    assert (facts.vocab_size, facts.context_length) == (384, 512)


def test_a_file_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF but no more")
    with pytest.raises(InputError):
        gguf_facts(path)


def test_a_longer_context_costs_what_is_projected(smollm2_gguf: Path) -> None:
    settings = BenchSettings(
        n_batch=512,  # what llama.cpp keeps of a larger one counts, too: 1.5 MiB for 2048 tokens
        check_text=False,
        n_prompt=(512,),
        n_gen=(),
        ttft=(),
        load=False,
        n_depth=(0, 2560),
        repetitions=1,
        n_threads=(1,),
    )
    measured = {r.n_depth + r.n_prompt: r.peak_rss_bytes for r in run_bench([smollm2_gguf], settings)}
    facts = gguf_facts(smollm2_gguf)
    projected = {n_ctx: project_memory(facts, n_ctx, ()).total for n_ctx in measured}
    found, expected = (int(x[3072] or 0) - int(x[512] or 0) for x in (measured, projected))
    assert found == pytest.approx(expected, rel=0.03)


def test_a_cache_takes_what_the_blocks_of_its_type_take(smollm2_gguf: Path) -> None:
    cache_type = "q4_0"
    facts, peaks = gguf_facts(smollm2_gguf), []
    for n_ctx in (1024, 8000):
        session = SessionSettings(n_ctx, 1, 512, 512, cache_type)
        result = run_worker(
            WorkerRequest(str(smollm2_gguf), "llama.cpp", Workload("tg", n_gen=4), session), 120
        )
        assert result.peak_rss_bytes is not None, result.error
        peaks.append(result.peak_rss_bytes)
    short, long = (project_memory(facts, n_ctx, (), cache_type=cache_type).cache for n_ctx in (1024, 8000))
    assert peaks[1] - peaks[0] == pytest.approx(long - short, rel=0.03)


def test_the_cache_has_room_for_whole_cells(tiny_gguf: Callable[..., Path]) -> None:
    facts = gguf_facts(tiny_gguf())
    one, cell, more = (project_memory(facts, n_ctx, ()).cache for n_ctx in (1, 256, 257))
    assert one == cell < more


def test_repacked_weights_depend_on_the_processor(smollm2_gguf: Path) -> None:
    facts = gguf_facts(smollm2_gguf)
    blocks, head = facts.bytes_by_type["Q4_1"], facts.bytes_by_type["Q8_0"]
    assert project_memory(facts, 512, ["dotprod"]).repacked == head
    assert project_memory(facts, 512, ["amx_int8", "avx2"]).repacked == round(blocks + head * 38 / 34)
    assert project_memory(facts, 512, []).repacked == 0


def test_speed_is_a_band_of_what_the_device_could_do(tiny_gguf: Callable[..., Path]) -> None:
    facts = gguf_facts(tiny_gguf())
    found = project(device(), facts, 256)
    assert found.decode is not None
    assert found.decode.high == pytest.approx(0.70 * 20e9 / facts.read_bytes)
    full = facts.read_bytes + 2 * 256 * facts.key_value_width
    assert found.decode.low == pytest.approx(0.30 * 20e9 / full)
    # Two fast cores with two vector units of 32 operations; the six slow ones are left out.
    assert found.prefill is not None
    assert found.prefill.high == pytest.approx(0.30 * 2 * 2e9 * 2 * 32 / (2 * facts.n_multiplied))
    assert found.limit_bytes == int(0.65 * 4096 * MIB)
    assert found.fits
    faster = project(device(isa=["asimd", "dotprod", "i8mm"]), facts, 256).prefill
    assert faster is not None
    assert faster.high == pytest.approx(2 * found.prefill.high)


def test_an_applications_own_limit_comes_first(tiny_gguf: Callable[..., Path]) -> None:
    found = project(device(app_memory_mib=64), gguf_facts(tiny_gguf()), 512)
    assert found.limit_bytes == 64 * MIB
    assert found.fits == (found.memory.needed <= 64 * MIB)


def test_mapped_weights_can_be_dropped_and_the_rest_cannot() -> None:
    memory = Memory(weights=100, repacked=40, cache=20, buffers=10, process=30, replaced=40)
    assert (memory.total, memory.needed) == (200, 160)
    assert [memory.verdict(limit) for limit in (200, 160, 159, 100, 99)] == [
        *("fits", "fits", "thrashes", "thrashes", "does not fit")
    ]


def test_repacked_weights_take_the_place_of_the_files(smollm2_gguf: Path) -> None:
    facts = gguf_facts(smollm2_gguf)
    plain = project_memory(facts, 512, [])
    assert (plain.repacked, plain.replaced) == (0, 0)
    assert plain.needed == plain.total
    amx = project_memory(facts, 512, ["amx_int8"])
    # Q8_0 grows when it is repacked, Q4_1 does not.
    assert amx.replaced == facts.bytes_by_type["Q4_1"] + facts.bytes_by_type["Q8_0"]
    assert amx.needed == plain.needed - amx.replaced + amx.repacked > plain.needed


def test_float16_is_copied_for_amx_and_read_from_the_file_too(smollm2_gguf: Path) -> None:
    facts = replace(gguf_facts(smollm2_gguf), bytes_by_type={"F16": 1000, "F32": 10})
    plain, amx = (project_memory(facts, 512, features) for features in ([], ["amx_int8"]))
    assert (amx.repacked, amx.replaced) == (1000, 0)
    assert amx.needed == plain.needed + 1000


@pytest.mark.parametrize(
    ("missing", "unknown"),
    [
        ({"dram_gb_s": None}, "decode"),
        ({"cores": None}, "prefill"),
        ({"isa": None}, "prefill"),
        ({"cores": [{"core": "Cortex-A76", "count": 2}]}, "prefill"),
        ({"cores": [{"core": "A new core", "count": 2, "max_mhz": 2000}]}, "prefill"),
        ({"ram_mib": None}, "fits"),
    ],
)
def test_what_rests_on_an_unknown_figure_is_unknown(
    tiny_gguf: Callable[..., Path], missing: dict[str, Any], unknown: str
) -> None:
    found = project(device(**missing), gguf_facts(tiny_gguf()), 256)
    values = {"decode": found.decode, "prefill": found.prefill, "fits": found.fits}
    assert values.pop(unknown) is None
    assert None not in values.values()
    assert any("unknown" in line or "neither" in line for line in found.assumptions)
