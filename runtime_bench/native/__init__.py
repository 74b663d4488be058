"""A measuring program for machines without Python: built from the llama.cpp source of llama-cpp-python.

The program answers the same requests as `runtime_bench.worker`; see runner.cpp.
"""
