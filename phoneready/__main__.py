"""The command `phoneready`, and `python -m phoneready`: what has to hold before anything else is imported."""

from __future__ import annotations

import os
import sys


def run() -> None:
    """The console script.

    Modules in the working directory are none of ours, standard streams that are closed must not become files that are
    written, and an interrupt ends in one line from the first moment on. SIGTERM and SIGHUP end a run as Ctrl-C does.
    """
    import signal

    sys.unraisablehook = _raise_again
    try:
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, _interrupt)
        problem = _problem()
        if problem is None:
            from cfsp.child_process import wait_passively
            from phoneready.main import main

            wait_passively()
            status = main(sys.argv[1:])
        else:
            print(f"error: {problem}", file=sys.stderr)
            status = 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def _interrupt(number: int, frame: object) -> None:
    """Handle a signal as Ctrl-C."""
    import signal

    signal.signal(number, signal.SIG_IGN)  # the second one must not interrupt the cleaning up
    raise KeyboardInterrupt


def _raise_again(dropped: sys.UnraisableHookArgs) -> None:
    """Raise an interrupt once more that was raised where Python drops what is raised, as in a callback from C."""
    import signal

    def interrupted(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if not issubclass(dropped.exc_type, KeyboardInterrupt) or not hasattr(signal, "SIGALRM"):
        sys.__unraisablehook__(dropped)
        return
    # A timer's signal ends a wait, too; SIGINT might be ignored, as by what a shell starts in the background.
    signal.signal(signal.SIGALRM, interrupted)
    signal.setitimer(signal.ITIMER_REAL, 0.05)


def _problem() -> str | None:
    """What of the surroundings keeps every command from running."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        return "standard output is closed; send it to a file, or to /dev/null"
    mask = os.umask(0)
    os.umask(mask)
    if mask & 0o700:
        return f"the umask {mask:04o} keeps you from your own files; set another, such as 022"
    try:
        os.getcwd()  # noqa: PTH109
    except OSError:
        return "the working directory is not there any more; change into another one"
    for argument in sys.argv[1:]:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            return f"an argument is not UTF-8: {argument!a}"
    return None


if __name__ == "__main__":
    # `python -m` puts the working directory first, in which any json.py would be imported; a checkout stays.
    # Not pathlib: it would be imported from there.
    here = os.path.realpath(f"{os.path.realpath(__file__)}/../..")
    if not sys.flags.safe_path and os.path.realpath(sys.path[0]) != here:
        del sys.path[0]
    run()
