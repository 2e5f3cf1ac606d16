"""Measurements of the losses and of other implementations of them, on real volumes.

`fastloss.cli`, `fastloss.compare` and the benchmarks of the repository share this package. Losses
and metrics do not import it, and torch, MONAI and JAX are imported only when they are measured.
"""
