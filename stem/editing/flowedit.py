"""FlowEdit: from a video's latents to the edit's along a difference of velocities."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..diffusion.environment import numeric_environment
from ..diffusion.loop import check_finite, with_guidance
from ..flow.solvers import Velocity, noise_levels
from ..inversion import InversionFolder
from ..inversion.flow_inverting import flow_attention_on
from ..inversion.folder import Progress
from ..inversion.runs import check_same_weights, check_startable, earlier_run, run_name
from ..names import FLOW_EDIT_METHODS, FLOW_METHODS, FLOW_SOURCE
from ..progress import steps as counted
from .checks import check_numbers, check_texts, edit_settings, options_of
from .job import Edit, Options, check_count, generator_of

if TYPE_CHECKING:
    from ..flow import VelocityModel

logger = logging.getLogger("stem")

(METHOD,) = FLOW_EDIT_METHODS
_OFFSET = "offset"


@dataclass(frozen=True)
class FlowEditOptions(Options):
    """Options of `flowedit`; the defaults are its authors' for Stable Diffusion 3.

    Args:
        n_max: Number of the last steps, those of least noise, that are done; with fewer of them the
            edit keeps more of the source. None: 33 of 50, rounded.
        n_avg: Number of noises that the difference is averaged over in each step.
        source_guidance: Classifier-free guidance scale of the source's velocity. The target's is
            the edit's `guidance`.

    Raises:
        ValueError: a value does not fit.

    Source: arXiv 2412.08629 and its authors' code (SD3_exp.yaml).
    """

    default_guidance: ClassVar[float] = 13.5

    n_max: int | None = None
    n_avg: int = 1
    source_guidance: float = 3.5

    def __post_init__(self) -> None:
        if self.n_max is not None:
            check_count("n_max", self.n_max)
        check_count("n_avg", self.n_avg)
        try:
            check_numbers(self.source_guidance, 0)
        except ValueError as error:
            raise ValueError(f"source_{error}") from error

    def steps_done(self, num_steps: int) -> int:
        """The number of the last steps that are done of so many.

        Raises:
            ValueError: `n_max` is more than all.
        """
        found = max(1, round(0.66 * num_steps)) if self.n_max is None else self.n_max
        if found > num_steps:
            raise ValueError(f"n_max is {found}; it must be one of {num_steps} steps at most")
        return found


def flow_edit(
    model: VelocityModel,
    source: InversionFolder,
    prompt: str,
    *,
    negative_prompt: str = "",
    guidance: float | None = None,
    seed: int = 0,
    options: FlowEditOptions | Mapping[str, Any] | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """Edit a video by a prompt, without its inversion: `run_flow_edit`, decoded.

    Args:
        model: Model that the source was encoded with.
        source: What `stem.inversion.keep_source` kept, or an inversion by `invert_video`, whose
            first latents are taken.
        prompt: Prompt that describes the edited video.
        negative_prompt: Negative prompt of both velocities, used with guidance only.
        guidance: Classifier-free guidance scale of the target's velocity; None: 13.5.
        seed: Seed of the noise.
        options: `FlowEditOptions`, or some of its fields by name.
        progress: Whether to show progress.

    Returns:
        uint8 [N, H, W, 3] on the CPU.

    Raises:
        TypeError, ValueError, InversionError, NonFiniteError: as `run_flow_edit`.
    """
    found = run_flow_edit(
        model,
        source,
        prompt,
        negative_prompt=negative_prompt,
        guidance=guidance,
        seed=seed,
        options=options,
        progress=progress,
    )
    return model.decode(found.latents)


def run_flow_edit(
    model: VelocityModel,
    source: InversionFolder,
    prompt: str,
    *,
    negative_prompt: str = "",
    guidance: float | None = None,
    seed: int = 0,
    options: FlowEditOptions | Mapping[str, Any] | None = None,
    resume: bool = True,
    progress: bool = True,
    on_step: Callable[[], None] | None = None,
) -> Edit:
    r"""Edit a video's latents by FlowEdit.

    The edit $z$ starts as the source's latents $x$. At each of the last noise levels t, with a new
    noise $\epsilon$, both are noised alike, and z follows the difference of their velocities,

    $$x_t = (1 - t)\, x + t\, \epsilon, \quad
      \dot z = v(x_t + z - x;\, \text{target}) - v(x_t;\, \text{source}).$$

    With equal prompts and scales the difference is 0, and the edit is the source to the bit. A step
    takes four calls of the transformer with guidance on both sides, for each of `n_avg` noises.

    Args:
        model: Model that the source was encoded with.
        source: What `stem.inversion.keep_source` kept, or an inversion by `invert_video`; the
            edit takes its attention and number of steps, and its prompt as the source's.
        prompt: Prompt that describes the edited video.
        negative_prompt: Negative prompt of both velocities, used with guidance only.
        guidance: Classifier-free guidance scale of the target's velocity; None: 13.5.
        seed: Seed of the noise.
        options: `FlowEditOptions`, or some of its fields by name.
        resume: Whether to keep the latents reached so far in the source's folder, and to go on
            from those that an earlier call of equal arguments kept there.
        progress: Whether to show progress.
        on_step: Function called after each step that this call computes.

    Returns:
        The edit, its latents float32 [1, C, F, h, w].

    Raises:
        TypeError: a prompt is not a text.
        ValueError: a setting does not fit.
        InversionError: the source is incomplete, of a UNet, or of another model.
        NonFiniteError: latents are not finite after a step.

    Source: arXiv 2412.08629, algorithm 1.
    """
    chosen = flow_edit_options(options)
    first = check_flow_edit(source, prompt, negative_prompt, guidance, seed, chosen)
    check_same_weights(model, model.dtype, source)
    settings = edit_settings(
        source,
        prompt,
        method=METHOD,
        negative_prompt=negative_prompt,
        guidance=guidance,
        seed=seed,
        options=chosen,
    )
    environment = numeric_environment(model)
    run = run_name(source, "edit-", settings)
    found = earlier_run(source, run, "edit", environment) if resume else None
    total = source.settings["num_steps"]
    levels = noise_levels(total, source.settings["shift"])[::-1]
    latents = source.x0().to(model.device)
    # The difference, not the edit: while it is 0 both sides are noised to the same bits.
    offset = torch.zeros_like(latents)
    if found is not None:
        first, offset = found.steps_done, found.state[_OFFSET].to(model.device)
    if first < total:
        frames = source.settings["video"]["num_frames"]
        logger.info("%s: editing %d frames in %d steps", METHOD, frames, total - first)
    with (
        flow_attention_on(model, source),
        torch.no_grad(),
        counted(total, initial=first, name=f"edit {METHOD}", show=progress) as shown,
    ):
        of_source = guided_velocity(
            model, source.settings["prompt"], negative_prompt, float(chosen.source_guidance)
        )
        of_target = guided_velocity(model, prompt, negative_prompt, settings["guidance"])
        for step in range(first, total):
            level, following = levels[step], levels[step + 1]
            difference = torch.zeros_like(latents)
            for number in range(chosen.n_avg):
                generator = generator_of(seed, f"noise {step} {number}")
                noise = torch.randn(latents.shape, generator=generator).to(model.device)
                noised = (1 - level) * latents + level * noise
                difference += of_target(noised + offset, level) - of_source(noised, level)
            offset = offset + (following - level) / chosen.n_avg * difference
            where = f"edit {METHOD}, step {step + 1} of {total} (noise level {following:.3f})"
            check_finite(offset[0].transpose(0, 1), where)
            if resume:
                state = {_OFFSET: offset}
                source.save_progress(run, Progress(step + 1, latents + offset, environment, state))
            if on_step is not None:
                on_step()
            shown.update()
    return Edit(latents + offset, None, None, None, settings)


def guided_velocity(
    model: VelocityModel, prompt: str, negative_prompt: str, guidance: float
) -> Velocity:
    """The velocity for a prompt, with classifier-free guidance where `guidance` is not 1.

    Args:
        model: Model.
        prompt: Prompt.
        negative_prompt: Negative prompt.
        guidance: Guidance scale g of u + g (c - u).
    """
    prompted = model.conditions(prompt)
    if guidance == 1.0:
        return lambda latents, level: model.velocity(latents, level, prompted)
    negative = model.conditions(negative_prompt)

    def velocity(latents: torch.Tensor, level: float) -> torch.Tensor:
        without = model.velocity(latents, level, negative)
        return with_guidance(without, model.velocity(latents, level, prompted), guidance)

    return velocity


def flow_edit_options(options: FlowEditOptions | Mapping[str, Any] | None) -> FlowEditOptions:
    """The options, checked.

    Args:
        options: Options, some of their fields by name, or None.

    Raises:
        ValueError, TypeError: as `options_of`.
    """
    return options_of(FlowEditOptions, METHOD, options)


def check_flow_edit(
    source: InversionFolder,
    prompt: str,
    negative_prompt: str,
    guidance: float | None,
    seed: int,
    options: FlowEditOptions,
) -> int:
    """Check, without a model, that `run_flow_edit` can begin.

    Args:
        source: Source of the edit.
        prompt: Prompt that describes the edited video.
        negative_prompt: Negative prompt.
        guidance: Guidance scale of the target, or None.
        seed: Seed of the noise.
        options: Options.

    Returns:
        The number of the first step that is done.

    Raises:
        TypeError, ValueError, InversionError: as `run_flow_edit`.
    """
    check_texts(prompt, negative_prompt)
    check_numbers(guidance, seed)
    check_startable(source, (FLOW_SOURCE, *FLOW_METHODS))
    total: int = source.settings["num_steps"]
    return total - options.steps_done(total)
