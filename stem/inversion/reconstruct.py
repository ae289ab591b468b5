"""Reconstruction: DDIM sampling from an inversion's last latents back to the video."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from stem_kernels.ops.soft_em import SoftEM

from ..config import AttentionConfig, StemConfig
from ..diffusion.environment import numeric_environment, warn_of_differences
from ..diffusion.fingerprint import fingerprint
from ..diffusion.loop import Predictor, denoise, guided
from ..diffusion.pipeline import check_pipeline, decode_latents, encode_prompt, execution_device
from ..diffusion.schedule import sampling_scheduler
from ..distributed import Ranks
from ..storage import check_output, tensor_bytes
from .folder import RUN_PREFIX, InversionError, InversionFolder
from .invert import check_chunk
from .methods import attention_on, inversion_attention

logger = logging.getLogger("stem")

BASES = ("estimate", "cached")


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
    """Sample back from the noisiest latents, with the inversion's prompt and attention.

    Args:
        pipeline: Pipeline that the inversion was made with.
        inversion: Inversion to start from, complete.
        bases: Source of the bases of "stem": "estimate" runs EM again at each step; "cached"
            takes the bases that the inversion kept at that timestep (`keep_bases`).
        guidance: Classifier-free guidance scale; 1 is without, as the inversion was.
        negative_prompt: Negative prompt, used with guidance only.
        chunk: Number of frames that go through the UNet at once; None: as in the inversion.
        group: Process group whose ranks share the chunks; all ranks make this call.
        resume: Whether to keep the latents reached so far in the inversion's folder, and to go on
            from those that an earlier call of equal arguments kept there.
        progress: Whether to show progress.
        on_step: Function called after each step that this call did.

    Returns:
        float32 [N, c, h, w], to be compared with `inversion.x0()`.

    Raises:
        InversionError: incomplete, made with another model, or without the bases asked for.
    """
    settings, ranks = inversion.settings, Ranks(group)
    ranks.from_main(lambda: check_reconstructible(inversion, bases))
    check_pipeline(pipeline)
    dtype = str(pipeline.unet.dtype).removeprefix("torch.")
    if dtype != settings["dtype"]:
        raise InversionError(
            f"{inversion.path} was made in {settings['dtype']}, and this pipeline is in {dtype}",
            f"load it with dtype={settings['dtype']!r} (--dtype)",
        )
    if settings["model"] != {"name": settings["model"]["name"], **fingerprint(pipeline)}:
        raise InversionError(
            f"{inversion.path} was made with the model {settings['model']['name']!r}, whose "
            "configuration or weights (LoRA included) differ from this pipeline's",
            "load that one",
        )
    cached = bases == "cached"
    check_chunk(chunk)
    config = inversion_attention(inversion, chunk)
    size = settings["video"]
    conditioning = encode_prompt(pipeline, settings["prompt"], size["height"], size["width"])
    negative = None
    if guidance != 1.0:
        negative = encode_prompt(pipeline, negative_prompt, size["height"], size["width"])
    device = execution_device(pipeline)
    environment = numeric_environment(device)
    environment["chunk"] = str(config.chunk)
    shaped_by = [bases, guidance, negative_prompt if guidance != 1.0 else "", config.chunk]
    run, done, latents = ranks.from_main(
        lambda: (
            _begin(inversion, shaped_by, environment) if resume else ("", 0, inversion.latents(-1))
        )
    )
    total = settings["num_steps"]
    if done < total:
        logger.info(
            "%s: reconstructing %d frames in %d steps", settings["method"], latents.shape[0], total
        )

    def keep(step: int, latents: torch.Tensor) -> None:
        if resume and ranks.main:
            inversion.save_progress(run, step + 1, latents, environment)
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
    if not inversion.complete:
        raise InversionError(
            f"{inversion.path} has {inversion.steps_done} of {len(inversion.timesteps)} steps",
            "run the inversion again, it goes on where it stopped",
        )
    if bases == "cached" and not inversion.settings["keep_bases"]:
        raise InversionError(
            f"{inversion.path} has no cached bases", "invert with keep_bases (--keep-bases)"
        )
    inversion.latents(-1)


def _begin(
    inversion: InversionFolder, shaped_by: list[Any], environment: dict[str, str]
) -> tuple[str, int, torch.Tensor]:
    """The run's name in the folder, the steps done, and the latents to go on from.

    Args:
        inversion: Inversion to start from.
        shaped_by: Settings of this reconstruction, as JSON types.
        environment: Environment of this process.
    """
    noisiest = inversion.latents(-1)
    digest = hashlib.sha256(json.dumps(shaped_by).encode())
    digest.update(tensor_bytes(noisiest.contiguous()))
    run = f"{RUN_PREFIX}{digest.hexdigest()[:12]}"
    check_output(inversion.path, 8 * noisiest.numel())  # the old file and the new one
    try:
        found = inversion.progress(run)
    except InversionError as error:
        logger.warning("%s; the reconstruction starts afresh", error.problem)
        found = None
    if found is None:
        return run, 0, noisiest
    done, latents, before = found
    if done == len(inversion.timesteps):
        logger.info("%s: this reconstruction is complete; it is reused", inversion.path)
    else:
        logger.info("%s: reconstruction goes on after step %d", inversion.path, done)
        warn_of_differences(inversion.path, before, environment)
    return run, done, latents


def sample(
    pipeline: Any,
    latents: torch.Tensor,
    prediction: Predictor,
    num_steps: int,
    config: AttentionConfig | None,
    *,
    steps: range | None = None,
    bases_at: Callable[[int], dict[int, SoftEM]] | None = None,
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
    with attention_on(pipeline, config, group) as handle:

        def replay(step: int) -> None:
            if bases_at is not None and handle is not None and handle.state is not None:
                handle.state.replayed = bases_at(num_steps - 1 - step)

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
    """`reconstruct_latents` with the same arguments, decoded: uint8 [N, H, W, 3] on the CPU."""
    return decode_latents(pipeline, reconstruct_latents(pipeline, inversion, **settings))
