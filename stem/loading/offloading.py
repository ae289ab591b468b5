"""Keeping a pipeline's weights away from the device that computes, as diffusers can."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch

from ..names import OFFLOADS


def check_offload(
    offload: str | None, offload_folder: str | Path | None, device: torch.device
) -> None:
    """Raise where weights cannot be offloaded so.

    Args:
        offload: Way of offloading, "model", "sequential" or "group"; None: none.
        offload_folder: Folder on a disk for the weights, or None.
        device: Device that computes.

    Raises:
        ValueError: there is no such way, there is no accelerator for it, or it takes no folder.
    """
    if offload is not None and offload not in OFFLOADS:
        raise ValueError(f"offload is {offload!r}; it must be one of {', '.join(OFFLOADS)}")
    if offload_folder is not None and offload != "group":
        raise ValueError(
            f"offload_folder is {str(offload_folder)!r}, and offload is {offload!r}: only group "
            "offloading keeps weights on a disk; pass offload='group' (--offload group)"
        )
    if offload in ("model", "sequential") and device.type == "cpu":
        raise ValueError(
            f"offload is {offload!r}, which keeps weights on the CPU until an accelerator needs "
            "them, and device is 'cpu': there is no accelerator to spare. On a CPU, "
            "offload='group' with offload_folder=FOLDER (--offload group --offload-folder FOLDER) "
            "keeps weights on a disk"
        )
    if offload_folder is not None and Path(offload_folder).is_file():
        raise ValueError(
            f"offload_folder is {str(offload_folder)!r}, which is a file; name a folder"
        )


def offload_weights(
    pipeline: Any, how: str, folder: str | Path | None, device: torch.device
) -> None:
    """Offload the weights of a pipeline that is on the CPU.

    Files in the folder are removed with the parts of the pipeline that they belong to, or when
    Python ends.

    Args:
        pipeline: Pipeline of diffusers.
        how: Way of offloading, see `check_offload`.
        folder: Folder on a disk for the weights, or None.
        device: Device that computes.

    Raises:
        OSError: the folder cannot be written.
    """
    if how == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif how == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                _in_groups(module, folder, device)


def _in_groups(module: torch.nn.Module, folder: str | Path | None, device: torch.device) -> None:
    from diffusers.hooks import apply_group_offloading

    files = None
    # Group offloading would load the VAE's float16 from its files while it must be float32.
    upcast = getattr(getattr(module, "config", None), "force_upcast", False)
    if folder is not None and not (upcast and next(module.parameters()).dtype == torch.float16):
        Path(folder).mkdir(parents=True, exist_ok=True)
        # diffusers names a file by its layer alone, and keeps what another model left there.
        files = tempfile.mkdtemp(prefix=f"{type(module).__name__}-", dir=folder)
        weakref.finalize(module, shutil.rmtree, files, ignore_errors=True)
    # Blocks as a whole would not do in chunks.
    apply_group_offloading(
        module,
        onload_device=device,
        offload_type="leaf_level",
        offload_to_disk_path=files,
    )
