"""Step-Audio 2 in JAX/Flax: listen, think and speak on TPU, GPU and CPU."""
