"""Benchmarks of the GPU kernels: one module per suite, each a plan of cases in order of importance."""
