"""Text to calibrate on: what a model writes itself is written by llama.cpp, or by transformers if that cannot."""

from __future__ import annotations

from functools import partial

from cfsp.text import calibration
from cfsp.text.self_sampling import TRANSFORMERS
from exporters.gguf.language_model import LLAMA_CPP

WRITERS = (LLAMA_CPP, TRANSFORMERS)

load_calibration = partial(calibration.load_calibration, writers=WRITERS)
