"""Benchmarks of this machine: language and speech side with random weights, see `sa2jax bench`."""

from sa2jax.bench.common import Bench, Row, print_bench
from sa2jax.bench.language import bench
from sa2jax.bench.speech import bench_speech

__all__ = ["Bench", "Row", "bench", "bench_speech", "print_bench"]
