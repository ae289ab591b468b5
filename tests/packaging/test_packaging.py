"""What an installation brings: declared dependencies, and `stem_kernels` with torch alone."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import stem

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BOUNDS = dict(entry.split(">=") for entry in PROJECT["dependencies"])
# Distributions whose module has another name.
MODULES = {"pyyaml": "yaml", "pillow": "PIL", "scikit-video": "skvideo"}
BASE = {MODULES.get(name, name) for name in BOUNDS}
# What the extras bring.
EXTRAS = {"triton", "nvtx", "skimage", "cv2", "gradio", "starlette"}


def test_every_module_that_is_imported_is_installed() -> None:
    imported = set()
    for path in (*ROOT.glob("stem/**/*.py"), *ROOT.glob("stem_kernels/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module.split(".")[0])
    missing = imported - BASE - EXTRAS - sys.stdlib_module_names - {"stem", "stem_kernels"}
    assert not missing


def pins(name: str) -> dict[str, str]:
    """Versions of a constraints file, by name."""
    lines = (ROOT / name).read_text().splitlines()
    pairs = [line.lower().split("==") for line in lines if not line.startswith("#")]
    return dict(pairs)


def test_the_lower_bounds_are_those_that_make_lowest_installs() -> None:
    lowest = pins("constraints-lowest.txt")
    assert BOUNDS.items() <= lowest.items()
    assert BOUNDS.keys() <= pins("constraints.txt").keys()


# Python takes a module that is None for one that is not installed.
TORCH_ALONE = """
import sys

sys.modules.update(dict.fromkeys(%r))
import torch
import stem_kernels
x = torch.randn(1, 1, 64, 8)
assert stem_kernels.stem_attention(x, x, x, num_bases=4).shape == x.shape
from stem_kernels.info import describe
print(describe())
"""


def test_the_operators_need_torch_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TORCH_ALONE % sorted((BASE | EXTRAS) - {"torch"})],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "torch  usable" in done.stdout


def test_the_version_stands_once() -> None:
    assert PROJECT["dynamic"] == ["version"]  # setuptools reads it from stem/__init__.py
    changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert changes[0] == stem.__version__


def run(*command: str | Path, folder: Path, **variables: str) -> str:
    """What the command printed."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Not all that lies in the working tree: an older build, what was built in place, environments.
LEFT_OUT = (".*", "build", "dist", "out", "*.egg-info", "__pycache__", "*.so", "_build_info.json")
# Every file of the packages that is no module: templates, weights, tile tables, py.typed.
DATA = {
    path.relative_to(ROOT).as_posix()
    for package in ("stem", "stem_kernels")
    for path in (ROOT / package).rglob("*")
    if path.is_file() and path.suffix not in (".py", ".pyc", ".so")
} - {"stem_kernels/_build_info.json"}
# One process, as imports are most of the time: the packages, an operator, the installed command.
INSTALLED = """
import runpy
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import stem, stem_kernels

x = torch.randn(1, 1, 64, 8)
assert stem_kernels.stem_attention(x, x, x, num_bases=4).shape == x.shape
for package in (stem, stem_kernels):
    assert Path(package.__file__).is_relative_to(sys.argv[1]), package.__file__
assert version("stem-inversion") == stem.__version__
sys.argv = [sys.argv[1] + "/bin/stem", "demo", "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_sdist_and_wheel_hold_what_they_should_and_run(tmp_path: Path) -> None:
    shutil.copytree(ROOT, tmp_path / "tree", ignore=shutil.ignore_patterns(*LEFT_OUT))
    build = [sys.executable, "-c", "from setuptools import build_meta as b; b.build_%s('..')"]
    without = {"STEM_SKIP_EXT": "1"}  # pip has compiled the extension before this test runs
    run(*build[:2], build[2] % "sdist", folder=tmp_path / "tree", **without)
    name = f"stem_inversion-{stem.__version__}"
    # tarfile's filters came with Python 3.11.4.
    run("tar", "-xf", str(tmp_path / f"{name}.tar.gz"), folder=tmp_path)
    sources = tmp_path / name
    for path in (ROOT / "csrc").rglob("*.*"):
        assert path.suffix == ".pyc" or (sources / path.relative_to(ROOT)).is_file(), path

    run(*build[:2], build[2] % "wheel", folder=sources, **without)
    wheel = tmp_path / f"{name}-py3-none-any.whl"
    held = set(zipfile.ZipFile(wheel).namelist())
    assert not DATA - held
    assert {entry.split("/")[0] for entry in held} == {"stem", "stem_kernels", f"{name}.dist-info"}

    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--no-compile", "--target", site, wheel, folder=tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    python = [sys.executable, "-c", INSTALLED, site]
    assert "Usage: stem demo" in run(*python, folder=empty, PYTHONPATH=str(site))
