"""Reconstruction: DDIM sampling from an inversion's last latents back to the video."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..attention import Replay
from ..attention.layers.hooks import LayerBases
from ..config import AttentionConfig, StemConfig
from ..diffusion.control import Shown
from ..diffusion.environment import numeric_environment
from ..diffusion.loop import Predictor, denoise, guided
from ..diffusion.pipeline import decode_latents, encode_prompt, execution_device
from ..diffusion.schedule import sampling_scheduler
from ..distributed import Ranks
from ..names import BASES
from .folder import InversionError, InversionFolder, Progress
from .inverting import check_chunk
from .methods import attention_on, inversion_attention, running_conditions
from .runs import check_same_pipeline, check_startable, earlier_run, run_name

logger = logging.getLogger("stem")


def reconstruct_latents(
    pipeline: Any,
    inversion: InversionFolder,
    *,
    bases: str = "estimate",
    guidance: float = 1.0,
    negative_prompt: str = "",
    chunk: int | None = None,
    group: dist.ProcessGroup | None = None,
    resume: bool = True,
    progress: bool = True,
    on_step: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Sample back from the noisiest latents, with the inversion's prompt, attention and control.

    Args:
        pipeline: Pipeline that the inversion was made with.
        inversion: Inversion to start from, complete.
        bases: Source of the bases of "stem": "estimate" runs EM again at each step; "cached"
            takes the bases that the inversion kept at that timestep (`keep_bases`).
        guidance: Classifier-free guidance scale; 1: no guidance, as in the inversion.
        negative_prompt: Negative prompt, used with guidance only.
        chunk: Number of frames that go through the UNet at once; None: as in the inversion.
        group: Process group whose ranks share the chunks; all ranks make this call.
        resume: Whether to keep the latents reached so far in the inversion's folder, and to go on
            from those that an earlier call of equal arguments kept there.
        progress: Whether to show progress.
        on_step: Function called after each step that this call computes.

    Returns:
        float32 [N, c, h, w], to be compared with `inversion.x0()`.

    Raises:
        ValueError: a setting is out of range.
        InversionError: the inversion is incomplete, was made with another model, or has no bases
            where `bases` is "cached".
    """
    settings, ranks = inversion.settings, Ranks(group)
    ranks.from_main(lambda: check_reconstructible(inversion, bases))
    check_same_pipeline(pipeline, inversion)
    cached = bases == "cached"
    check_chunk(chunk)
    config = inversion_attention(inversion, chunk)
    size = settings["video"]
    conditioning = encode_prompt(pipeline, settings["prompt"], size["height"], size["width"])
    negative = None
    if guidance != 1.0:
        negative = encode_prompt(pipeline, negative_prompt, size["height"], size["width"])
    controls = ranks.from_main(inversion.control)
    if controls:
        shown = Shown(controls, inversion.timesteps)
        conditioning = conditioning.showing(shown)
        negative = None if negative is None else negative.showing(shown)
    device = execution_device(pipeline)
    environment = numeric_environment(pipeline)
    environment["chunk"] = str(config.chunk or size["num_frames"])
    shaped_by = [bases, guidance, negative_prompt if guidance != 1.0 else "", config.chunk]

    def begun() -> tuple[str, int, torch.Tensor]:
        run = run_name(inversion, "reconstruction-", shaped_by)
        found = earlier_run(inversion, run, "reconstruction", environment) if resume else None
        if found is None:
            return run, 0, inversion.latents(-1)
        return run, found.steps_done, found.latents

    run, done, latents = ranks.from_main(begun)
    total = settings["num_steps"]
    if done < total:
        logger.info(
            "%s: reconstructing %d frames in %d steps", settings["method"], latents.shape[0], total
        )

    def keep(step: int, latents: torch.Tensor) -> None:
        if resume and ranks.main:
            conditions = running_conditions(pipeline, environment, size["num_frames"])
            inversion.save_progress(run, Progress(step + 1, latents, conditions))
        if on_step is not None:
            on_step()

    return sample(
        pipeline,
        latents.to(device),
        guided(pipeline, conditioning, negative=negative, guidance=guidance),
        total,
        config,
        steps=range(done, total),
        bases_at=(lambda step: ranks.from_main(lambda: inversion.bases(step))) if cached else None,
        after_step=keep,
        group=group,
        name=f"reconstruct {settings['method']}",
        progress=progress and ranks.main,
    )


def check_reconstructible(inversion: InversionFolder, bases: str) -> None:
    """Raise where `reconstruct_latents` could not begin, as far as that needs no pipeline.

    Args:
        inversion: Inversion to start from.
        bases: Source of the bases, as for `reconstruct_latents`.

    Raises:
        ValueError: `bases` is none of BASES.
        InversionError: incomplete, damaged where it begins, or without the bases asked for.
    """
    if bases not in BASES:
        raise ValueError(f"bases is {bases!r}; it must be one of {', '.join(BASES)}")
    check_startable(inversion)
    if bases == "cached" and not inversion.settings["keep_bases"]:
        raise InversionError(
            f"{inversion.path} has no cached bases", "invert with keep_bases (--keep-bases)"
        )


def sample(
    pipeline: Any,
    latents: torch.Tensor,
    prediction: Predictor,
    num_steps: int,
    config: AttentionConfig | None,
    *,
    steps: range | None = None,
    bases_at: Callable[[int], dict[int, LayerBases]] | None = None,
    after_step: Callable[[int, torch.Tensor], torch.Tensor | None] | None = None,
    group: dist.ProcessGroup | None = None,
    name: str = "reconstruct",
    progress: bool = False,
) -> torch.Tensor:
    """DDIM sampling under an attention; see `denoise`, which does it.

    Args:
        pipeline: Pipeline whose UNet gets the attention.
        latents: Latents [N, c, h, w] before the first of `steps`, float32, on its device.
        prediction: Prediction at one step.
        num_steps: Number of steps of the whole sampling.
        config: Configuration of the attention; None: the UNet's own.
        steps: Steps to do; None: all.
        bases_at: Function that gives the bases of a step of the inversion, which the layers take
            in place of EM; with a StemConfig only.
        after_step: Function called after each step, see `denoise`.
        group: Process group whose ranks share the chunks, or None.
        name: Name of the run.
        progress: Whether to show progress.
    """
    if bases_at is not None and not isinstance(config, StemConfig):
        raise ValueError(f"only a StemConfig has bases to take; config is {config!r}")
    replayed = Replay({})
    with attention_on(pipeline, config, group) as handle:
        if bases_at is not None and handle is not None:
            handle.hooks.add("replayed", replayed)

        def replay(step: int) -> None:
            if bases_at is not None:
                replayed.found = bases_at(num_steps - 1 - step)

        return denoise(
            latents,
            sampling_scheduler(pipeline, num_steps),
            prediction,
            steps=steps,
            before_step=replay,
            after_step=after_step,
            name=name,
            progress=progress,
        )


def reconstruct(pipeline: Any, inversion: InversionFolder, **settings: Any) -> torch.Tensor:
    """Reconstruct a video from its inversion: `reconstruct_latents`, then the decoder.

    Args:
        pipeline: Pipeline that the inversion was made with.
        inversion: Inversion to start from, complete.
        settings: Keyword arguments of `reconstruct_latents`.

    Returns:
        uint8 [N, H, W, 3] on the CPU.

    Raises:
        ValueError, InversionError: as `reconstruct_latents`.
    """
    return decode_latents(pipeline, reconstruct_latents(pipeline, inversion, **settings))
