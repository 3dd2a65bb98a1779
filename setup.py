"""Installs `configs/` as `fmcv_jax/configs/`, which pyproject.toml cannot say; everything else stands there."""

from setuptools import find_packages, setup

setup(
  packages=[*find_packages(include=['fmcv_jax*']), 'fmcv_jax.configs', 'fmcv_jax.configs.demo'],
  package_dir={'fmcv_jax.configs': 'configs'},
)
