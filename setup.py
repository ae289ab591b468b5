"""Everything is declared in pyproject.toml; nothing needs CUDA or a compiler to install."""

from setuptools import setup

setup()
