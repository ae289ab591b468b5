"""Gradio, imported: without telemetry, and without the stubs that it writes at every import."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_STUBS = "gradio.component_meta"


def check_gradio() -> None:
    """Raise ModuleNotFoundError where Gradio is not installed; nothing is imported."""
    if importlib.util.find_spec("gradio") is None:
        raise ModuleNotFoundError("Gradio is not installed", name="gradio")


def import_gradio(folder: Path) -> Any:
    """Import Gradio; nothing that it does then leaves the machine.

    Args:
        folder: Folder for files that browsers send.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    finder = _WithoutStubs()
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module("gradio")
    finally:
        sys.meta_path.remove(finder)


class _WithoutStubs(importlib.abc.MetaPathFinder):
    """Finds Gradio's module of stubs, and lets it write none.

    For every component it parses the source and writes a .pyi beside it, for editors. That takes
    half of the import's time, and an installed package has them already.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _STUBS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if hasattr(module, "create_or_modify_pyi"):
            module.create_or_modify_pyi = lambda *given: None  # type: ignore[attr-defined]
