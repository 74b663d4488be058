"""release.toml."""

from __future__ import annotations

from pathlib import Path

import pytest

from cfsp.errors import InputError
from phoneready.pipeline.config import demo_config_text, load_config, parse_config

ROOT = Path(__file__).resolve().parents[2]
MODEL = '[model]\nreference = "smollm2-135m"\n'


def test_the_demo_and_the_example_are_valid_and_the_same() -> None:
    demo = load_config(None)
    assert demo.model.reference == "smollm2-135m"
    assert demo.prune_settings().align == 32
    assert parse_config((ROOT / "examples" / "release.toml").read_text(encoding="utf-8"), where="x") == demo
    assert "reference" in demo_config_text()


def test_all_errors_are_reported_at_once() -> None:
    text = (
        "sead = 1\n[model]\n[prune]\nprune_ratio = 1.5\ncalibrations = 3\n[evaluate]\nseqlen = 0\n"
        '[export]\nquants = ["Q4_0", "Q9"]\n[bench]\nrepetitions = 0\n'
    )
    with pytest.raises(InputError) as caught:
        parse_config(text, where="release.toml")
    message = str(caught.value)
    for part in (
        "sead: unknown key",
        "model.reference: missing",
        "prune.prune_ratio",
        "prune.calibrations: unknown",
    ):
        assert part in message
    for part in (
        "evaluate.seqlen",
        "export.quants: quant: unknown quantization (got 'Q9')",
        "bench: ",
        "repetitions=0",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        ('[prune]\nscore = "best"', "score: unknown"),
        ('[prune]\nallocation = "fair"', "allocation"),
        ("[prune]\nridge = 0", "prune.ridge"),
        ("[export]\nquants = []", "export.quants"),
        ("[bench]\nn_prompt = []\nn_gen = []\nttft = []\nload = true", "bench.load: unknown key"),
    ],
)
def test_unusable_values_name_their_key(section: str, wrong: str) -> None:
    with pytest.raises(InputError, match=wrong):
        parse_config(MODEL + section, where="release.toml")


def test_alignment_follows_the_quantizations_unless_it_is_set() -> None:
    assert (
        parse_config(MODEL + '[export]\nquants = ["q4_k_m", "Q8_0"]', where="x").prune_settings().align == 256
    )
    assert parse_config(MODEL + "[prune]\nalign = 64", where="x").prune_settings().align == 64


def test_paths_start_at_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "text.txt").write_text("words")
    file = tmp_path / "release.toml"
    file.write_text('[model]\nreference = "model"\n[prune]\ncalibration = ["self", "text.txt"]\n')
    config = load_config(file)
    assert config.model.reference == str(tmp_path / "model")
    assert config.prune.calibration == ("self", str(tmp_path / "text.txt"))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.toml"):
        load_config(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("[model\n")
    with pytest.raises(InputError, match="not valid TOML"):
        load_config(tmp_path / "bad.toml")
