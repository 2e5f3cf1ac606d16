"""Functions of the host that programs of XLA call, in JAX and in TensorFlow."""
