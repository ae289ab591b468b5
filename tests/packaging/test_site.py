"""`make docs` fails where a built page has a dead link or loads something from another host."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "docs_site", Path(__file__).parents[2] / "docs" / "site.py"
)
assert _spec is not None
assert _spec.loader is not None
site = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(site)

PAGE = """
<link href="https://fonts.example.org/font.css" rel="stylesheet"><script src="search.js"></script>
<h1 id="top">A page</h1> <a href="https://arxiv.org/abs/2312.05856">A paper</a>
<a href="#top">Up</a>
<a href="docs/more.html#below">More</a> <a href="docs/more.html#gone">Less</a>
<a href="LICENSE">License</a>
"""


def test_dead_links_and_resources_of_other_hosts_are_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "index.html").write_text(PAGE)
    (tmp_path / "docs" / "more.html").write_text('<p id="below"><a href="../index.html">Back</a>')
    (tmp_path / "search.js").touch()
    assert site.faults(tmp_path.resolve()) == [
        "index.html: https://fonts.example.org/font.css",
        "index.html: docs/more.html#gone",
        "index.html: LICENSE",
    ]


def test_a_public_name_is_not_taken_for_a_module_of_its_name() -> None:
    for package in site.PACKAGES:
        for name in site.public_names(package):
            path = site.reference(package, name).split()[1]
            assert not site.ROOT.joinpath(*path.split(".")).with_suffix(".py").exists(), path


def test_what_pages_link_to_is_in_the_site() -> None:
    staged = {path.resolve() for path in site.staged()} | {site.ROOT / "README.md"}
    gone = []
    for page in sorted(path for path in staged if path.suffix == ".md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            linked = (page.parent / target).resolve()
            # A folder stands for the file that is in it.
            if linked not in staged and not any(linked in path.parents for path in staged):
                gone.append(f"{page.relative_to(site.ROOT)}: {target}")
    assert not gone
