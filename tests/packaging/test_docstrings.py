"""Every public name says what it takes: arguments, shapes of tensors, errors."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_SITE = Path(__file__).parents[2] / "docs" / "site.py"
_spec = importlib.util.spec_from_file_location("docs_site", _SITE)
assert _spec is not None
assert _spec.loader is not None
site = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(site)

SECTIONS = r"Args|Returns|Raises|Attributes|Yields|Source"
CHECKS = re.compile(r"^\s+(raise |_?check_\w+\()", re.MULTILINE)
PUBLIC = [(package, name) for package in site.PACKAGES for name in site.public_names(package)]


def is_protocol(thing: type) -> bool:
    """Whether a class is made by those who implement it, with arguments of their own."""
    return bool(getattr(thing, "_is_protocol", False))


def section(text: str, title: str) -> str:
    """The body of a section of a docstring; empty where there is none."""
    found = re.search(rf"^{title}:\n(.*?)(?=^(?:{SECTIONS}):|\Z)", text, re.MULTILINE | re.DOTALL)
    return "" if found is None else found[1]


def arguments_of(text: str) -> dict[str, str]:
    """Texts of the arguments of a docstring by name; one text may be several arguments'."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section(text, "Args").splitlines():
        begun = re.match(r" {4}(\*{0,2}\w+(?:, \w+)*): (.*)", line)
        if begun:
            names = [name.strip(" *") for name in begun[1].split(",")]
            found |= dict.fromkeys(names, begun[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def lacks(thing: Any) -> Iterator[str]:
    """What the docstring of a class or function does not say."""
    text = inspect.getdoc(thing) or ""
    if not text:
        yield "no docstring"
        return
    if inspect.isclass(thing) and (issubclass(thing, Exception) or is_protocol(thing)):
        return
    said = arguments_of(text)
    for base in inspect.getmro(thing) if inspect.isclass(thing) else ():
        said = {**arguments_of(inspect.cleandoc(base.__doc__ or "")), **said}
    signature = inspect.signature(thing)
    for name, parameter in signature.parameters.items():
        if name not in said:
            yield f"argument {name}"
        elif "Tensor" in str(parameter.annotation) and not re.search(r"\[|element", said[name]):
            yield f"shape of {name}"
    if inspect.isfunction(thing):
        returned = section(text, "Returns") or text.splitlines()[0]
        if "Tensor" in str(signature.return_annotation) and "[" not in returned:
            yield "shape of what is returned"
        if CHECKS.search(inspect.getsource(thing)) and not section(text, "Raises"):
            yield "errors"


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=lambda value: value)
def test_a_public_name_says_what_it_takes(package: str, name: str) -> None:
    thing = getattr(importlib.import_module(package), name)
    if callable(thing):
        assert list(lacks(thing)) == []


def test_the_reference_has_a_page_for_every_package() -> None:
    listed = re.findall(r"api/([\w.]+)\.md", (_SITE.parent / "mkdocs.yml").read_text())
    assert listed == list(site.PACKAGES)


def test_what_is_lacking_is_found() -> None:
    def silent(frames: "torch.Tensor", size: int) -> "torch.Tensor":  # type: ignore[name-defined] # noqa: F821, UP037
        """The frames in another size.

        Args:
            frames: Frames of a video.
        """
        raise ValueError

    assert list(lacks(silent)) == [
        "shape of frames",
        "argument size",
        "shape of what is returned",
        "errors",
    ]
