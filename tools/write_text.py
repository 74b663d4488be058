"""Have a built-in model write the text that comes with the package: `python tools/write_text.py smollm2-135m`.

One file a seed: the default seed of calibration, and the next, of evaluation. What was sampled before is read from the
cache.
"""

from __future__ import annotations

import argparse

from cfsp.models.reference import load_model
from cfsp.text.self_sampling import sample_windows, text_origin, write_written

SEQLEN = 1024
WINDOWS = {0: 32, 1: 8}
"""Seed -> windows of SEQLEN tokens: to calibrate on, and to judge on. The demo reads half of either."""


def main() -> None:
    """Write one file for each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    arguments = parser.parse_args()
    loaded = load_model(arguments.model)
    for seed, count in WINDOWS.items():
        windows = sample_windows(loaded, nsamples=count, seqlen=SEQLEN, seed=seed, use_written=False)
        about = {
            "model": loaded.source.reference,
            "license": loaded.source.license or "",
            "seed": str(seed),
            "command": f"python tools/write_text.py {arguments.model}",
        }
        print(write_written(text_origin(loaded, seed), windows.flatten(), about))


if __name__ == "__main__":
    main()
