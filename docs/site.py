"""`make docs`: README, docs/ and the docstrings of public names as pages in out/docs/site."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "out" / "docs" / "pages"
SITE = ROOT / "out" / "docs" / "site"
STAGED = (
    "docs/*.md", "docs/*.png", "benchmarks/results/*.*", "stem/world/*/README.md",
    "integrations/comfyui/*.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE",
    "examples/*.py",
)  # fmt: skip
PACKAGES = (
    "stem", "stem_kernels", "stem_kernels.video", "stem.attention", "stem.control",
    "stem.inversion", "stem.flow", "stem.editing", "stem.metrics", "stem.video", "stem.world",
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


def reference(package: str, name: str) -> str:
    """What mkdocstrings reads to write about a public name.

    A function may have its module's name (`stem.world.judge`), which then stands for the module.
    """
    if not (ROOT / package.replace(".", "/") / f"{name}.py").exists():
        return f"::: {package}.{name}"
    heading = f"heading: {package}.{name}\n      toc_label: {name}"
    return f"::: {package}.{name}.{name}\n    options:\n      {heading}"


def staged() -> list[Path]:
    """The files of the tree that go into the site, beside README.md."""
    return [path for pattern in STAGED for path in ROOT.glob(pattern)]


def stage() -> None:
    """Lay out the pages that mkdocs reads, as they lie in the tree, so that their links hold."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for path in staged():
        target = PAGES / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    shutil.copy(ROOT / "README.md", PAGES / "index.md")
    (PAGES / "api").mkdir()
    for package in PACKAGES:
        blocks = [reference(package, name) for name in public_names(package)]
        page = "\n\n".join([f"# {package}", *blocks])
        (PAGES / "api" / f"{package}.md").write_text(f"{page}\n")


class Page(HTMLParser):
    """A built page: its anchors, and its links with the tags that they stand in."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[str, str]] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name == "id":
                self.anchors.add(value)
            elif value and name in ("href", "src"):
                self.links.append((tag, value))


def faults(site: Path) -> list[str]:
    """Dead links of built pages, and what the pages would load from another host.

    Args:
        site: Folder of the pages.

    Returns:
        A line for each fault: the page, and the link.
    """
    pages = {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    found = []
    for path, page in pages.items():
        for tag, link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                dead = tag != "a"  # a reader may follow a link; the page itself loads nothing
            else:
                target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                known = pages[target].anchors if target in pages else {parts.fragment}
                dead = not target.exists() or parts.fragment not in {"", *known}
            if dead:
                found.append(f"{path.relative_to(site)}: {link}")
    return found


if __name__ == "__main__":
    stage()
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "-f", "docs/mkdocs.yml"]
    subprocess.run(command, cwd=ROOT, check=True)
    if found := faults(SITE):
        sys.exit("\n".join(["dead links, or resources of other hosts:", *found]))
