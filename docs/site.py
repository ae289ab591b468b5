"""`make docs`: README, docs/ and the docstrings of public names as pages in out/docs/site."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "out" / "docs" / "pages"
STAGED = (
    "docs/*.md", "docs/*.png", "benchmarks/results/*.*", "stem/world/model/README.md",
    "CONTRIBUTING.md", "CHANGELOG.md", "examples/*.py",
)  # fmt: skip
PACKAGES = (
    "stem", "stem_kernels", "stem.attention", "stem.inversion", "stem.editing", "stem.metrics",
    "stem.video", "stem.world",
)  # fmt: skip
"""Packages whose public names have a page; docs/mkdocs.yml lists the same."""


def public_names(package: str) -> list[str]:
    """The names in a package's `__all__`, read without importing it."""
    source = (ROOT / package.replace(".", "/") / "__init__.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise ValueError(f"{package} has no __all__; name its public names there")


def stage() -> None:
    """Lay out the pages that mkdocs reads, as they lie in the tree, so that their links hold."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for pattern in STAGED:
        for path in ROOT.glob(pattern):
            target = PAGES / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    shutil.copy(ROOT / "README.md", PAGES / "index.md")
    (PAGES / "api").mkdir()
    for package in PACKAGES:
        blocks = [f"::: {package}.{name}" for name in public_names(package)]
        page = "\n\n".join([f"# {package}", *blocks])
        (PAGES / "api" / f"{package}.md").write_text(f"{page}\n")


if __name__ == "__main__":
    stage()
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "-f", "docs/mkdocs.yml"]
    sys.exit(subprocess.run(command, cwd=ROOT, check=False).returncode)
