"""CUDA kernels for arrays on a GPU, compiled through CuPy when they are first used."""
