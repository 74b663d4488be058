"""The same files on several targets: other machines at the same time, then what runs on this one, alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cfsp.progress import Progress, no_progress
from runtime_bench.measuring.measure import check_files, engines_on, look_at, run_bench
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.targets import Target
from runtime_bench.targets.remote import Remote
from runtime_bench.workload import BenchSettings


def run_matrix(
    files: Sequence[Path],
    settings: BenchSettings,
    targets: Sequence[Target],
    progress: Progress = no_progress,
    *,
    engine: str | None = None,
    anchor: Path | None = None,
    on_record: Callable[[BenchRecord], None] = lambda record: None,
) -> list[BenchRecord]:
    """Measure every file on every target. What cannot be measured is a failed row with its reason; the rest goes on.

    Other machines are measured at the same time, each in a thread of its own, which here does little but wait. This
    machine's own targets come after them, one by one: nothing else is done here while it is measured.

    Args:
        files: Exported model files.
        settings: What to measure and how often.
        targets: Where.
        progress: Told after each process; with several targets each has steps of its own.
        engine: Key of ENGINES; each file's default one unless given.
        anchor: A file that takes turns with the others on every target.
        on_record: Called with each record as soon as it is complete, from one thread at a time.

    Returns:
        `run_bench`'s records of each target, in the order of the targets.

    Raises:
        InputError: As `run_bench` does.
    """
    measured = [*files, *([anchor] if anchor else [])]
    for target in targets:
        engines_on(target, measured, settings, engine)
    check_files(files, anchor)
    seen = look_at(measured, settings)  # once, and not once a target
    lock = threading.Lock()

    def keep(record: BenchRecord) -> None:
        with lock:
            on_record(record)

    def measure(target: Target) -> list[BenchRecord]:
        def told(description: str, done: int, total: int) -> None:
            progress(description if len(targets) == 1 else f"{target.name} {description}", done, total)

        if isinstance(target, Remote):
            target.progress = told
        return run_bench(
            files, settings, told, engine=engine, target=target, anchor=anchor, on_record=keep, seen=seen
        )

    remotes = [target for target in targets if isinstance(target, Remote)]
    by_target: dict[int, list[BenchRecord]] = {}
    with ThreadPoolExecutor(max(1, len(remotes))) as pool:
        futures = {id(remote): pool.submit(measure, remote) for remote in remotes}
        try:
            by_target |= {key: future.result() for key, future in futures.items()}
        except BaseException:  # Ctrl-C among them: what runs elsewhere is ended before anybody waits for it
            for remote in remotes:
                remote.stop()
            raise
    for target in targets:
        if id(target) not in by_target:
            by_target[id(target)] = measure(target)
    return [record for target in targets for record in by_target[id(target)]]
