"""`configs/` travels in the wheel as `fedsafe_jax.configs`; everything else is in setup.cfg."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Builds the package with the configs inside.

    The mapping is made here and not in setup.cfg: with a `package_dir` of two folders, setuptools
    answers an editable install with an import hook, which type checkers cannot follow. Without it
    they get a `.pth` file that names the repository, where `configs/` is at hand anyway.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        self.packages = [*self.packages, "fedsafe_jax.configs"]
        self.package_dir = {**self.package_dir, "fedsafe_jax.configs": "configs"}


setup(cmdclass={"build_py": BuildWithConfigs})
