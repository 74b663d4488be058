"""A device's own rates from rows that were measured on it, and the profile that has them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from cfsp.errors import InputError
from cfsp.files import sha256_file
from cfsp.validation import describe_problems
from exporters.gguf.cache_types import CACHE_TYPES, DEFAULT_CACHE
from runtime_bench.devices.model_facts import ModelFacts, gguf_facts
from runtime_bench.devices.profile import FIGURES, DeviceProfile, Figure, TypeRates
from runtime_bench.devices.rates import KEYS_AND_VALUES, Amounts, Fitted, Timed, fit
from runtime_bench.records import summary
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.crowding import crowding, has_processor_time, stealing
from runtime_bench.records.fairness import has_speed, unfair
from runtime_bench.workload import REGIMES

ENGINE = "llama.cpp"
"""Whose rows are read: an engine's rates are its own."""
_DIGITS = 4


@dataclass(frozen=True)
class Calibration:
    """Rates of one device, engine and number of threads.

    Attributes:
        decode: 10^9 bytes a second, of generated tokens; None without such rows.
        prefill: 10^9 weights a second, of prompts; None without such rows.
        n_threads: Of the rows.
        target: Where they were measured.
        left_out: Rows of pp and tg that were not read, and why.
    """

    decode: Fitted | None
    prefill: Fitted | None
    n_threads: int
    target: str
    left_out: tuple[tuple[str, str], ...]

    @property
    def fits(self) -> dict[str, Fitted]:
        """Those that there are, by the figure of a profile that they become."""
        found = {"decode_gb_s": self.decode, "prompt_gweights_s": self.prefill}
        return {name: fitted for name, fitted in found.items() if fitted is not None}


def calibrate(
    records: Sequence[BenchRecord],
    models: Path | None = None,
    *,
    target: str | None = None,
    n_threads: int | None = None,
) -> Calibration:
    """Fit the rates of a device.

    Args:
        records: What was measured on it; rows of pp and tg are read.
        models: Folder of the files, where they are not where the records say.
        target: Of several, the one to read.
        n_threads: Of several thread counts, the one to read.

    Raises:
        InputError: No usable rows, rows of several places or thread counts, too few files, or a file that is not
            there or is another one.
    """
    rated = [record for record in records if record.workload in _AMOUNTS]
    chosen = [
        record
        for record in rated
        if record.target == (target or record.target) and record.n_threads == (n_threads or record.n_threads)
    ]
    reasons = [(record, _why_not(record)) for record in chosen]
    rows = [record for record, why in reasons if why is None]
    left_out = tuple((f"{Path(r.model_filename).name} {r.test}", why) for r, why in reasons if why)
    place, threads = _one_place(rows)
    names = {r.file_sha256: r.model_filename for r in rows}  # one file may have been measured under several
    facts = {digest: _facts_of(name, rows, models) for digest, name in names.items()}
    timed = {kind: [_timed(r, facts[r.file_sha256]) for r in rows if r.workload == kind] for kind in _AMOUNTS}
    fits = {kind: fit(found) if found else None for kind, found in timed.items()}
    return Calibration(fits["tg"], fits["pp"], threads, place, left_out)


def _why_not(record: BenchRecord) -> str | None:
    """Why a row says nothing of the device; None where it does."""
    found, speed = unfair(record), has_speed(record)
    reasons = {
        f"not measured there: {record.kind}": record.kind != "measured",
        f"of {record.engine}": record.engine != ENGINE,
        f"on {record.backends}": record.backends not in (None, "CPU"),
        f"{found.verdict}: {found.reason}" if found else "": found is not None,
        "without a speed": not speed,
        "without tokens": record.n_tokens == 0,
        f"of {record.regime} runs": not REGIMES[record.regime].warmup,
        "with a quantized cache": record.quantized_cache is not None,
        "on a crowded machine": speed and record.n_threads > 1 and crowding(record) is not None,
        "on a host that took its cores": speed and stealing(record) is not None,
    }
    return next((why for why, holds in reasons.items() if holds), None)


def _one_place(rows: Sequence[BenchRecord]) -> tuple[str, int]:
    if not rows:
        raise InputError(f"no row of pp or tg says what a device does in {ENGINE}", field="records")
    for field, values in (
        ("target", {row.target for row in rows}),
        ("processor", {str(row.cpu_info) for row in rows}),
        ("threads", {str(row.n_threads) for row in rows}),
    ):
        if len(values) > 1:
            raise InputError(
                "the rows are of several, name one", field=field, value=", ".join(sorted(values))
            )
    return rows[0].target, rows[0].n_threads


def _facts_of(name: str, rows: Sequence[BenchRecord], models: Path | None) -> ModelFacts:
    """Sizes of a measured file, which must be the one that was measured."""
    path = Path(name) if models is None else models / Path(name).name
    if not path.is_file():
        raise InputError(f"{path} is not there", field="models", allowed="the folder of the measured files")
    known = {row.file_sha256 for row in rows if row.model_filename == name}
    if known != {sha256_file(path)}:
        raise InputError(f"{path} is not the file that was measured", field="models")
    return gguf_facts(path)


def _timed(record: BenchRecord, facts: ModelFacts) -> Timed:
    """A row as rates see it: in processor time where others held its single thread up, as comparisons are."""
    samples = record.cpu_samples_ns if has_processor_time(record) and crowding(record) else record.samples_ns
    median_ns = summary.median(samples) or 0.0
    amounts = _AMOUNTS[record.workload](record, facts)
    return Timed(str(facts.path), record.test, amounts, median_ns / record.n_tokens / 1e9)


def _decode_amounts(record: BenchRecord, facts: ModelFacts) -> Amounts:
    """10^9 bytes that a token reads, the cache at its mean length among them."""
    cached = (record.n_depth + record.n_gen / 2) * CACHE_TYPES[DEFAULT_CACHE].size(facts.key_value_width)
    return {kind: size / 1e9 for kind, size in {**facts.bytes_by_type, KEYS_AND_VALUES: cached}.items()}


def _prompt_amounts(record: BenchRecord, facts: ModelFacts) -> Amounts:
    """10^9 weights that a token of a prompt is multiplied by."""
    return {kind: count / 1e9 for kind, count in facts.prompt_weights.items()}


_AMOUNTS: Mapping[str, Callable[[BenchRecord, ModelFacts], Amounts]] = {
    "tg": _decode_amounts,
    "pp": _prompt_amounts,
}


def calibrated_profile(
    profile: DeviceProfile, calibration: Calibration, source: str, date: datetime.date
) -> DeviceProfile:
    """The profile with what was measured in place of what was not known.

    Args:
        profile: Of the device.
        calibration: What was fitted.
        source: Where the rows are, and of what.
        date: When they were read.

    Raises:
        InputError: Rates that no profile has.
    """
    try:
        return _calibrated(profile, calibration, source, date)
    except pydantic.ValidationError as error:
        raise InputError(f"the rates of these rows: {describe_problems(error)}", field="records") from error


def _calibrated(
    profile: DeviceProfile, calibration: Calibration, source: str, date: datetime.date
) -> DeviceProfile:
    figures: dict[str, Figure[Any]] = {}
    for name, fitted in calibration.fits.items():
        by_type = {kind: _rounded(rate) for kind, rate in fitted.rates.by_type.items()}
        rates = TypeRates(
            by_type=by_type,
            others=_rounded(fitted.rates.others),
            within=max(1.0, _rounded(fitted.within)),
            holds=_rounded(fitted.holds),
        )
        figures[name] = Figure[TypeRates](value=rates, basis="measured", source=source, date=date)
    return DeviceProfile.model_validate(profile.model_copy(update=figures).model_dump())


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def profile_text(profile: DeviceProfile) -> str:
    """A profile as its TOML file has it."""
    stored = profile.model_dump(mode="json", exclude_none=True)
    head = [f"{name} = {_toml(value)}" for name, value in stored.items() if name not in FIGURES]
    tables = []
    for name in FIGURES:
        lines = [f"{key} = {_toml(value)}" for key, value in stored[name].items() if key != "date"]
        lines += [f"date = {stored[name]['date']}"] if "date" in stored[name] else []
        tables.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(["\n".join(head), *tables]) + "\n"


def _toml(value: Any) -> str:
    """A value in TOML: what JSON and TOML write alike, lists, and inline tables."""
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{json.dumps(key)} = {_toml(one)}' for key, one in value.items())} }}"
    if isinstance(value, Iterable) and not isinstance(value, str):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)
