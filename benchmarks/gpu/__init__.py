"""Benchmarks on a GPU: suites, the build of the extension, small calls for compute-sanitizer."""
