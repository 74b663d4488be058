"""Where a release may be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from phoneready.main import main


@pytest.mark.parametrize("more", [(), ("--explain",)])
def test_a_release_is_not_written_into_its_model(
    more: tuple[str, ...], tiny_folder: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_folder()  # type: ignore[operator]
    config = tmp_path / "release.toml"
    config.write_text(f"model.reference = '{model}'\n")
    assert main(["release", str(config), "-o", str(model / "release"), *more]) == 2
    assert "in the model's folder" in capsys.readouterr().err
    assert not (model / "release").exists()


@pytest.mark.parametrize("more", [(), ("--explain",)])
def test_a_loop_of_links_is_no_place(
    more: tuple[str, ...], tiny_folder: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    config = tmp_path / "release.toml"
    config.write_text(f"model.reference = '{tiny_folder()}'\n")  # type: ignore[operator]
    assert main(["release", str(config), "-o", str(loop), *more]) == 2
    assert str(loop) in capsys.readouterr().err


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [
        'model.reference = "missing"',
        'model.reference = "{model}"\n[prune]\ncalibration = ["missing.txt"]',
        'model.reference = "{model}"\n[prune]\nprune_ratio = 2',
        'model.reference = "{model}"\n[prune]\nvocabulary = -1',
        'model.reference = "{model}"\n[prune]\nseqlen = 100000',
    ],
)
def test_what_cannot_be_used_leaves_nothing_behind(
    wrong: str, exists: bool, tiny_folder: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, output = tmp_path / "release.toml", tmp_path / "above" / "out"
    config.write_text(wrong.replace("{model}", str(tiny_folder())))  # type: ignore[operator]
    if exists:
        output.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert main(["release", str(config), "-o", str(output)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before
