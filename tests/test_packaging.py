"""What an installation brings: declared dependencies, and `stem_kernels` with torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BOUNDS = dict(entry.split(">=") for entry in PROJECT["dependencies"])
# Distributions whose module has another name.
MODULES = {"pyyaml": "yaml", "pillow": "PIL", "scikit-video": "skvideo"}
BASE = {MODULES.get(name, name) for name in BOUNDS}
# What the extras bring.
EXTRAS = {"triton", "nvtx", "skimage", "cv2"}


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


def test_the_report_s_templates_are_installed_too() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = document["tool"]["setuptools"]["package-data"]["stem"]
    brought = {path for pattern in patterns for path in ROOT.glob(f"stem/{pattern}")}
    templates = {path.name for path in brought if path.parent.name == "templates"}
    assert templates == {"report.html", "report.css", "report.js"}


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
