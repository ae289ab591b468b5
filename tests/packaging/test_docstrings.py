"""Every public name says what it takes: arguments, shapes of tensors, errors."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
_SITE = ROOT / "docs" / "site.py"
_spec = importlib.util.spec_from_file_location("docs_site", _SITE)
assert _spec is not None
assert _spec.loader is not None
site = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(site)

SECTIONS = r"Args|Returns|Raises|Attributes|Yields|Source"
CHECKS = re.compile(r"^\s+(raise |_?check_\w+\()", re.MULTILINE)
MAKERS = ("__new__", "__init__", "__post_init__")
PUBLIC = [(package, name) for package in site.PACKAGES for name in site.public_names(package)]


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


def made_by(thing: Any) -> list[Any]:
    """The functions that run where a function or class is called: one's own, or those of bases."""
    if not inspect.isclass(thing):
        return [thing]
    bodies = [vars(base).get(name) for base in thing.__mro__ for name in MAKERS]
    return [body for body in bodies if inspect.isfunction(body) and is_written(body)]


def is_written(body: Any) -> bool:
    """Whether a function stands in a file: a dataclass makes others as it is defined."""
    return Path(inspect.getfile(body)).is_relative_to(ROOT)


def arguments_asked(thing: Any) -> dict[str, inspect.Parameter]:
    """The arguments that a function or class takes by name.

    An error that says nothing of its own takes a message, and a protocol is never made.
    """
    if inspect.isclass(thing):
        silent = issubclass(thing, Exception) and "__init__" not in vars(thing)
        if silent or getattr(thing, "_is_protocol", False):
            return {}
    return dict(inspect.signature(thing).parameters)


def lacks(thing: Any) -> Iterator[str]:
    """What the docstring of a class or function does not say."""
    text = inspect.cleandoc(thing.__doc__ or "")  # not a base's, which readers do not see
    if not text:
        yield "no docstring"
        return
    said = arguments_of(text)
    for name, parameter in arguments_asked(thing).items():
        if name not in said:
            yield f"argument {name}"
        elif "Tensor" in str(parameter.annotation) and "[" not in said[name]:
            yield f"shape of {name}"
    if inspect.isfunction(thing):
        returned = section(text, "Returns") or text.splitlines()[0]
        if "Tensor" in str(inspect.signature(thing).return_annotation) and "[" not in returned:
            yield "shape of what is returned"
    checked = any(CHECKS.search(inspect.getsource(body)) for body in made_by(thing))
    if checked and not section(text, "Raises"):
        yield "errors"


def constant_is_described(package: str, name: str) -> bool:
    """Whether a text follows the place where a constant that a package hands on is assigned."""
    home = package
    for node in ast.walk(parsed(package)):
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            home = importlib.util.resolve_name(f"{'.' * node.level}{node.module}", package)
    for node, after in itertools.pairwise(parsed(home).body):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return False


def parsed(module: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(inspect.getsource(importlib.import_module(module)))


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=lambda value: value)
def test_a_public_name_says_what_it_takes(package: str, name: str) -> None:
    thing = getattr(importlib.import_module(package), name)
    if callable(thing):
        assert list(lacks(thing)) == []
    else:
        assert constant_is_described(package, name), "write what it is below its value"


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


def test_what_a_class_lacks_is_found_and_a_base_says_nothing_for_it() -> None:
    @dataclasses.dataclass
    class Base:
        """A size.

        Args:
            size: Size in pixels.
        """

        size: int

        def __post_init__(self) -> None:
            raise ValueError

    class Derived(Base):
        """A larger size."""

    assert list(lacks(Base)) == ["errors"]
    assert list(lacks(Derived)) == ["argument size", "errors"]
