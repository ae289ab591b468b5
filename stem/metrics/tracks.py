"""Tracks of points through a video, by CoTracker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from .unmeasured import UnmeasuredError

_CODE = "facebookresearch_co-tracker_main"
_WEIGHTS = "scaled_offline.pth"
_MODEL = "cotracker3_offline"
_GET = f'python -c \'import torch; torch.hub.load("facebookresearch/co-tracker", "{_MODEL}")\''


@dataclass(frozen=True)
class Tracks:
    """Points followed through a video.

    Args:
        places: Places (x, y) in pixels, float32 [n, T, 2].
        seen: Whether the point is seen in the frame, bool [n, T].
    """

    places: torch.Tensor
    seen: torch.Tensor


class Tracker(Protocol):
    """An object that follows points, such as `CoTracker`.

    Args:
        name: Name of the tracker, which stands beside every figure that depends on it.
    """

    @property
    def name(self) -> str: ...

    def __call__(
        self, frames: torch.Tensor, grid: int, where: torch.Tensor | None = None
    ) -> Tracks:
        """Follow a grid of points from the first frame on.

        Args:
            frames: Frames, uint8 [T, H, W, 3].
            grid: Number of points of the grid's sides.
            where: Mask of the points to keep, bool [h, w] in the shape of any size; None: all.
        """
        ...


class CoTracker:
    """CoTracker3, offline, scaled; a `Tracker`.

    Its code and weights must be in torch.hub's folder, where torch.hub itself puts them. The code
    there is run; the weights are read as tensors alone.

    Args:
        device: Device to run on.

    Raises:
        UnmeasuredError: the code, a package that it needs, or the weights are not on this machine;
            nothing is downloaded.

    Source: Karaev et al., arXiv 2410.11831.
    """

    name = "CoTracker3, offline, scaled"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        code = Path(torch.hub.get_dir()) / _CODE
        weights = Path(torch.hub.get_dir()) / "checkpoints" / _WEIGHTS
        for path in (code / "hubconf.py", weights):
            if not path.is_file():
                raise UnmeasuredError(f"CoTracker's {path.name} is not in {path.parent}", _GET)
        try:
            with torch.random.fork_rng():  # its modules set the seed when they are imported
                self._model: Any = torch.hub.load(
                    str(code), _MODEL, source="local", pretrained=False
                )
        except ModuleNotFoundError as error:
            raise UnmeasuredError(
                f"CoTracker needs {error.name}, which is not installed", f"pip install {error.name}"
            ) from error
        state = torch.load(weights, map_location="cpu", weights_only=True)
        self._model.model.load_state_dict(state)
        self._model.eval().to(device)
        self._device = device

    @torch.inference_mode()
    def __call__(
        self, frames: torch.Tensor, grid: int, where: torch.Tensor | None = None
    ) -> Tracks:
        """Follow a grid of points; see `Tracker`."""
        video = frames.permute(0, 3, 1, 2)[None].to(self._device).float()
        mask = None if where is None else where[None, None].float()
        places, seen = self._model(video, grid_size=grid, segm_mask=mask)
        return Tracks(places[0].transpose(0, 1).float().cpu(), seen[0].transpose(0, 1).bool().cpu())
