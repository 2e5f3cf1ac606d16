"""PyTorch: tensors, autograd, operators for graphs, and process groups."""
