"""Pipelines whose weights wait elsewhere than where they are computed with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import torch

from stem.diffusion.weights import offloading
from stem.loading.offloading import offload_weights

CPU = torch.device("cpu")
WAYS = ("model", "sequential", "group", "group, on a disk")
"""Each on a CPU here, where weights wait on the meta device ("sequential"), or uninitialised (the
last)."""


def offloaded(pipeline: Any, way: str, folder: Path) -> Any:
    """The pipeline itself, whose weights then wait.

    Args:
        pipeline: Pipeline, which no other test has.
        way: One of WAYS.
        folder: Folder, below which "on a disk" keeps its files.
    """
    if way == "sequential":
        # As enable_sequential_cpu_offload, which would take cpu:0, where accelerate makes tensors
        # of parameters.
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                accelerate.cpu_offload(module, CPU, offload_buffers=bool(module._parameters))
    else:
        how, on_disk, _ = way.partition(", ")
        offload_weights(pipeline, how, folder / "weights" if on_disk else None, CPU)
    assert way in offloading(pipeline)
    return pipeline
