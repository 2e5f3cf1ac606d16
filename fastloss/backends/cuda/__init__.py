"""CUDA kernels for arrays on a GPU, compiled through CuPy on first use."""
