"""From a search to a gate that passed: the same bytes in search.json, the release and its manifest, and the minutes.

    python benchmarks/one_line.py [MODEL] [--max-size 75MB] [--folder one-line] [--threads 2]

A search that is in the folder goes on. It fails where a command does, or where a hash differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from cfsp.files import sha256_file


def run(*words: str) -> float:
    """Run a phoneready command; its minutes."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "phoneready", *words], check=True)
    return (time.monotonic() - began) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--max-size", default="75MB")
    parser.add_argument("--folder", type=Path, default=Path("one-line"))
    parser.add_argument("--threads", default="2")
    asked = parser.parse_args()
    found, config, release = asked.folder / "search", asked.folder / "release.toml", asked.folder / "release"
    asked.folder.mkdir(parents=True, exist_ok=True)
    threads = ("--threads", asked.threads)
    minutes = {"search": run("search", asked.model, "-o", str(found), "--max-size", asked.max_size, *threads)}
    run("init", "--from", str(found / "search.json"), "-o", str(config), "--force")
    minutes["release"] = run("release", str(config), "-o", str(release), *threads)
    record = json.loads((found / "search.json").read_text(encoding="utf-8"))
    best = next(one for one in record["points"] if one["file"] == record["best"])
    manifest = json.loads((release / "manifest.json").read_text(encoding="utf-8"))
    (shipped,) = (one for one in manifest["files"] if one["role"] == "shipped")
    hashes = {
        "search.json": best["sha256"],
        "the file of the search": sha256_file(found / best["file"]),
        "manifest.json": shipped["sha256"],
        "the file of the release": sha256_file(release / shipped["file"]),
    }
    for where, sha256 in hashes.items():
        print(f"{where:<26} {sha256}")
    print(f"{best['file']}, {best['file_bytes']} bytes; minutes: {minutes}")
    if len(set(hashes.values())) > 1:
        sys.exit("the hashes differ")


if __name__ == "__main__":
    main()
