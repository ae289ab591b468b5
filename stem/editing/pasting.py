"""Frames of an edit: decoded, with the source's pixels where the edit leaves the source alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn.functional import interpolate

from ..diffusion.pipeline import VAE_FRAMES, decoded_in_turns
from ..inversion import InversionFolder
from .job import Edit
from .regions.masks import dilated


def edited_parts(
    pipeline: Any,
    inversion: InversionFolder,
    edit: Edit,
    source: Iterable[torch.Tensor] | None = None,
) -> Iterator[torch.Tensor]:
    """The frames of an edit, a few at a time; outside the masks of a pasted one the source's.

    A VAE's decoder normalises over the whole picture: where an object changes, it tints what is
    left as it was, too.

    Args:
        pipeline: Pipeline that the edit was made with.
        inversion: Inversion that was edited, of the whole video.
        edit: Edit; one in a window is put back into the frames.
        source: Frames of the source, uint8 [n, H, W, 3] in parts of `VAE_FRAMES`; None: what the
            VAE makes of the inversion's own latents.

    Returns:
        Parts [n, H, W, 3], uint8, on the CPU.
    """
    decoded = decoded_in_turns(pipeline, edit.latents)
    if not edit.pasted:
        yield from decoded
        return
    if source is None:
        source = decoded_in_turns(pipeline, inversion.x0())
    first = 0
    for frames, of_source in zip(decoded, source, strict=True):
        here = slice(first, first + len(frames))
        if edit.zoom is not None:
            assert edit.zoomed_masks is not None
            yield edit.zoom[here].pasted(frames, of_source, edit.zoomed_masks[here])
        else:
            assert edit.masks is not None
            yield pasted(frames, of_source, edit.masks[here])
        first = here.stop


def edited_frames(
    pipeline: Any, inversion: InversionFolder, edit: Edit, source: torch.Tensor | None = None
) -> torch.Tensor:
    """All frames of `edited_parts`, uint8 [N, H, W, 3]; those of the source are one tensor."""
    parts = None if source is None else source.split(VAE_FRAMES)
    return torch.cat(list(edited_parts(pipeline, inversion, edit, parts)))


def pasted(frames: torch.Tensor, source: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Frames inside masks, the source's outside; one fades into the other over the cells between.

    Args:
        frames: Edited frames, uint8 [N, H, W, 3].
        source: Frames of the source, likewise.
        masks: Where the video may have changed, bool [N, h, w] in latent cells.

    Returns:
        uint8 [N, H, W, 3]: the edited frames' in the masks' own cells.
    """
    wide = dilated(masks, 1).float().unsqueeze(1)
    share = interpolate(wide, frames.shape[1:3], mode="bilinear").permute(0, 2, 3, 1)
    mixed = source + share * (frames.float() - source)
    return mixed.round().to(torch.uint8)
