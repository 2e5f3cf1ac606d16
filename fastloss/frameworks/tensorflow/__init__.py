"""TensorFlow: tensors, gradient tapes, graphs, and XLA."""
