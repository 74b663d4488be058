"""Whether a release folder is what was released: hashes, manifest, records that must agree with each other."""

from __future__ import annotations

from pathlib import Path

from cfsp.errors import InputError
from cfsp.files import sha256_file
from cfsp.records import read_record
from phoneready.publish.contents import SUMS_FILE, Content, Problem, find_problems, read_sums
from phoneready.publish.manifest import MANIFEST_FILE, ReleaseManifest


def verify_release(folder: Path) -> tuple[int, list[Problem]]:
    """Check a release folder; every byte of it is read.

    Args:
        folder: As `phoneready release` leaves it, with or without `stages`.

    Returns:
        The number of files that were checked, and what is wrong with them.

    Raises:
        InputError: There is no release, or nothing in it can be trusted enough to check the rest.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    sums = read_sums(folder)
    if MANIFEST_FILE not in sums:
        raise InputError(f"{folder / SUMS_FILE} does not list {MANIFEST_FILE}")
    if not (folder / MANIFEST_FILE).is_file():
        return len(sums) + 1, [Problem(MANIFEST_FILE, "is missing")]
    manifest_sha256 = sha256_file(folder / MANIFEST_FILE)
    if manifest_sha256 != sums[MANIFEST_FILE]:
        # What it says of other files is worth nothing; the list of hashes still is checked.
        contents = [Content(path, -1, sha256) for path, sha256 in sums.items()]
        return len(sums) + 1, find_problems(folder, contents)
    manifest = read_record(ReleaseManifest, folder / MANIFEST_FILE)
    listed = {content.path: content.sha256 for content in manifest.contents}
    problems = [
        Problem(path, f"has other hashes in {MANIFEST_FILE} and {SUMS_FILE}")
        for path in sorted({*listed, *sums} - {MANIFEST_FILE})
        if listed.get(path) != sums.get(path)
    ]
    problems += [
        Problem(file.file, f"has other hashes in two places of {MANIFEST_FILE}")
        for file in manifest.files
        if file.sha256 not in {h for path, h in listed.items() if f"{path}/".startswith(f"{file.file}/")}
    ]
    itself = Content(MANIFEST_FILE, (folder / MANIFEST_FILE).stat().st_size, manifest_sha256)
    return len(sums) + 1, problems + find_problems(folder, [*manifest.contents, itself])
