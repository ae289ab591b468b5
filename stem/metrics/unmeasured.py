"""Metrics without a figure: what is missing, and what gets it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch


class UnmeasuredError(ValueError):
    """A metric cannot be measured here; the message says why, and what to do about it.

    Args:
        reason: Reason, such as a package or weights that are not on this machine.
        remedy: Command or advice that makes the metric measurable.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[UnmeasuredError], tuple[str, str]]:
        """What it is made of again by another process, to which an exception takes its message."""
        return type(self), (self.reason, self.remedy)


def torchvision_module(name: str) -> Any:
    """A module of torchvision, an optional package.

    Args:
        name: Full name of the module.

    Raises:
        UnmeasuredError: it is not installed, or it is another build than torch's.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UnmeasuredError("torchvision is not installed", install_torchvision()) from error
    except (ImportError, OSError, RuntimeError) as error:  # its operators do not load
        raise UnmeasuredError(
            f"torchvision does not load beside torch {torch.__version__}: {error}",
            f"pip uninstall torchvision && {install_torchvision()}",
        ) from error


def install_torchvision() -> str:
    """The command that installs the torchvision that belongs to the torch that is here.

    Another version takes another torch along, and another build does not load.
    """
    build = re.fullmatch(r".*\+(cpu|cu\d+|rocm[\d.]+|xpu)", torch.__version__)
    index = f" --index-url https://download.pytorch.org/whl/{build[1]}" if build else ""
    return f"pip install torch=={torch.__version__} torchvision{index}"


def check_weights(weights: Any, get: str) -> None:
    """Raise where a torchvision model's weights would have to be downloaded.

    Args:
        weights: Member of torchvision's enumeration of the model's weights.
        get: Name of that enumeration with its module, from which the command is made.

    Raises:
        UnmeasuredError: the file is not in torch's cache.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(weights.url).path).name
    if not file.is_file():
        module, _, name = get.rpartition(".")
        raise UnmeasuredError(
            f"the weights {file.name} are not in {file.parent}",
            f"python -c 'from {module} import {name}; {name}.DEFAULT.get_state_dict()'",
        )
