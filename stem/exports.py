"""Public names of a package that are loaded when they are first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose names come from modules of its own.

    Args:
        package: Name of the package, its `__name__`.
        modules: Public names by the module that they are in, relative to the package.
    """

    def get(name: str) -> Any:
        for module, names in modules.items():
            if name in names:
                return getattr(importlib.import_module(f".{module}", package), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        loaded = vars(importlib.import_module(package))
        return sorted({*loaded, *(name for names in modules.values() for name in names)})

    return get, names
