"""An edit judged: every metric of one edited video, each beside what it was measured by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..distributed import Ranks
from ..metrics import (
    CLIP_MODEL,
    Clip,
    Embedder,
    Flow,
    UnmeasuredError,
    estimate_flow,
    frame_accuracy,
    lpips,
    psnr,
    ssim,
    temporal_consistency,
    text_alignment,
    warp_error,
    warped_ssim,
)
from ..metrics.clip import FRAMES_AT_ONCE
from ..metrics.fidelity import SSIM_VARIANT
from ..metrics.perceptual import LPIPS_VARIANT
from ..models import check_device
from ..names import FLOWS
from ..video import Video
from .figures import Figure, Sheet, attempt, given


@dataclass(frozen=True)
class Evaluation:
    """The figures of one edit.

    Args:
        source: Name of the source video.
        edit: Name of the edited video.
        source_prompt: Prompt that describes the source.
        prompt: Prompt of the edit.
        num_frames: Number of frames of both videos.
        height: Height of both in pixels.
        width: Width of both in pixels.
        figures: Figures, always of the same metrics in the same order; after them the three to
            another video, where one was given.
    """

    source: str
    edit: str
    source_prompt: str
    prompt: str
    num_frames: int
    height: int
    width: int
    figures: tuple[Figure, ...]

    def __getitem__(self, metric: str) -> Figure:
        """The figure of a metric, by its name.

        Raises:
            KeyError: there is no such metric.
        """
        for figure in self.figures:
            if figure.metric == metric:
                return figure
        raise KeyError(f"{metric!r}; there are {', '.join(f.metric for f in self.figures)}")


def evaluate(
    source: Video,
    edit: Video,
    source_prompt: str,
    prompt: str,
    *,
    flow: str | Flow | None = None,
    clip: str | Embedder = CLIP_MODEL,
    device: str | torch.device | None = None,
    against: Video | None = None,
    group: dist.ProcessGroup | None = None,
) -> Evaluation:
    """Measure an edit, of any tool, against its source and its prompts.

    PSNR, SSIM and LPIPS compare the edit with the source; CLIP-text, Tem-Con and Frame-Acc judge it
    by CLIP; Warp-Err and WarpSSIM warp its frames by the source's flow; Q_edit combines them in
    both published forms. If the package or the weights of a metric are not on this machine, its
    figure has no value and says how to get them; nothing is downloaded.

    Args:
        source: Source video, uint8 frames [N, H, W, 3].
        edit: Edited video of the same number of frames and size.
        source_prompt: Prompt that describes the source; "": it is not known, and Frame-Acc is not
            measured.
        prompt: Prompt of the edit.
        flow: Flow of the source. "dis" or "raft": `estimate_flow` estimates it. A known `Flow`,
            such as that of `world_flow`: it is taken as it is. None: RAFT if its weights are on
            this machine, else DIS.
        clip: CLIP model, a hub id or a local folder, or another embedder, such as `WorldJudge`.
        device: Device of the networks; None: "cuda" if there is a GPU, else "cpu".
        against: Another edit, to which PSNR, SSIM and LPIPS are measured, too, such as the same
            edit under dense attention (`dense_edit`); the figures bear its name.
        group: Process group whose ranks share flow and embeddings of the frames; all ranks make
            this call, and each has all figures.

    Raises:
        ValueError: the videos differ in their number of frames or their size, the frames are
            smaller than SSIM's window, the prompt is empty, or a flow, model or device does not
            exist.

    Source: the functions of `stem.metrics` name the source of each metric.
    """
    _check_comparable(source, edit)
    if against is not None:
        _check_against(edit, against)
    if not prompt.strip():
        raise ValueError("prompt is empty; give the prompt of the edit")
    where, ranks = check_device(device), Ranks(group)
    frames, original = edit.frames.cpu(), source.frames.cpu()
    moved = attempt(
        lambda: flow if isinstance(flow, Flow) else _estimated(original, flow, where, ranks)
    )
    judge = attempt(lambda: Clip(clip, where) if isinstance(clip, str) else clip)
    seen = attempt(lambda: _embedded(judge, frames, ranks))
    target = attempt(lambda: given(judge).embed_texts([prompt])[0])
    before = attempt(lambda: given(judge).embed_texts([_known(source_prompt)])[0])
    by_clip = f"CLIP {clip}" if isinstance(clip, str) else clip.name
    by_flow = f"flow of the source: {_flow_name(moved, flow)}"
    by_ssim = f"SSIM: {SSIM_VARIANT}"

    sheet = Sheet()
    _add_fidelity(sheet, frames, original, "the source", where)
    text = sheet.add("CLIP-text x100", by_clip, lambda: text_alignment(given(seen), given(target)))
    sheet.add("Tem-Con", by_clip, lambda: temporal_consistency(given(seen)))
    sheet.add(
        "Frame-Acc",
        by_clip,
        lambda: frame_accuracy(given(seen), given(before), given(target)),
    )
    error = sheet.add(
        "Warp-Err x1000",
        by_flow,
        lambda: _warp_error(frames, given(moved)),
        higher_is_better=False,
    )
    warped = sheet.add(
        "WarpSSIM", f"{by_flow}; {by_ssim}", lambda: warped_ssim(frames, given(moved).backward)
    )
    sheet.add(
        "Q_edit = WarpSSIM x CLIP-text",
        f"{by_flow}; {by_ssim}; {by_clip}",
        lambda: given(warped) * given(text),
    )
    sheet.add(
        "Q_edit = CLIP-text / Warp-Err",
        f"{by_flow}; {by_clip}",
        lambda: given(text) / given(error) if given(error) else math.inf,
    )
    if against is not None:
        name = against.name or "the other"
        _add_fidelity(sheet, frames, against.frames.cpu(), name, where, f", to {name}")
    return Evaluation(
        source.name,
        edit.name,
        source_prompt,
        prompt,
        edit.num_frames,
        edit.height,
        edit.width,
        tuple(sheet.figures),
    )


def _estimated(
    frames: torch.Tensor, model: str | None, device: str | torch.device, ranks: Ranks
) -> Flow:
    """The flow of frames, of whose pairs each rank takes some."""
    if ranks.size >= len(frames):  # one of them would have none
        return estimate_flow(frames, model, device)
    own = ranks.share(len(frames) - 1)
    found = ranks.from_each(lambda: estimate_flow(frames[own.start : own.stop + 1], model, device))
    names = sorted({part.name for part in found})
    if len(names) > 1:
        raise ValueError(
            f"the processes estimate the flow by {' and '.join(names)}; name one of "
            f"{', '.join(FLOWS)} (--flow)"
        )
    return Flow.joined(found)


def _embedded(
    judge: Embedder | UnmeasuredError, frames: torch.Tensor, ranks: Ranks
) -> torch.Tensor:
    """The embeddings of frames, of which each rank takes some as one would take them."""
    own = ranks.share(len(frames), FRAMES_AT_ONCE)
    found = ranks.from_each(
        lambda: given(judge).embed_frames(frames[own.start : own.stop]).cpu() if own else None
    )
    return torch.cat([part for part in found if part is not None])


def _add_fidelity(
    sheet: Sheet,
    frames: torch.Tensor,
    original: torch.Tensor,
    name: str,
    device: torch.device,
    suffix: str = "",
) -> None:
    """PSNR, SSIM and LPIPS of frames to others, which have a name."""
    to = f"to {name}"
    sheet.add(f"PSNR dB{suffix}", f"mean of frames, {to}", lambda: psnr(frames, original))
    sheet.add(f"SSIM{suffix}", f"{to}; SSIM: {SSIM_VARIANT}", lambda: ssim(frames, original))
    sheet.add(
        f"LPIPS{suffix}",
        f"{to}; {LPIPS_VARIANT}",
        lambda: lpips(frames, original, device),
        higher_is_better=False,
    )


def _flow_name(moved: Flow | UnmeasuredError, asked: str | Flow | None) -> str:
    if isinstance(moved, Flow):
        return moved.name
    return asked if isinstance(asked, str) else "none"


def _known(source_prompt: str) -> str:
    if not source_prompt.strip():
        raise UnmeasuredError("the source prompt is not known", "give --source-prompt")
    return source_prompt


def _warp_error(frames: torch.Tensor, flow: Flow) -> float:
    blind = flow.occlusion.flatten(1).all(1).nonzero().flatten().tolist()
    if blind:
        raise UnmeasuredError(
            f"under that flow no pixel of frame {blind[0]} is seen in the next one, as at a cut",
            "evaluate each shot by itself",
        )
    return warp_error(frames, flow.forward, flow.occlusion)


def _check_comparable(source: Video, edit: Video) -> None:
    counts = (source.num_frames, edit.num_frames)
    if counts[0] != counts[1]:
        raise ValueError(
            f"the source has {counts[0]} frames and the edit {counts[1]}; compare the frames that "
            f"the edit was made of, such as the source's first {counts[1]}: --frames {counts[1]}"
        )
    sizes = [f"{video.width}x{video.height}" for video in (source, edit)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the source is {sizes[0]} pixels and the edit {sizes[1]}; scale the source as the "
            f"edit's was: --size {sizes[1]}"
        )


def _check_against(edit: Video, against: Video) -> None:
    shapes = [f"{v.num_frames} frames of {v.width}x{v.height}" for v in (edit, against)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the edit has {shapes[0]} and {against.name or 'the other video'} {shapes[1]}; "
            "compare edits of the same frames and size"
        )
