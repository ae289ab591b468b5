"""Features as colours: the same three principal components for several maps."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_SHOWN = (0.01, 0.99)  # quantiles that become no and full brightness


class ColourProjection:
    """Principal component analysis of several maps together, to red, green and blue.

    One fit, so that a colour means the same in all of them. The first component is red; each
    channel runs from the 1 % to the 99 % quantile of all features.

    Args:
        maps: Features [n, C, h, w], floating point, C >= 3 the same in all.

    Attributes:
        mean: Mean of all features, float64 [C].
        axes: Principal axes, float64 [3, C], by descending variance; of each the largest weight
            is positive.
    """

    def __init__(self, maps: Iterable[torch.Tensor]) -> None:
        features = torch.cat([_rows(features) for features in maps])
        self.mean = features.mean(dim=0)
        centred = features - self.mean
        # From the covariance, for it is exact, and small where features are many.
        _, vectors = torch.linalg.eigh(centred.mT @ centred)
        axes = vectors.flip(1)[:, :3].mT
        largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
        self.axes = axes * largest.sign()
        components = (centred @ self.axes.mT).sort(dim=0).values
        last = len(components) - 1
        self._low, high = (components[round(share * last)] for share in _SHOWN)
        self._span = (high - self._low).clamp(min=torch.finfo(torch.float32).tiny)

    def colours(self, maps: torch.Tensor) -> torch.Tensor:
        """Pictures, uint8 [n, h, w, 3], of features [n, C, h, w], on the CPU."""
        components = (_rows(maps) - self.mean) @ self.axes.mT
        shown = ((components - self._low) / self._span).clamp(0, 1) * 255
        count, _, height, width = maps.shape
        return shown.round().to(torch.uint8).view(count, height, width, 3)


def _rows(maps: torch.Tensor) -> torch.Tensor:
    """Features [n, C, h, w] as rows, float64 [n h w, C], on the CPU."""
    return maps.cpu().double().permute(0, 2, 3, 1).flatten(0, 2)
