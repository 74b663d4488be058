"""Records that the version before a model's shape was recorded wrote are read as what they said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cfsp.errors import InputError
from cfsp.models.checkpoint import CheckpointInfo
from cfsp.models.shape import ModelShape
from cfsp.pruning.plan import PruningPlan
from cfsp.records import read_record, record_from_json, write_record
from exporters.export_record import ExportManifest
from phoneready.publish.manifest import ReleaseManifest

OLD = Path(__file__).parent / "old_records"
WIDTHS = (128, 96, 96, 64)
LISTS = (
    "calibration",
    "vocabulary_text",
    "points",
    "standings",
    "choices",
    "left_out",
    "failed",
    "open",
    "kept",
)
FILES = {
    "phoneready.json": CheckpointInfo,
    "pruning_plan.json": PruningPlan,
    "export.json": ExportManifest,
    "manifest.json": ReleaseManifest,
}


def shape_in(record: Any) -> ModelShape:
    return record.exports[0].shape if isinstance(record, ExportManifest) else record.shape


@pytest.mark.parametrize("name", FILES)
def test_old_records_are_read_and_written_anew(name: str, tmp_path: Path) -> None:
    record = read_record(FILES[name], OLD / name)
    assert shape_in(record) == ModelShape.of_ffn_widths(WIDTHS)
    write_record(tmp_path / name, record)
    assert read_record(FILES[name], tmp_path / name) == record


def test_a_plan_of_channels_alone_keeps_its_bytes(tmp_path: Path) -> None:
    """Exported files carry the hash of the plan's file."""
    plan = read_record(PruningPlan, OLD / "pruning_plan.json")
    for name in ("plan.json", "again.json"):
        write_record(tmp_path / name, plan)
        plan = read_record(PruningPlan, tmp_path / name)
    assert (tmp_path / "plan.json").read_bytes() == (tmp_path / "again.json").read_bytes()


@pytest.mark.parametrize("version", [0, 99, None, "1", True, [1]])
def test_unknown_versions_are_refused(version: Any) -> None:
    payload = json.loads((OLD / "phoneready.json").read_text()) | {"schema_version": version}
    with pytest.raises(InputError, match=r"unknown schema version.*allowed: 1, 2"):
        record_from_json(CheckpointInfo, payload, where="x")


@pytest.mark.parametrize("change", [{"widths": 5}, {"widths": None}, {"shape": {}}, {"widths": ["a"]}])
def test_damaged_old_records_are_told_in_one_line(change: dict[str, Any]) -> None:
    payload = json.loads((OLD / "phoneready.json").read_text())
    del payload["widths"]
    with pytest.raises(InputError, match="x"):
        record_from_json(CheckpointInfo, payload | change, where="x")


def test_a_plan_of_widths_that_no_model_has_is_refused(tmp_path: Path) -> None:
    plan = json.loads((OLD / "pruning_plan.json").read_text(encoding="utf-8"))
    plan["dense_widths"][-1] = 10**30
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    with pytest.raises(InputError, match="dense_widths"):
        read_record(PruningPlan, tmp_path / "plan.json")
