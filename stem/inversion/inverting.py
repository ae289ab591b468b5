"""Inversion of a video: DDIM from its latents to noise, under the attention of a method."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..attention import Recording
from ..attention.layers.stem import StemState
from ..config import AttentionConfig, StemConfig, scenes_of
from ..control import Control
from ..diffusion.checks import check_pipeline
from ..diffusion.control import Shown, checked_controls, control_records
from ..diffusion.environment import numeric_environment
from ..diffusion.fingerprint import fingerprint
from ..diffusion.loop import denoise, guided
from ..diffusion.memory import chunk_that_fits, frames_shared, largest_chunk
from ..diffusion.motion import check_frames
from ..diffusion.pipeline import (
    VAE_FRAMES,
    encode_frames,
    encode_prompt,
    execution_device,
    vae_factor,
)
from ..diffusion.schedule import inverse_scheduler
from ..distributed import Ranks
from ..sources import ModelSource
from ..storage import check_output, remove_stale
from .folder import InversionFolder, MissingFileError
from .methods import attention_config, attention_on, inversion_attention, running_conditions
from .records import (
    FramesInParts,
    attention_record,
    backend_of,
    check_video,
    versions,
    video_record,
)
from .resuming import latents_before, mend_x0, runs_of, undone_steps

logger = logging.getLogger("stem")

_BRANCHES = 3  # of a guided edit, which runs in the inversion's chunks


def invert(
    pipeline: Any,
    video: FramesInParts,
    prompt: str,
    root: str | Path,
    *,
    method: str = "stem",
    options: Mapping[str, Any] | None = None,
    num_steps: int = 50,
    chunk: int | str | None = "auto",
    cuts: Sequence[int] = (),
    model: str | Mapping[str, Any] = "",
    control: Control | Sequence[Control] | None = None,
    keep_bases: bool = False,
    group: dist.ProcessGroup | None = None,
    progress: bool = True,
    on_step: Callable[[], None] | None = None,
) -> InversionFolder:
    r"""Invert a video.

    An inversion of equal settings below `root` is continued, repaired or reused.

    This is deterministic DDIM inversion. From timestep p to timestep t, where $a$ are the
    cumulative alphas, it computes

    $$x_0 = (x - \sqrt{1 - a_p}\, \epsilon) / \sqrt{a_p}, \quad
      x \leftarrow \sqrt{a_t}\, x_0 + \sqrt{1 - a_t}\, \epsilon.$$

    A step whose file is missing, damaged or truncated is computed again from the step before, and
    the log says so; the other steps are kept. The new bits equal the old ones if the number of
    threads and the kind of machine are the same; a warning says if they differ.

    Args:
        pipeline: Stable Diffusion 1.x, 2.x or XL pipeline, or AnimateDiff's on one of these.
        video: Video to invert. Of a `VideoFile`, only a few frames at a time are in memory as
            pixels.
        prompt: Prompt that describes the video.
        root: Folder below which the inversion gets a folder of its own, named by its settings.
        method: Name of the inversion, "ddim", "st-ddim", "inflated" or "stem".
        options: Fields of the method's configuration, e.g. {"num_bases": 64}.
        num_steps: Number of steps; it must divide the training steps of the schedule.
        chunk: Number of frames that go through the UNet at once; "auto": as many as fit into free
            memory and leave each rank a chunk, or the number that an inversion of these settings
            below `root` was begun with, if it does; None: all. Chunks share their bases, so that
            only the last bits of the result depend on this number. With AnimateDiff all frames go
            through at once.
        cuts: Numbers of the frames that begin another scene, such as `stem.find_cuts` gives. Every
            scene has bases of its own, in the inversion and in edits of it.
        model: Name of the pipeline, for the record; or a mapping of `name` and the other arguments
            that `load_pipeline` was given, such as {"name": "one.safetensors", "loras":
            ["style.safetensors:0.7"]}.
        control: What the pipeline's ControlNet or T2I-Adapter is shown, or each of several. The
            pictures are kept in the folder; reconstructions and edits are shown them, too.
        keep_bases: Whether to keep, with "stem", the bases of every step for
            `reconstruct(bases="cached")`.
        group: Process group whose ranks share the chunks; all ranks make this call. Its first
            rank reads, shows progress and writes.
        progress: Whether to show progress.
        on_step: Function called after each step that this call computes. It is not called for a
            step that is reused.

    Returns:
        The complete inversion.

    Raises:
        ValueError: the settings do not fit, or the pipeline cannot be inverted.
        OSError: the folder cannot be written, or its disk has too little space for all steps.
        MemoryError: not even a chunk of one frame fits.

    Source: DDIM inversion, arXiv 2010.02502 and 2105.05233; STEM, arXiv 2312.05856.
    """
    check_video(video, prompt)
    check_pipeline(pipeline)
    controls = checked_controls(pipeline, control, video.num_frames, video.height, video.width)
    source, ranks = ModelSource.of(model), Ranks(group)
    config = attention_config(method, options or {}, video.num_frames, cuts=cuts)
    if keep_bases and not isinstance(config, StemConfig):
        raise ValueError(f'keep_bases needs method "stem"; {method} has no bases')
    if keep_bases and cuts:
        raise ValueError(
            f"keep_bases keeps the bases of one scene, and cuts is {tuple(cuts)}; take one of them"
        )
    check_chunk(chunk)
    check_frames(
        pipeline,
        video.num_frames,
        chunk=chunk if isinstance(chunk, int) else None,
        cuts=config.cuts or None,
        fit_frames=getattr(config, "fit_frames", None),
        group=group,
    )
    scheduler = inverse_scheduler(pipeline, num_steps)
    device = execution_device(pipeline)
    environment = numeric_environment(pipeline)
    fingerprinted = fingerprint(pipeline)
    controlled_by = control_records(pipeline, controls)
    ranks.check_equal("model", fingerprinted)
    ranks.check_equal("control", controlled_by)

    def prepared() -> tuple[InversionFolder, list[int]]:
        check_output(Path(root) / method)
        settings = _settings(pipeline, video, prompt, method, config, num_steps, keep_bases)
        settings["model"] = {"name": source.name, **source.additions, **fingerprinted}
        if controlled_by:
            settings["control"] = controlled_by
        timesteps = tuple(int(timestep) for timestep in scheduler.timesteps)
        size = _chunk(pipeline, settings, timesteps, Path(root), chunk, ranks.size)
        settings["attention"]["chunk"] = size
        environment["chunk"] = str(size or video.num_frames)
        folder, wrong = InversionFolder.prepare(Path(root), settings, timesteps)
        if wrong:
            logger.warning("%s; the settings were written again", wrong)
        remove_stale(folder.path)
        _mend_control(folder, controls, environment)
        mend_x0(folder, environment, lambda: encode_frames(pipeline, video.parts(VAE_FRAMES)))
        undone = undone_steps(folder, environment)
        if not undone:
            logger.info("%s has these settings and is complete; it is reused", folder.path)
        return folder, undone

    folder, undone = ranks.from_main(prepared)
    if not undone:
        return folder
    conditioning = encode_prompt(pipeline, prompt, video.height, video.width)
    if controls:
        conditioning = conditioning.showing(Shown(controls, folder.timesteps))
    with attention_on(pipeline, inversion_attention(folder), group) as handle:
        assert handle is not None
        state = handle.state if keep_bases else None
        recording = Recording()
        if state is not None:
            handle.hooks.add("recording", recording)
        size = _bytes_of_a_step(pipeline, video, state)
        ranks.from_main(lambda: check_output(folder.path, len(undone) * size))

        def keep(step: int, latents: torch.Tensor) -> None:
            conditions = running_conditions(pipeline, environment, video.num_frames)
            if ranks.main and state is not None:
                # Before the latents: a step whose latents are there has its bases, too.
                folder.save_bases(step, recording.found, conditions)
            if ranks.main:
                folder.save_latents(step, latents, conditions)
            if on_step is not None:
                on_step()

        for steps in runs_of(undone):
            before = ranks.from_main(partial(latents_before, folder, steps.start))
            denoise(
                before.to(device),
                scheduler,
                guided(pipeline, conditioning),
                steps=steps,
                after_step=keep,
                name=f"invert {method}",
                progress=progress and ranks.main,
            )
    return folder


def check_chunk(chunk: int | str | None) -> None:
    """Raise ValueError where `chunk` is neither a number of frames nor "auto" nor None."""
    if chunk is None or chunk == "auto" or (type(chunk) is int and chunk >= 1):
        return
    raise ValueError(f"chunk is {chunk!r}; it must be a number of frames of at least 1, or auto")


def _chunk(
    pipeline: Any,
    settings: dict[str, Any],
    timesteps: tuple[int, ...],
    root: Path,
    asked: int | str | None,
    ranks: int,
) -> int | None:
    """The chunk to run with; None where all frames go through the UNet at once."""
    frames = settings["video"]["num_frames"]
    if asked is None or isinstance(asked, int):
        return None if asked is None or asked >= frames else asked
    attention = settings["attention"]
    longest = max(map(len, scenes_of(frames, attention["cuts"])))
    shared = frames_shared(longest, attention.get("fit_frames"))
    sizes = [None, *(2**power for power in range((frames - 1).bit_length()))]
    for size in sizes:
        if -(-shared // (size or frames)) < min(ranks, shared):
            continue  # a rank would have no chunk
        begun = {**settings, "attention": {**attention, "chunk": size}}
        if InversionFolder.path_of(root, begun, timesteps).is_dir():
            return size
    return chunk_that_fits(
        pipeline,
        longest,
        settings["video"]["height"],
        settings["video"]["width"],
        branches=_BRANCHES,
        meets=meets(settings["method"], attention),
        largest=largest_chunk(shared, ranks),
    )


def meets(method: str, attention: Mapping[str, Any]) -> bool:
    """Whether the chunks of a video wait for each other in every self-attention."""
    return method != "ddim" and attention.get("fit_frames") is None


def _mend_control(
    folder: InversionFolder, controls: Sequence[Control], environment: dict[str, str]
) -> None:
    wrong = folder.control_problems()
    if not wrong:
        return
    if folder.steps_done or not isinstance(wrong[0], MissingFileError):
        logger.warning("%s; the control pictures are written again", wrong[0].problem)
    pictures = [each.pictures for each in controls]
    check_output(folder.path, sum(each.numel() for each in pictures))
    folder.save_control(pictures, environment)


def _bytes_of_a_step(pipeline: Any, video: FramesInParts, state: StemState | None) -> int:
    """The size of one step on disk, about: latents, bases and their payload, in float32."""
    factor, channels = vae_factor(pipeline), pipeline.vae.config.latent_channels
    numbers = video.num_frames * channels * (video.height // factor) * (video.width // factor)
    if state is not None:
        bases = sum(torch.Size(shape).numel() for shape in state.bases_shapes)
        # The bases, their payload in key space, and calibrated values, which are as many.
        in_key_space, calibrated = state.config.space == "key", state.config.calibration != "none"
        numbers += bases * (1 + in_key_space + calibrated)
    return 4 * numbers


def _settings(
    pipeline: Any,
    video: FramesInParts,
    prompt: str,
    method: str,
    config: AttentionConfig,
    num_steps: int,
    keep_bases: bool,
) -> dict[str, Any]:
    return {
        "method": method,
        "attention": attention_record(config),
        "prompt": prompt,
        "num_steps": num_steps,
        "keep_bases": keep_bases,
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "device": execution_device(pipeline).type,
        "backend": _backend(pipeline, config),
        "video": video_record(video),
        "versions": versions(),
    }


def _backend(pipeline: Any, config: AttentionConfig) -> str | None:
    """The backend that a STEM run gets; two of them differ in the last bits."""
    if not isinstance(config, StemConfig):
        return None
    device, dtype = execution_device(pipeline), pipeline.unet.dtype
    return backend_of(config.backend, config.num_bases, device, dtype)
