"""The scripts behind the Makefile."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="make and POSIX locks")


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def llama_wheel() -> ModuleType:
    return tool("llama_wheel")


def test_wheels_are_kept_apart_by_processor_and_options(
    llama_wheel: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = llama_wheel.wheel_directory(tmp_path, "")
    assert plain == llama_wheel.wheel_directory(tmp_path, "")
    assert plain.name.startswith(f"cp{sys.version_info.major}{sys.version_info.minor}-")
    assert plain != llama_wheel.wheel_directory(tmp_path, "-DGGML_NATIVE=OFF")
    monkeypatch.setattr(llama_wheel, "processor_features", lambda: "another processor")
    assert plain != llama_wheel.wheel_directory(tmp_path, "")


def test_the_newest_wheel_inside_the_range_is_taken(llama_wheel: ModuleType, tmp_path: Path) -> None:
    wanted = llama_wheel.requirement()
    assert llama_wheel.newest_wheel(tmp_path, wanted) is None
    for version in ("0.3.35", "0.3.36", "0.3.100", "0.4.0"):
        (tmp_path / f"llama_cpp_python-{version}-py3-none-linux_x86_64.whl").touch()
        (tmp_path / f"llama_cpp_python-{version}.tar.gz").touch()
    assert "0.3.100" in llama_wheel.newest_wheel(tmp_path, wanted).name
    assert "0.3.100" in llama_wheel.newest_sdist(tmp_path, wanted).name


def test_what_a_killed_build_left_is_removed_and_a_build_leaves_nothing(
    llama_wheel: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / ".build-killed").mkdir()
    with llama_wheel.workspace(tmp_path) as work:
        assert work.parent == tmp_path
        assert [path.name for path in tmp_path.glob(".build-*")] == [work.name]
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_source_archive_is_taken_by_its_hash_alone(
    llama_wheel: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "llama_cpp_python-0.3.36.tar.gz"
    archive.write_bytes(b"another archive of that name")
    wanted = llama_wheel.requirement()
    monkeypatch.delenv("PHONEREADY_LLAMA_SHA256", raising=False)
    with pytest.raises(SystemExit, match="is not known here"):
        llama_wheel.fetch_sdist(tmp_path, tmp_path / "work", wanted)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setenv("PHONEREADY_LLAMA_SHA256", digest)
    assert llama_wheel.fetch_sdist(tmp_path, tmp_path / "work", wanted) == archive


def test_the_cache_is_the_products_own(llama_wheel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from cfsp.models.builtin import cache_directory

    for name, value in (("PHONEREADY_CACHE", "/a"), ("XDG_CACHE_HOME", "/b"), ("HOME", "/c")):
        monkeypatch.setenv(name, value)
        assert llama_wheel.cache_directory() == cache_directory()
        monkeypatch.delenv(name)


def test_a_python_is_found_or_the_error_says_how_to_name_one() -> None:
    script = ROOT / "tools" / "find_python.sh"
    found = subprocess.run([script, sys.executable], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == sys.executable
    missing = subprocess.run([script, "no-such-python"], capture_output=True, text=True, check=False)
    assert missing.returncode == 1
    assert "make PYTHON=" in missing.stderr


def test_the_patch_for_llama_cpp_fits_the_source_that_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from runtime_bench.native.build import extract_llama, fetch_source

    source = extract_llama(fetch_source(), tmp_path)
    tool("upstream_patch").apply(source)
    for name in ("llama", "qwen3", "gemma3"):
        assert (
            "const int64_t n_ff = hparams.n_ff(i);" in (source / "src" / "models" / f"{name}.cpp").read_text()
        )
