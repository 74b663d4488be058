"""`python -m phoneready.stage_worker STAGE`: one stage of a release, as `phoneready.release.beside` asks for it.

The first line of standard input is the request; when standard input ends, whoever asked is gone, and so is this. Lines
of standard output are JSON: [description, done, total], or an object that says why the stage has failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from cfsp.errors import PhonereadyError
from cfsp.reading import parse_json
from cfsp.records import fields_from_json
from phoneready.__main__ import interrupt, raise_again
from phoneready.console import prepare_torch
from phoneready.recipe import release_stages
from phoneready.release.beside import STOP_S, StageFailure, StageRequest
from phoneready.release.stages import run_stage
from phoneready.settings.schema import ReleaseConfig


def main() -> int:
    """Run the stage that standard input asks for; the status is 1 where it has failed."""
    signal.signal(signal.SIGTERM, interrupt)
    sys.unraisablehook = raise_again
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    with open(0, "rb", buffering=0, closefd=False) as told:
        request = fields_from_json(
            StageRequest, parse_json(told.readline(), "the request"), where="the request"
        )
    threading.Thread(target=_end_with_caller, daemon=True).start()
    try:
        _run(sys.argv[1], request, answers)
    except KeyboardInterrupt:
        return 1
    except Exception as error:
        with contextlib.suppress(BrokenPipeError):
            _answer(answers, asdict(_failure(error)))
        return 1
    return 0


def _run(stage: str, request: StageRequest, answers: TextIO) -> None:
    prepare_torch(request.threads)
    config, folder = ReleaseConfig.model_validate(request.config), Path(request.folder)
    stages = {stage.name: stage for stage in release_stages(config, folder, request.threads)}

    def progress(description: str, done: int, total: int) -> None:
        _answer(answers, [description, done, total])

    run_stage(stages[stage], request.inputs, folder, progress, threads=request.threads)


def _failure(error: Exception) -> StageFailure:
    name, trace = type(error).__name__, "".join(traceback.format_exception(error))
    if isinstance(error, PhonereadyError):
        return StageFailure(name, str(error), exit_code=error.exit_code, trace=trace)
    # A pipe that broke is none that the caller reads.
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, BrokenPipeError):
        filename, text = error.filename and str(error.filename), error.strerror or str(error)
        return StageFailure(name, text, errno=error.errno, filename=filename, trace=trace)
    return StageFailure(name, str(error), trace=trace)


def _answer(answers: TextIO, message: Any) -> None:
    answers.write(json.dumps(message) + "\n")


def _end_with_caller() -> None:
    while os.read(0, 4096):  # not sys.stdin, which would be locked when the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_S)  # inside a library no signal is handled
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
