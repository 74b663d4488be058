"""Stores: their limits as budgets, and a frontier's files for classes of devices, as stores take them."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError

from cfsp.errors import InputError
from cfsp.files import sha256_file
from cfsp.records import read_record, write_record
from phoneready.evaluation.dominance import choose, standing
from phoneready.evaluation.measured_file import MeasuredText
from phoneready.figures.budgets import BudgetConfig
from phoneready.figures.figure_set import Figure, FigureSet
from phoneready.figures.gate import judge_all
from phoneready.figures.metrics import FigureKey
from phoneready.figures.stores import STORES
from phoneready.frontier.record import Frontier, FrontierPoint
from phoneready.main import main
from phoneready.publish.tiers import Tiers, choose_tiers, remove_tiers, targeting_text, write_tiers
from phoneready.publish.verify import verify_release
from phoneready.settings.release import parse_config
from phoneready.settings.schema import StoresConfig, TierConfig
from runtime_bench.devices.model_facts import gguf_facts
from runtime_bench.devices.projection import APP_SHARE, project_memory

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

MODEL = '[model]\nreference = "some/model"\n'
CONFIG = "{http://schemas.android.com/apk/config}"


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(("more", "outcome"), [(0, "pass"), (1000, "missed")])
def test_a_stores_limit_is_a_budget(store: str, more: int, outcome: str) -> None:
    size = STORES[store].bytes + more
    figure = Figure(FigureKey("file_bytes", "Q4_0"), "pruned", "pruned-Q4_0.gguf", "bytes", size)
    budget = BudgetConfig.model_validate({"store": store})
    (verdict,) = judge_all([budget], FigureSet("some/model", None, 0, (figure,)))
    assert (verdict.metric, verdict.outcome) == ("file_bytes", outcome)
    assert store in verdict.limit
    assert BudgetConfig.model_validate(budget.model_dump(mode="json")) == budget


def test_the_rest_of_an_app_counts_to_its_limit() -> None:
    budget = BudgetConfig.model_validate({"store": "play-app", "beside": "150 MB"})
    assert budget.limit == STORES["play-app"].bytes - 150_000_000
    assert "150 MB beside it" in budget.describe()
    number = BudgetConfig.model_validate({"store": "play-app", "beside": 150_000_000})
    assert number.limit == budget.limit
    assert "143.1 MiB beside it" in number.describe()
    with pytest.raises(ValidationError, match="not a finite number"):
        BudgetConfig.model_validate({"store": "play-app", "beside": -math.inf})


def test_every_limit_says_who_says_so() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "release.md").read_text(encoding="utf-8")
    for name, limit in STORES.items():
        assert limit.source.startswith("https://")
        row = f"| `{name}` | {limit.bytes / 10**9:g} GB | {limit.what} | [{limit.date}]({limit.source}) |"
        assert row in page


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ('store = "play"', "unknown store (got 'play'); allowed: play-asset-pack, play-app"),
        ('store = "play-app"\nat_most = "1 GB"', "leave out at_most"),
        ('store = "play-app"\nmetric = "load"', "store: limits file_bytes, not load"),
        ('store = "play-app"\nbeside = "4 GB"', "beside: leaves nothing of the store's limit"),
        ('store = "play-app"\nbeside = -5e9', "beside: less than nothing"),
        ('metric = "file_bytes"\nat_most = 1\nbeside = 1', "beside: counts to a store's limit"),
        ("at_most = 1", "budgets[0].metric: missing"),
    ],
)
def test_what_a_store_cannot_be_is_told_with_its_line(lines: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_config(f"{MODEL}[[budgets]]\n{lines}\n", where="release.toml")
    assert reason in str(caught.value)
    assert "line" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[stores]\nfrontier = "f.json"\n', "[[tiers]] the devices: name some"),
        (
            '[stores]\nfrontier = "f.json"\n' + 2 * '[[tiers]]\nname = "a"\nram = "4 GB"\n',
            "tiers: two have the same name",
        ),
        ('[stores]\nfrontier = "f.json"\ncache_type = "f32"\n', "allowed: f16, q8_0, q4_0"),
        ('[stores]\nfrontier = "f.json"\n[[tiers]]\nname = "A b"\nram = 1\n', "tiers[0].name"),
        ('[stores]\nfrontier = "f.json"\n[[tiers]]\nname = "a"\nram = "much"\n', "ram: not understood"),
    ],
)
def test_tiers_that_cannot_be_are_told(text: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_config(MODEL + text, where="release.toml")
    assert reason in str(caught.value)


def test_tiers_without_stores_are_warned_of() -> None:
    config = parse_config(MODEL + '[[tiers]]\nname = "a"\nram = "4 GB"\n', where="release.toml")
    assert config.warnings == ("tiers has no effect without [stores]",)
    assert config.tiers == ()


@pytest.fixture
def frontier(tiny_gguf: Callable[..., Path], tmp_path: Path) -> Path:
    """A frontier of two files: the larger loses less."""
    folder = tmp_path / "frontier"
    folder.mkdir()
    points = []
    for name, width, bits in (("small", 64, 1.5), ("large", 2048, 1.0)):
        path = folder / f"{name}.gguf"
        os.link(tiny_gguf("llama", intermediate_size=width), path)
        nats = (math.log(2) * bits * 100,) * 5
        text = MeasuredText("text", "t.txt", 64, "f" * 64, 315, (100,) * 5, nats, nats)
        size = path.stat().st_size
        points.append(FrontierPoint(path.name, size, (text,), "f32", 0.1, 0.1, "cfsp", 32, None, None, 1.0))
    files = tuple(point.file for point in points)
    standings = tuple(standing(point, points) for point in points)
    choices = (choose(points, 10**9),)
    record = Frontier("m", None, 0, ("c",), (), tuple(points), standings, choices, (), (), (), files)
    write_record(folder / "frontier.json", record)
    return folder / "frontier.json"


def needed(path: Path) -> int:
    """Least RAM of a device whose share for one application holds a file with a full context."""
    facts = gguf_facts(path)
    return math.ceil(project_memory(facts, 512, ("dotprod",)).needed / APP_SHARE)


def tiers_for(frontier: Path) -> tuple[StoresConfig, tuple[TierConfig, ...]]:
    """Two classes of devices: one that only the small file fits, and one that the large one just fits."""
    large = needed(frontier.parent / "large.gguf")
    classes = {"plenty": large + 2, "little": large - 1000}
    stores = StoresConfig(frontier=frontier, n_ctx=512)
    return stores, tuple(TierConfig(name=name, ram=ram) for name, ram in classes.items())


def test_each_class_of_devices_gets_the_best_file_that_fits(frontier: Path) -> None:
    stores, tiers = tiers_for(frontier)
    found = choose_tiers(stores, tiers)
    little, plenty = found.tiers
    assert [(tier.name, tier.file) for tier in found.tiers] == [
        ("little", "small.gguf"),
        ("plenty", "large.gguf"),
    ]
    assert (little.max_ram_bytes, plenty.max_ram_bytes) == (plenty.min_ram_bytes, None)
    assert all(tier.needed_bytes <= tier.may_have_bytes for tier in found.tiers)
    assert plenty.sha256 == sha256_file(frontier.parent / "large.gguf")
    assert found.ba_max_install_size == plenty.bytes == (frontier.parent / "large.gguf").stat().st_size


def test_a_class_that_nothing_fits_is_refused_by_name(frontier: Path) -> None:
    stores, _ = tiers_for(frontier)
    with pytest.raises(InputError, match=r"no file of the frontier fits devices of tiny .*needs at most 650"):
        choose_tiers(stores, [TierConfig(name="tiny", ram=1000)])


def test_files_that_are_gone_or_changed_are_refused(frontier: Path) -> None:
    stores, tiers = tiers_for(frontier)
    large = frontier.parent / "large.gguf"
    large.unlink()
    assert {tier.file for tier in choose_tiers(stores, tiers).tiers} == {"small.gguf"}
    large.write_bytes((frontier.parent / "small.gguf").read_bytes())
    with pytest.raises(InputError, match="is not the file that the frontier has measured"):
        choose_tiers(stores, tiers)
    (frontier.parent / "small.gguf").unlink()
    large.unlink()
    with pytest.raises(InputError, match="no file of the frontier lies in"):
        choose_tiers(stores, tiers)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "other"}, "is no frontier's record"),
        ({"points": [3]}, "frontier.json"),
        ({"points": [{"file": "../../x.gguf", "file_bytes": 1, "texts": []}]}, "not the name of a GGUF file"),
    ],
)
def test_a_record_that_is_none_is_refused(frontier: Path, change: dict[str, object], reason: str) -> None:
    frontier.write_text(json.dumps(json.loads(frontier.read_text()) | change))
    stores, tiers = StoresConfig(frontier=frontier), [TierConfig(name="a", ram="4 GB")]
    with pytest.raises(InputError, match=reason):
        choose_tiers(stores, tiers)


def test_what_the_stores_take_is_written_and_replaced(frontier: Path, tmp_path: Path) -> None:
    stores, tiers = tiers_for(frontier)
    found = choose_tiers(stores, tiers)
    write_tiers(stores, found, tmp_path)
    root = tmp_path / "stores"
    assert read_record(Tiers, root / "tiers.json") == found
    document = ElementTree.parse(root / "device_targeting_config.xml").getroot()
    assert document.tag == f"{CONFIG}device-targeting-config"
    groups = {group.get("name"): group.find(f"{CONFIG}device-selector") for group in document}
    for tier in found.tiers:
        selector = groups[tier.name]
        assert selector is not None
        end = None if tier.max_ram_bytes is None else str(tier.max_ram_bytes)
        assert selector.attrib == {"ram-min-bytes": str(tier.min_ram_bytes)} | (
            {"ram-max-bytes": end} if end else {}
        )
        asset = root / f"model#group_{tier.name}" / tier.file
        assert sha256_file(asset) == tier.sha256
        manifest = json.loads((root / f"background-assets-{tier.name}.json").read_text())
        assert manifest["assetPackID"] == f"model-{tier.name}"
        assert [root / selector["file"] for selector in manifest["fileSelectors"]] == [asset]
    write_tiers(stores, replace(found, tiers=found.tiers[:1]), tmp_path)
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["model#group_little"]


def test_an_interrupted_run_leaves_nothing_that_blocks_the_next(
    frontier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores, tiers = tiers_for(frontier)
    found, root = choose_tiers(stores, tiers), tmp_path / "stores"
    nowhere = replace(found, tiers=(found.tiers[0], replace(found.tiers[1], name="no/where")))
    with pytest.raises((OSError, InputError)):
        write_tiers(stores, nowhere, tmp_path)
    assert not root.exists()
    write_tiers(stores, found, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            remove_tiers(tmp_path)
    assert not root.exists()
    write_tiers(stores, found, tmp_path)
    assert read_record(Tiers, root / "tiers.json") == found


def interrupt(path: Path) -> None:
    raise KeyboardInterrupt


def test_devices_with_less_than_the_first_class_are_in_no_group(frontier: Path) -> None:
    stores, tiers = tiers_for(frontier)
    text = targeting_text(choose_tiers(stores, tiers).tiers)
    assert text.count("ram-min-bytes") == 2
    assert text.count("ram-max-bytes") == 1


@pytest.mark.slow
def test_a_release_publishes_its_tiers_with_their_hashes(
    frontier: Path, tiny_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stores, tiers = tiers_for(frontier)
    config, folder = tmp_path / "release.toml", tmp_path / "release"
    sections = {
        "model": {"reference": str(tiny_folder())},
        "prune": {"prune_ratio": 0.25, "calibration": ["builtin:python-docs"], "nsamples": 2, "seqlen": 32},
        "evaluate": {"chats": [], "seqlen": 32, "max_windows": 1, "prompts": ["Hi"], "max_new_tokens": 2},
        "export": {"quants": ["Q8_0"]},
        "bench": {"n_prompt": [0], "n_gen": [0], "ttft": [0], "repetitions": 1, "check_text": False},
        "stores": {"frontier": "frontier/frontier.json", "n_ctx": 512},
    }
    text = "".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        for name, values in sections.items()
    )
    text += "".join(f'[[tiers]]\nname = "{tier.name}"\nram = {tier.ram}\n' for tier in tiers)
    config.write_text(text + '[[budgets]]\nstore = "play-asset-pack"\n')
    command = ["release", str(config), "-o", str(folder), "--threads", "1"]
    assert main(command) == 0, capsys.readouterr().err
    contents = {c["path"]: c for c in json.loads((folder / "manifest.json").read_text())["contents"]}
    for tier in choose_tiers(stores, tiers).tiers:
        assert contents[f"stores/model#group_{tier.name}/{tier.file}"]["sha256"] == tier.sha256
    assert verify_release(folder)[1] == []
    config.write_text(config.read_text().split("[stores]")[0])
    assert main(command) == 0, capsys.readouterr().err
    assert not (folder / "stores").exists()
    assert verify_release(folder)[1] == []
    impossible = [*command, "--set", 'stores={frontier="frontier/frontier.json"}']
    assert main([*impossible, "--set", 'tiers=[{name="none", ram=1000}]']) == 2
    assert "no file of the frontier fits devices of none" in capsys.readouterr().err
