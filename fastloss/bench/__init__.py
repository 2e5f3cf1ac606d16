"""Measurements of the losses and of other implementations of them, on real volumes.

`fastloss.cli` and the benchmarks of the repository share this package. The library itself does not
import it, and torch, MONAI and JAX are imported only when they are measured.
"""
