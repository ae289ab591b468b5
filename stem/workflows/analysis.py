"""How steady the features of inversions are along a video's flow: the paper's Figure 5."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..attention.families import unet_of
from ..attention.features import LastFeatures
from ..control import Control
from ..diffusion.checks import check_pipeline
from ..diffusion.control import checked_controls, control_records
from ..diffusion.fingerprint import fingerprint
from ..diffusion.loop import denoise, guided
from ..diffusion.motion import check_frames, check_without_motion
from ..diffusion.pipeline import encode_frames, encode_prompt, execution_device
from ..diffusion.schedule import inverse_scheduler
from ..distributed import Ranks
from ..inversion.inverting import check_chunk
from ..inversion.methods import attention_config, attention_on, check_methods
from ..inversion.round_trips import chunked, pixels, shown_in
from ..metrics import Flow, estimate_flow, warped_similarity
from ..report.analysis_files import Shown, analysis_files, write_analysis
from ..storage import check_output, tensor_hash
from ..video import Video
from .comparison import result_name


@dataclass(frozen=True)
class FeatureCurve:
    """The features of one inversion along the flow.

    Args:
        similarity: Mean cosine similarity of each frame's features with the former frame's, warped
            onto it by the flow, over the cells seen in both, by timestep.
        features: Features at the timestep shown, float32 [N, C, h, w], on the CPU.
        layer: Name of the self-attention that they come out of.
    """

    similarity: dict[int, float]
    features: torch.Tensor
    layer: str

    @property
    def mean(self) -> float:
        """The mean over all timesteps."""
        return statistics.fmean(self.similarity.values())


@dataclass(frozen=True)
class Analysis:
    """What `analyse` found, and the files it wrote.

    Args:
        curves: Features of each inversion, by method.
        flow: Flow of the video.
        timestep: Timestep that the picture shows.
        json: Path of the figures' file.
        sheet: Path of the picture.
        plot: Path of the plot over the timesteps.
    """

    curves: dict[str, FeatureCurve]
    flow: Flow
    timestep: int
    json: Path
    sheet: Path
    plot: Path


def analyse(
    pipeline: Any,
    video: Video,
    prompt: str,
    out: str | Path,
    methods: Sequence[str] = ("ddim", "stem"),
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    flow: str | Flow | None = None,
    timestep: int | None = None,
    num_steps: int = 50,
    chunk: int | str | None = "auto",
    model: str | Mapping[str, Any] = "",
    control: Control | Sequence[Control] | None = None,
    note: str = "",
    group: dist.ProcessGroup | None = None,
    progress: bool = True,
) -> Analysis:
    """Measure how stable an inversion's features are; write analysis.json, .png and -plot.png.

    The features are the output of the decoder's last self-attention at every step of the inversion.
    The features of the previous frame are warped onto the current frame by the optical flow of the
    input frames. Their cosine similarity with the current frame's own features is the figure. An
    interrupted analysis starts again from the beginning.

    Args:
        pipeline: Pipeline, as for `invert`.
        video: Video to invert, at least 2 frames.
        prompt: Prompt that describes it.
        out: Folder below which the three files get a folder of their own. Its name depends on the
            video and on everything else that the files depend on.
        methods: Names of METHODS.
        options: Fields of the methods' configurations, by method.
        flow: Flow of the video. "dis" or "raft": `estimate_flow` estimates it. A known `Flow`, such
            as that of `world_flow`: it has the size of the frames or of the features. None: RAFT if
            its weights are on this machine, else DIS.
        timestep: Timestep to show in the picture; the nearest one of the inversion is taken. None:
            the middle one.
        num_steps: Number of steps of each inversion.
        chunk: Number of frames that go through the UNet at once, as for `invert`.
        model: Name of the pipeline, for the record, or more, as for `invert`.
        control: What the pipeline's ControlNets are shown, as for `invert`.
        note: Note for analysis.json, such as that the weights are random.
        group: Process group whose ranks share the chunks; all ranks make this call. Its first
            rank estimates the flow and writes the files.
        progress: Whether to show progress.

    Raises:
        UnmeasuredError: the flow cannot be estimated on this machine.
        TypeError: `methods` is one name.
        ValueError: a method or option is unknown, the bases are of some frames only (`fit_frames`),
            or the pipeline or number of steps cannot be inverted. It is raised before anything is
            inverted.
        OSError: `out` cannot be written.

    Source: arXiv 2312.05856, Figure 5.
    """
    out, options = Path(out), options or {}
    check_output(out)
    check_pipeline(pipeline)
    controls = checked_controls(pipeline, control, *video.frames.shape[:3])
    check_without_motion(pipeline, "analyse")
    check_analysable(video, methods, options)
    check_chunk(chunk)
    check_frames(
        pipeline, video.num_frames, chunk=chunk if isinstance(chunk, int) else None, group=group
    )
    ranks, fingerprinted = Ranks(group), fingerprint(pipeline)
    ranks.check_equal("model", fingerprinted)
    timesteps = [int(step) for step in inverse_scheduler(pipeline, num_steps).timesteps]
    middle = timesteps[len(timesteps) // 2]
    shown = middle if timestep is None else min(timesteps, key=lambda t: abs(t - timestep))
    device = execution_device(pipeline)
    found_flow = ranks.from_main(
        lambda: flow if isinstance(flow, Flow) else estimate_flow(video.frames, flow, device)
    )
    latents = ranks.from_main(lambda: encode_frames(pipeline, video.frames)).to(device)
    curves = {
        method: feature_curve(
            pipeline,
            latents,
            prompt,
            method,
            found_flow,
            options=options.get(method),
            timestep=shown,
            num_steps=num_steps,
            chunk=chunk,
            control=controls,
            group=group,
            progress=progress,
        )
        for method in methods
    }
    settings: dict[str, Any] = {
        "note": note,
        "model": model,
        "prompt": prompt,
        "num_steps": num_steps,
        "options": {method: dict(options.get(method, {})) for method in methods},
        "flow": found_flow.name,
        "timestep_shown": shown,
    }
    if controls:
        settings["control"] = control_records(pipeline, controls)
    hashes = [tensor_hash(tensor) for tensor in (video.frames, found_flow.forward)]
    parts = [repr(settings), repr(fingerprinted), *hashes]
    folder = out / result_name(video.name, parts)
    if ranks.main:
        maps = {method: curve.features for method, curve in curves.items()}
        write_analysis(
            folder,
            video,
            Shown(maps, found_flow, shown),
            {method: curve.similarity for method, curve in curves.items()},
            {**settings, "layer": next(iter(curves.values())).layer},
        )
    return Analysis(curves, found_flow, shown, *analysis_files(folder))


def check_analysable(
    video: Video, methods: Sequence[str], options: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raise before any work if `analyse` could not take these methods of this video.

    Args:
        video: Video to invert.
        methods: Names of the methods.
        options: Fields of the methods' configurations, by method.

    Raises:
        TypeError, ValueError: as `check_methods`, bases of some frames only (`fit_frames`), or a
            single frame.
    """
    check_methods(methods, options, video.num_frames)
    if any(given.get("fit_frames") is not None for given in options.values()):
        raise ValueError("fit_frames is set; the analysis takes bases of all frames")
    if video.num_frames < 2:
        raise ValueError("one frame has no flow; give videos of at least 2 frames")


def feature_curve(
    pipeline: Any,
    latents: torch.Tensor,
    prompt: str,
    method: str,
    flow: Flow,
    *,
    timestep: int,
    options: Mapping[str, Any] | None = None,
    num_steps: int = 50,
    chunk: int | str | None = None,
    control: tuple[Control, ...] = (),
    group: dist.ProcessGroup | None = None,
    progress: bool = False,
) -> FeatureCurve:
    """Invert latents in memory, and follow the last self-attention's features along a flow.

    Args:
        pipeline: Pipeline, as for `invert`.
        latents: Latents of the frames, float32 [N, c, h, w], from `encode_frames`.
        prompt: Prompt that describes the video.
        method: Name of METHODS.
        flow: Flow of the video, of the frames' size or of the features'.
        timestep: Timestep whose features are kept, one of the inversion's.
        options: Fields of the method's configuration.
        num_steps: Number of steps of the inversion.
        chunk: Number of frames that go through the UNet at once, as for `invert`.
        control: What each of the pipeline's ControlNets is shown.
        group: Process group whose ranks share the chunks; all ranks make this call.
        progress: Whether to show progress.
    """
    frames, _, height, width = latents.shape
    ranks, whole = Ranks(group), attention_config(method, options or {}, frames)
    config = ranks.from_main(lambda: chunked(pipeline, whole, latents, chunk, ranks.size))
    scheduler = inverse_scheduler(pipeline, num_steps)
    conditioning = encode_prompt(pipeline, prompt, *pixels(pipeline, latents))
    conditioning = conditioning.showing(shown_in(scheduler, control))
    backwards = flow.reversed()  # from each frame to the former one
    similarity: dict[int, float] = {}
    kept: list[torch.Tensor] = []
    last = LastFeatures(unet_of(pipeline), ranks)

    def follow(step: int, _: torch.Tensor) -> None:
        maps = last.maps(frames, height, width).float()
        moved = backwards.resized(*maps.shape[2:]).to(maps.device)
        now = int(scheduler.timesteps[step])
        similarity[now] = warped_similarity(maps.flip(0), moved.forward, moved.occlusion)
        if now == timestep:
            kept.append(maps.cpu())

    try:
        with attention_on(pipeline, config, group):
            denoise(
                latents,
                scheduler,
                guided(pipeline, conditioning),
                after_step=follow,
                name=f"analyse {method}",
                progress=progress and ranks.main,
            )
    finally:
        last.remove()
    (features,) = kept
    return FeatureCurve(similarity, features, last.layer)
