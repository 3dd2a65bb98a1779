"""fmcv_jax: vision foundation models pretrained in JAX, one sharded train step from a laptop to a pod."""

__version__ = '0.1.0'
