"""Where a release may be written, and what is left if it cannot begin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from phoneready.main import main

TinyPath = Callable[..., Path]


@pytest.mark.parametrize("more", [(), ("--explain",)])
def test_a_release_is_not_written_into_its_model_or_a_loop_of_links(
    more: tuple[str, ...], tiny_folder: TinyPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, config, loop = tiny_folder(), tmp_path / "release.toml", tmp_path / "loop"
    loop.symlink_to(loop)
    config.write_text(f"model.reference = '{model}'\n")
    for place, said in ((model / "release", "in the model's folder"), (loop, str(loop))):
        assert main(["release", str(config), "-o", str(place), *more]) == 2
        assert said in capsys.readouterr().err
    assert not (model / "release").exists()


def test_what_cannot_be_used_leaves_nothing_behind(
    tiny_folder: TinyPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, output = tmp_path / "release.toml", tmp_path / "above" / "out"
    good = f'model.reference = "{tiny_folder()}"\n'
    for exists in (False, True):
        if exists:
            output.mkdir(parents=True)
        for wrong in (
            'model.reference = "missing"',
            f'{good}[prune]\ncalibration = ["missing.txt"]',
            f"{good}[prune]\nprune_ratio = 2",
            f"{good}[prune]\nseqlen = 100000",
        ):
            config.write_text(wrong)
            before = sorted(tmp_path.rglob("*"))
            assert main(["release", str(config), "-o", str(output)]) == 2
            assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
            assert sorted(tmp_path.rglob("*")) == before
