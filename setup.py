"""Builds the compiled extension with csrc/extension.py; all else is declared in pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent.resolve() / "csrc"))

from extension import NotBuiltError, build_extension, tools


class BuildWithExtension(build_py):
    def run(self) -> None:
        super().run()
        build_extension(Path("" if self.editable_mode else self.build_lib, "stem_kernels"))


class WithObjects(Distribution):
    """A wheel with objects is for one platform, one without for all."""

    def has_ext_modules(self) -> bool:
        try:
            return bool(tools())
        except NotBuiltError:
            return False


setup(
    distclass=WithObjects,
    cmdclass={"build_py": BuildWithExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
