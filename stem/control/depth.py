"""Depth of frames, which a ControlNet on depth is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import interpolate

from .edges import check_frames

DEPTH_MODEL = "Intel/dpt-hybrid-midas"
"""Hub id of the model that Stable Diffusion's depth models were trained with."""
_BATCH = 8  # frames that go through the model at once


def depth(
    frames: torch.Tensor, model: str = DEPTH_MODEL, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Depth of every frame by a model of transformers: what is near is bright.

    The darkest and the brightest place of all frames together become 0 and 255, so that one depth
    has one brightness in the whole video.

    Args:
        frames: Frames, uint8 [N, H, W, 3].
        model: Hub id that is in the hub's cache on this machine, or a folder in transformers'
            format, of a model that gives inverse depth (DPT, MiDaS, Depth Anything); nothing is
            downloaded.
        device: Device to run on.

    Returns:
        uint8 [N, H, W, 3] on the CPU.

    Raises:
        ValueError: frames of another dtype or shape, or no such model on this machine.
    """
    check_frames(frames)
    estimate = _estimator(model, device)
    size = (frames.shape[1], frames.shape[2])
    parts = []
    for part in frames.cpu().split(_BATCH):
        found = estimate(part)
        parts.append(interpolate(found.unsqueeze(1), size, mode="bicubic", align_corners=False))
    near = torch.cat(parts).permute(0, 2, 3, 1)
    low, high = near.aminmax()
    scaled = (near - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    return (255 * scaled).round().to(torch.uint8).expand(-1, -1, -1, 3).contiguous()


def check_model(model: str) -> None:
    """Raise ValueError where a depth model's configuration is not on this machine."""
    _loaded("AutoConfig", model)


def _estimator(model: str, device: torch.device | str) -> Any:
    """A function of frames, uint8 [n, H, W, 3], that gives inverse depth, float32 [n, h, w]."""
    processor = _loaded("AutoImageProcessor", model)
    network = _loaded("AutoModelForDepthEstimation", model).eval().to(device)

    @torch.inference_mode()
    def estimate(part: torch.Tensor) -> torch.Tensor:
        given = processor(images=list(part.numpy()), return_tensors="pt").to(device)
        found: torch.Tensor = network(**given).predicted_depth.float().cpu()
        return found

    return estimate


def _loaded(kind: str, model: str) -> Any:
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, OSError) and not Path(model).is_dir():
            raise ValueError(
                f"the depth model {model!r} is not on this machine; hf download {model}, or name "
                "the folder of another"
            ) from error
        raise ValueError(f"no depth model can be loaded from {model!r}: {error}") from error
