"""Measurements of the losses and of other implementations of them, on real volumes.

`fastloss.cli` and the benchmarks of the repository share this package. Nothing here is imported
by the library itself, and torch, MONAI and JAX are imported only once they are measured.
"""
