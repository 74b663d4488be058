"""`phoneready search`: the best file within limits, pruned or not."""

from __future__ import annotations

from pathlib import Path

from cfsp.errors import MissingExtraError
from cfsp.settings import pick, setting
from cfsp.text.settings import CalibrationSettings
from phoneready.commands.options import JsonOption, ModelArgument, SeedOption, ThreadsOption
from phoneready.console import note, prepare_torch, show_progress, write_result
from phoneready.search.point import SearchSettings


def search(
    model: ModelArgument,
    settings: SearchSettings,
    calibration: CalibrationSettings,
    output: Path = setting(
        Path("search"), "Folder to make; continued when it holds a search.", option="-o --output"
    ),
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Find the best file within limits: quantized alone, or with fewer tokens or channels.

    All files come from one calibration, are proven as `quantize` proves them, and are measured on the same text. A
    search that was interrupted goes on where it was. Leaves search.md, search.json, search.html and the best file;
    without limits the files that no other dominates. `phoneready init --from` makes a release of it. Exit status: 0 a
    file is within all limits, 1 none is, 3 that cannot be told.
    """
    prepare_torch(threads)
    from cfsp.files import write_text
    from cfsp.records import record_to_json
    from phoneready.search.record import format_search, render_search
    from phoneready.search.run import PLOT_FILE, RESULT_FILE, check_search
    from phoneready.search.run import search as run_search
    from phoneready.settings.schema import ModelConfig, PruneConfig, ReleaseConfig

    prune = pick(PruneConfig, calibration, prune_ratio=0.0)
    base = ReleaseConfig(model=ModelConfig(reference=model), seed=seed, prune=prune)
    with show_progress() as progress:
        found = run_search(base, settings, output, show=note, progress=progress, threads=threads)
    try:
        write_text(output / PLOT_FILE, render_search(found))
    except MissingExtraError as error:
        note(f"no plot is written: {error}")
    write_result(format_search(found), record_to_json(found), as_json=json)
    if found.best:
        note(f"Next: phoneready init --from {output / RESULT_FILE}")
    check_search(found)
