"""Files of results: one form, and one rule for what may stand in the same file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stem_kernels.info import provenance

from .cases.floors import measure_ceilings

RESULTS = Path(__file__).parent / "results"
"""Folder of the results that are committed."""


def fresh(device: torch.device, dtype: torch.dtype, *, small: bool) -> dict[str, Any]:
    """Results of this machine without a row yet: where they come from, and what it can do."""
    ceilings = dataclasses.asdict(measure_ceilings(device, dtype))
    return {**origin(device, small=small), "ceilings": ceilings, "rows": []}


def origin(device: torch.device, *, small: bool) -> dict[str, Any]:
    """What figures must have in common to stand in one file."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "small": small,
        "provenance": provenance("diffusers", "flash-kmeans"),
    }


def taken_up(path: Path, fresh: dict[str, Any], growing: Sequence[str]) -> dict[str, Any]:
    """`fresh`, with what a file of earlier results holds of its entries that grow.

    Args:
        path: File of the earlier results; where there is none, `fresh` is returned as it is.
        fresh: Results without a figure yet.
        growing: Entries of `fresh` that figures are put into; all others must be equal in both.

    Raises:
        SystemExit: another entry differs.
    """
    if not path.is_file():
        return fresh
    earlier = read(path)
    require_same(earlier, fresh, [name for name in fresh if name not in growing], path)
    return {**fresh, **{name: earlier[name] for name in growing}}


def text(results: Mapping[str, Any]) -> str:
    """JSON with a line for every entry of the lists and dictionaries at its top."""
    parts = []
    for name, value in results.items():
        if isinstance(value, dict) and value:
            entries = [f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()]
            written = "{\n" + ",\n".join(entries) + "\n }"
        elif isinstance(value, list) and value:
            written = "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"
        else:
            written = json.dumps(value)
        parts.append(f" {json.dumps(name)}: {written}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write(results: Mapping[str, Any], path: Path) -> None:
    """Write a file whole, or, if this is interrupted, leave the one from before."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text(results))
    partial.replace(path)


def read(path: Path) -> dict[str, Any]:
    """The results that `write` wrote."""
    return json.loads(path.read_text())


def require_same(
    earlier: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str], path: Path
) -> None:
    """Check that earlier figures may stand beside new ones.

    Args:
        earlier: Results read from `path`.
        now: Results about to be measured.
        names: Entries that must be equal in both, such as "provenance".
        path: File of the earlier results, for the message.

    Raises:
        SystemExit: an entry differs; the message names it with both values.
    """
    for name in names:
        if earlier.get(name) != now[name]:
            raise SystemExit(
                f"{path} is of another {name}: {earlier.get(name)}, now {now[name]}; "
                "move it away to start afresh"
            )
