"""`configs/` travels in the wheel as `fedsafe_jax.configs`; everything else is in setup.cfg."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fedsafe_jax*"]), "fedsafe_jax.configs"],
    package_dir={"fedsafe_jax.configs": "configs"},
)
