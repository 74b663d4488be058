"""A measuring program for machines without Python: built from the llama.cpp source of llama-cpp-python, and run.

The program answers the same requests as `runtime_bench.worker`; see runner.cpp.
"""

from runtime_bench.native.build import RunnerBuild, build_runner, read_build
from runtime_bench.native.targets import RUNNER_TARGETS, RunnerTarget, runner_target_for

__all__ = [
    "RUNNER_TARGETS",
    "RunnerBuild",
    "RunnerTarget",
    "build_runner",
    "read_build",
    "runner_target_for",
]
