"""Rates of a device from rows measured on it: found again, held against left-out files, used by projections."""

from __future__ import annotations

import datetime
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cfsp.errors import InputError
from cfsp.files import sha256_file
from phoneready.main import main
from runtime_bench.devices import rates
from runtime_bench.devices.calibration import calibrate, calibrated_profile, profile_text
from runtime_bench.devices.model_facts import gguf_facts
from runtime_bench.devices.profile import load_profiles, read_profile
from runtime_bench.devices.projection import project
from runtime_bench.devices.rates import Rates, Timed, fit
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.engine_settings import EngineSettings
from runtime_bench.records.jsonl import append_jsonl
from runtime_bench.workload import Workload

TRUE = Rates({"Q8_0": 8.0, "Q4_0": 6.0, "Q5_1": 2.0}, 5.0)
DEVICE = "oneplus-12"
GB_S, GWEIGHTS_S = 4.0, 20.0
"""What the device of the made-up records does."""


def rows(count: int, noise: float = 0.0, seed: int = 0) -> list[Timed]:
    rng = random.Random(seed)
    made = []
    for number in range(count):
        amounts = {kind: rng.uniform(0.1, 2.0) for kind in rng.sample(sorted(TRUE.by_type), 2)}
        seconds = TRUE.seconds(amounts) * math.exp(rng.gauss(0, noise))
        made.append(Timed(f"{number}.gguf", "tg32", amounts, seconds))
    return made


def test_the_rates_of_types_are_found_again() -> None:
    fitted = fit(rows(12))
    for kind, rate in TRUE.by_type.items():
        assert fitted.rates.by_type[kind] == pytest.approx(rate, rel=0.05)
    assert fitted.median_error < 0.03
    assert fitted.n_files == 12


def test_a_type_that_no_row_has_gets_the_rate_of_the_others() -> None:
    fitted = fit(rows(12))
    assert fitted.rates.seconds({"IQ4_NL": 3.0}) == pytest.approx(3.0 / fitted.rates.others)


def test_what_is_said_of_a_left_out_row_does_not_know_it() -> None:
    plain = rows(8, noise=0.05)
    changed = [replace(row, seconds=3 * row.seconds) if row.file == "3.gguf" else row for row in plain]
    (before,) = (one for one in fit(plain).left_out if one.row.file == "3.gguf")
    (after,) = (one for one in fit(changed).left_out if one.row.file == "3.gguf")
    assert (after.seconds, after.within) == (before.seconds, before.within)
    assert after.ratio == pytest.approx(3 * before.ratio)
    assert not after.is_inside


def test_all_rows_of_a_file_are_left_out_together() -> None:
    plain = rows(6, noise=0.05)
    again = [replace(row, test="tg64", seconds=row.seconds * 1.01) for row in plain]
    both = fit([*plain, *again])
    assert [one.seconds for one in both.left_out[:6]] == [one.seconds for one in both.left_out[6:]]


def test_the_interval_holds_what_it_says_of_rows_that_it_has_not_seen() -> None:
    inside = [one.is_inside for seed in range(6) for one in fit(rows(14, noise=0.1, seed=seed)).left_out]
    assert 0.8 <= sum(inside) / len(inside) <= 0.98


def test_fewer_than_three_files_are_refused() -> None:
    with pytest.raises(InputError, match="too few files to leave one out"):
        fit(rows(2))


@pytest.mark.parametrize(("count", "share"), [(3, 0.75), (8, 8 / 9), (9, 0.9), (12, 0.9)])
def test_few_files_promise_less(count: int, share: float) -> None:
    assert fit(rows(count)).holds == pytest.approx(share)


def test_each_fit_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(given: Sequence[Timed]) -> Rates:
        made.append(len(given))
        return solve(given)

    solve = rates._fit
    monkeypatch.setattr(rates, "_fit", counted)
    fit([replace(row, test=test) for row in rows(5) for test in ("tg32", "tg64", "tg128")])
    assert sorted(made) == [9] * 10 + [12] * 5 + [15]


def test_every_profile_comes_back_from_its_text(tmp_path: Path) -> None:
    for entry in load_profiles(tmp_path).values():
        path = tmp_path / f"{entry.profile.id}.toml"
        path.write_text(profile_text(entry.profile), encoding="utf-8")
        assert read_profile(path) == entry.profile


@pytest.fixture(scope="module")
def files(tiny_gguf: Callable[..., Path]) -> list[Path]:
    return [tiny_gguf("llama", intermediate_size=width) for width in (64, 128, 192, 256)]


@pytest.fixture
def measured(files: list[Path], make_record: Callable[..., BenchRecord]) -> list[BenchRecord]:
    """What `bench --record` leaves of a device that reads GB_S and multiplies GWEIGHTS_S."""
    records = []
    for path in files:
        facts = gguf_facts(path)
        about = {
            "model_filename": str(path),
            "file_sha256": sha256_file(path),
            "target": "adb:X",
            "n_threads": 4,
        }
        ns = {
            Workload("tg", n_gen=32): 32
            * (facts.bytes_by_type["F32"] + 16 * 4 * facts.key_value_width)
            / GB_S,
            Workload("pp", n_prompt=64): 64 * sum(facts.prompt_weights.values()) / GWEIGHTS_S,
            Workload("load"): 1000,
        }
        records += [make_record(test, samples_ns=(round(took),) * 5, **about) for test, took in ns.items()]
    return records


def test_weights_of_a_prompt_are_those_of_blocks(tiny_gguf: Callable[..., Path]) -> None:
    tied, apart = (gguf_facts(tiny_gguf("llama", tied)) for tied in (True, False))
    assert tied.prompt_weights == apart.prompt_weights
    assert sum(tied.prompt_weights.values()) == tied.n_multiplied - 384 * 64


def test_a_device_is_calibrated_from_its_records(measured: list[BenchRecord]) -> None:
    found = calibrate(measured)
    assert (found.target, found.n_threads, found.left_out) == ("adb:X", 4, ())
    assert found.decode is not None
    assert found.prefill is not None
    assert found.decode.rates.by_type["F32"] == pytest.approx(GB_S, rel=0.05)
    assert found.prefill.rates.by_type["F32"] == pytest.approx(GWEIGHTS_S, rel=0.05)
    assert max(found.decode.median_error, found.prefill.median_error) < 0.01


def test_rows_that_say_nothing_of_the_device_are_not_read(
    measured: list[BenchRecord], make_record: Callable[..., BenchRecord]
) -> None:
    strange = [
        replace(measured[0], kind="constrained-host"),
        replace(measured[0], engine="onnxruntime"),
        replace(measured[0], degenerate="loop"),
        replace(measured[0], engine_settings=EngineSettings("q8_0")),
        replace(measured[0], backends="CUDA0"),
        replace(measured[0], n_gen=0, test="tg0"),
    ]
    found = calibrate([*measured, *strange])
    plain = calibrate(measured)
    assert found.fits == plain.fits
    assert [why.partition(":")[0] for _, why in found.left_out] == [
        *("not measured there", "of onnxruntime", "without a speed", "with a quantized cache", "on CUDA0"),
        "without tokens",
    ]


def test_places_and_thread_counts_are_not_mixed(measured: list[BenchRecord]) -> None:
    elsewhere = [replace(record, target="ssh:pi") for record in measured]
    with pytest.raises(InputError, match=r"target.*adb:X, ssh:pi"):
        calibrate([*measured, *elsewhere])
    assert calibrate([*measured, *elsewhere], target="ssh:pi").target == "ssh:pi"
    fewer = [replace(record, n_threads=2) for record in measured]
    with pytest.raises(InputError, match=r"threads.*2, 4"):
        calibrate([*measured, *fewer])
    assert calibrate([*measured, *fewer], n_threads=2).n_threads == 2
    with pytest.raises(InputError, match="no row of pp or tg"):
        calibrate(measured, target="nowhere")


def test_a_file_under_two_names_is_one_file(measured: list[BenchRecord], tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(Path(measured[0].model_filename).read_bytes())
    again = [replace(record, model_filename=str(other)) for record in measured[:2]]
    found = calibrate([*measured, *again]).decode
    assert found is not None
    assert (found.n_files, len(found.left_out)) == (4, 5)


def test_rates_that_no_profile_has_are_bad_input(measured: list[BenchRecord]) -> None:
    found = calibrate(measured)
    assert found.decode is not None
    wild = replace(found, decode=replace(found.decode, within=1000.0))
    with pytest.raises(InputError, match=r"the rates of these rows: within"):
        calibrated_profile(load_profiles()[DEVICE].profile, wild, "rows", datetime.date(2026, 1, 1))


def test_another_file_of_the_name_is_refused(measured: list[BenchRecord], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not there; allowed: the folder of the measured files"):
        calibrate(measured, tmp_path)
    (tmp_path / "tiny-model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="is not the file that was measured"):
        calibrate(measured, tmp_path)


def test_the_command_writes_a_profile_whose_projections_are_narrow(
    measured: list[BenchRecord],
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PHONEREADY_DEVICES", str(tmp_path / "own"))
    append_jsonl(tmp_path / "bench.jsonl", measured)
    command = ["devices", "calibrate", DEVICE, "--records", str(tmp_path / "bench.jsonl")]
    before = load_profiles()[DEVICE].profile
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "Left out, 4 files: median error 0." in text
    assert f"Written to {tmp_path / 'own' / DEVICE}.toml." in text
    after = load_profiles()[DEVICE]
    assert not after.built_in
    figure = after.profile.decode_gb_s
    assert (figure.basis, figure.value is not None) == ("measured", True)
    assert str(figure.source).startswith("bench.jsonl (SHA-256 ")
    assert str(figure.source).endswith("llama.cpp on adb:X, 4 threads")
    assert after.profile.dram_sustained_gb_s == before.dram_sustained_gb_s
    assert "(80% of rows)" in text
    assert after.profile.soc == before.soc
    facts = gguf_facts(files[-1])
    wide, narrow = (project(profile, facts, 64) for profile in (before, after.profile))
    for name in ("decode", "prefill"):
        bands = [getattr(projection, name) for projection in (wide, narrow)]
        assert bands[1].high / bands[1].low < 1.3 < bands[0].high / bands[0].low
    assert narrow.decode is not None
    assert narrow.decode.low < 1e9 * GB_S / facts.bytes_by_type["F32"] < 1.02 * narrow.decode.high

    content = after.file.read_bytes()
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert after.file.read_bytes() == content
    assert main([*command, "--force", "--json"]) == 0
    fits = json.loads(capsys.readouterr().out)["fits"]
    assert fits["decode_gb_s"]["median_error"] < 0.01
