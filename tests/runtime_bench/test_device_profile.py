"""Profiles: those that come along are sound, and what is wrong in a file is said, all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cfsp.errors import InputError
from runtime_bench.devices import FIGURES, find_profile, load_profiles, read_profile
from runtime_bench.presentation.device_table import format_profile, profile_table

GOOD = """
schema_version = 1
id = "mine"
name = "My phone"
form = "phone"
tier = "mid"
os = "android"
soc = { value = "A chip", basis = "vendor", source = "https://example.org", date = 2026-01-02 }
cores = { basis = "unknown" }
isa = { value = ["dotprod"], basis = "derived", source = "Armv8.2", date = 2026-01-02 }
ram_mib = { value = 8192, basis = "vendor", source = "https://example.org", date = 2026-01-02 }
dram_gb_s = { basis = "unknown" }
dram_sustained_gb_s = { basis = "unknown" }
app_memory_mib = { basis = "unknown" }
"""


def write(folder: Path, text: str, name: str = "mine.toml") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_profiles_that_come_along_are_sound(tmp_path: Path) -> None:
    profiles = load_profiles(tmp_path)
    assert len(profiles) >= 14
    assert {p.profile.os for p in profiles.values()} == {"android", "ios", "linux"}
    assert {p.profile.tier for p in profiles.values()} == {"budget", "mid", "flagship", "board"}
    assert {p.file.parent.name for p in profiles.values()} == {"devices"}
    for entry in profiles.values():
        clocks = [cluster.max_mhz or 0 for cluster in entry.profile.cores.value or ()]
        assert clocks == sorted(clocks, reverse=True), entry.profile.id


def test_figures_are_shown_with_their_origin(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    entry = load_profiles(tmp_path)["mine"]
    text = format_profile(entry)
    assert all(f"\n{name}: " in text for name in FIGURES)
    assert "ram_mib: 8192 (vendor)\n    https://example.org, 2026-01-02\n" in text
    assert "cores: unknown\n" in text
    assert profile_table([entry]).objects()[0]["own"] == "own"


def test_a_profile_of_ones_own_replaces_the_built_in_one(tmp_path: Path) -> None:
    built_in = next(iter(load_profiles(tmp_path)))
    write(tmp_path, GOOD.replace('"mine"', f'"{built_in}"'), f"{built_in}.toml")
    entry = load_profiles(tmp_path)[built_in]
    assert entry.profile.name == "My phone"
    assert not entry.built_in


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            ("ram_mib = { value = 8192", "ram_mib = { value = 8"),
            ["ram_mib.value", "greater than or equal to 64"],
        ),
        (("dram_gb_s = { basis", "dram_gb_s = { value = 51200, basis"), ["dram_gb_s", "less than or equal"]),
        (('basis = "vendor", source', 'basis = "hearsay", source'), ["soc.basis", "ram_mib.basis"]),
        (('app_memory_mib = { basis = "unknown" }', ""), ["app_memory_mib: missing"]),
        (("os = ", "operating_system = "), ["os: missing", "operating_system: unknown key"]),
        ((", date = 2026-01-02", ""), ["soc", "isa", "ram_mib", "wants value, source and date"]),
        (("schema_version = 1", "schema_version = 2"), ["schema_version"]),
        (('id = "mine"', 'id = "../mine"'), ["id: "]),
        (('id = "mine"', 'id = "yours"'), ["not the file's name"]),
        (("form =", "form"), ["not valid TOML"]),
        (("dram_gb_s =", "decode_gb_s = 3\ndram_gb_s ="), ["decode_gb_s: unknown key"]),
    ],
)
def test_all_that_is_wrong_is_said(tmp_path: Path, change: tuple[str, str], expected: list[str]) -> None:
    path = write(tmp_path, GOOD.replace(*change))
    with pytest.raises(InputError) as caught:
        read_profile(path)
    assert str(path) in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


def test_problems_of_all_files_come_together(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path, GOOD.replace('"mine"', f'"{name}"').replace('"phone"', '"fridge"'), f"{name}.toml")
    with pytest.raises(InputError, match=r"(?s)a\.toml: form.*b\.toml: form"):
        load_profiles(tmp_path)


def test_an_unknown_name_gets_the_known_ones(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(InputError, match="mine"):
        find_profile("nokia-3310", load_profiles(tmp_path))
