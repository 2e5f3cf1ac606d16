"""A small compiler: records the step between the passes and writes it as one CUDA kernel."""
