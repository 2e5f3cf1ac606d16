"""JAX: arrays, tracers, and the two passes as calls of compiled programs."""
