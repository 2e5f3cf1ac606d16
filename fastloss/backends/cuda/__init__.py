"""CUDA kernels for arrays in the memory of a GPU, compiled through CuPy when they are first used."""
