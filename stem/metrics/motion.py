"""How well an edit keeps the source's motion, from tracks of points in both videos."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import normalize

from .unmeasured import UnmeasuredError

_LEAST_FRAMES = 5
_LEAST_SIMILARITY = 0.3
_PLACE, _STEP = 0.7, 0.3  # weights of a place's and of a step's similarity


def motion_fidelity(edit: torch.Tensor, source: torch.Tensor) -> float:
    r"""Motion fidelity by the directions of tracks, of the most similar pairs.

    With $u_{it}$ the displacement of the edit's track i from frame t to the next one, of length 1,
    and $v_{jt}$ that of the source's track j, it is

    $$\frac1n \sum_i \max_j \Big(\frac1{T - 1} \sum_t u_{it} \cdot v_{jt} - [i = j]\Big),$$

    so that a track is not matched with the one that began at the same place. A point that does not
    move has no direction; its product is 0.

    Args:
        edit: Tracks in the edit, (x, y) in pixels, float [n, T, 2].
        source: Tracks of the same points in the source, float [n, T, 2].

    Returns:
        -2 ... 1, and more is better.

    Raises:
        UnmeasuredError: one frame, or no track.
        ValueError: tracks of another shape.

    Source: Yatim et al., arXiv 2311.17009, as FiVE, arXiv 2503.13684, computes it.
    """
    if edit.shape != source.shape or edit.ndim != 3 or edit.shape[2] != 2:
        raise ValueError(
            f"the tracks are {list(edit.shape)} and {list(source.shape)}; both must be [n, T, 2]"
        )
    _check_measurable(edit, 2)
    ours, theirs = (normalize(tracks.diff(dim=1), dim=2).flatten(1) for tracks in (edit, source))
    similar = ours @ theirs.T / (edit.shape[1] - 1)
    similar.diagonal().sub_(1)
    return float(similar.max(dim=1).values.mean())


def matched_motion_fidelity(
    edit: torch.Tensor,
    edit_seen: torch.Tensor,
    source: torch.Tensor,
    source_seen: torch.Tensor,
) -> float:
    """Motion fidelity by the places of tracks, of the best matching of one with one.

    The places where a point is seen are stretched over the T frames. The similarity of two tracks
    is the mean over frames of 0.7 / (1 + p) + 0.3 / (1 + s), with p the distance of their places
    and s that of their steps, in units of the mean extent of both tracks. Of the matching with the
    largest sum, pairs above 0.3 count.

    Args:
        edit: Tracks in the edit, (x, y) in pixels, float [n, T, 2].
        edit_seen: Whether the point is seen, bool [n, T].
        source: Tracks in the source, float [m, T, 2].
        source_seen: Whether the point is seen, bool [m, T].

    Returns:
        0 ... 1; 0 if no pair is above 0.3.

    Raises:
        UnmeasuredError: fewer than 5 frames, or no track that is seen twice.

    Source: IVEBench, arXiv 2510.11647, in its released code.
    """
    from scipy.optimize import linear_sum_assignment

    _check_measurable(edit, _LEAST_FRAMES)
    ours, theirs = _stretched(edit, edit_seen), _stretched(source, source_seen)
    extents = [np.linalg.norm(np.ptp(tracks, axis=1), axis=1) for tracks in (ours, theirs)]
    extent = (extents[0][:, None] + extents[1][None]) / 2
    extent[extent < 1e-6] = 1
    places = ours[:, None] - theirs[None]
    steps = np.diff(places, axis=2)
    steps = np.concatenate([steps[:, :, :1], steps], axis=2)
    apart, off = (np.linalg.norm(d, axis=3) / extent[..., None] for d in (places, steps))
    similar = (_PLACE / (1 + apart) + _STEP / (1 + off)).mean(axis=2)
    found = similar[linear_sum_assignment(similar, maximize=True)]
    kept = found[found > _LEAST_SIMILARITY]
    return float(kept.mean()) if kept.size else 0.0


def _stretched(tracks: torch.Tensor, seen: torch.Tensor) -> np.ndarray:
    """Tracks that are seen twice, their seen places stretched over all frames, [k, T, 2]."""
    times = np.linspace(0, 1, tracks.shape[1])
    found = []
    for track, visible in zip(tracks.double().cpu().numpy(), seen.cpu().numpy(), strict=True):
        places = track[visible]
        if len(places) >= 2:
            at = np.linspace(0, 1, len(places))
            found.append(np.stack([np.interp(times, at, axis) for axis in places.T], axis=1))
    if not found:
        raise UnmeasuredError("no point is seen in two frames", "look at the video")
    return np.stack(found)


def _check_measurable(tracks: torch.Tensor, least: int) -> None:
    if tracks.shape[0] == 0:
        raise UnmeasuredError("no point is tracked", "give larger masks")
    if tracks.shape[1] < least:
        raise UnmeasuredError(
            f"{tracks.shape[1]} frames are too few for it", f"give videos of at least {least}"
        )
