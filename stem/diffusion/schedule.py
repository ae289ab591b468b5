"""DDIM's two directions on a pipeline's noise schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import DDIMInverseScheduler, DDIMScheduler

PREDICTIONS = ("epsilon", "sample", "v_prediction")
SCHEDULE_ATOL = 1e-6
"""Difference of two schedules' `alphas_cumprod`, of 0 ... 1, that rounding explains."""


def inverse_scheduler(pipeline: Any, num_steps: int) -> DDIMInverseScheduler:
    """DDIM inversion on the pipeline's noise schedule, timesteps ascending."""
    from diffusers import DDIMInverseScheduler

    return _prepared(DDIMInverseScheduler, pipeline, num_steps)


def sampling_scheduler(pipeline: Any, num_steps: int) -> DDIMScheduler:
    """DDIM sampling on the pipeline's noise schedule, timesteps descending."""
    from diffusers import DDIMScheduler

    return _prepared(DDIMScheduler, pipeline, num_steps)


def _prepared(scheduler_class: Any, pipeline: Any, num_steps: int) -> Any:
    given = pipeline.scheduler
    scheduler = _of_schedule(scheduler_class, given)
    check_steps(num_steps, scheduler.config.num_train_timesteps, scheduler.config.steps_offset)
    scheduler.set_timesteps(num_steps)
    return scheduler


def _of_schedule(scheduler_class: Any, given: Any) -> Any:
    """A DDIM scheduler on the noise schedule of any scheduler.

    Every value is passed: `from_config` drops those that the given scheduler has by its class's
    default, and takes DDIM's own. Clipping and thresholding of the clean latents are off, because
    an inversion cannot undo them.

    Raises:
        ValueError: the schedule is not the one of the scheduler's betas.
    """
    config = given.config
    scheduler = scheduler_class(
        num_train_timesteps=config.num_train_timesteps,
        trained_betas=given.betas.tolist(),  # rescaled already, where they are
        steps_offset=config.get("steps_offset", 0),
        set_alpha_to_one=config.get(
            "set_alpha_to_one", config.get("final_sigmas_type") != "sigma_min"
        ),
        prediction_type=config.get("prediction_type", "epsilon"),
        clip_sample=False,
        timestep_spacing="leading",
    )
    own, found = given.alphas_cumprod.double().cpu(), scheduler.alphas_cumprod.double()
    # Where the terminal SNR is zero, some schedulers keep the last a little above it.
    if own.shape != found.shape or float((own - found).abs().max()) > SCHEDULE_ATOL:
        raise ValueError(
            f"the alphas_cumprod of its scheduler, a {type(given).__name__}, are not those of its "
            "betas, so DDIM would follow another schedule; give the pipeline a DDIMScheduler with "
            "the values that the model was trained with"
        )
    return scheduler


def check_steps(num_steps: int, train_steps: int, steps_offset: int) -> None:
    """Raise where inversion and sampling in so many steps would not mirror each other.

    Args:
        num_steps: Number of DDIM steps asked for.
        train_steps: Number of training timesteps of the schedule.
        steps_offset: Offset that the schedule adds to every timestep.

    Raises:
        ValueError: with the nearest numbers of steps that can be used.
    """

    def usable(steps: int) -> bool:
        noisiest = (steps - 1) * (train_steps // steps) + steps_offset
        return train_steps % steps == 0 and noisiest < train_steps

    if num_steps >= 1 and usable(num_steps):
        return
    allowed = [steps for steps in range(1, train_steps + 1) if usable(steps)]
    nearest = sorted(sorted(allowed, key=lambda steps: abs(steps - num_steps))[:3])
    if num_steps >= 1 and train_steps % num_steps == 0:
        reason = f"would begin at a timestep past the schedule's last, {train_steps - 1}"
    else:
        reason = (
            f"do not divide the {train_steps} training steps, so the inversion would not mirror "
            "the sampling"
        )
    raise ValueError(f"{num_steps} steps {reason}; take {', '.join(map(str, nearest))}")


def check_schedule(scheduler: Any) -> None:
    """Raise where a scheduler has no noise schedule that DDIM can follow.

    Args:
        scheduler: Scheduler of diffusers.

    Raises:
        ValueError: it is a flow-matching or sigma schedule, its timesteps are no whole numbers, or
            the UNet predicts something else than the noise, the sample or the velocity.
    """
    from diffusers import DDIMScheduler

    config, name = scheduler.config, type(scheduler).__name__
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if flow or "beta_schedule" not in config:
        raise ValueError(
            f"its scheduler is no variance-preserving diffusion schedule (a {name}: no betas, or "
            "flow matching); DDIM inversion needs one, as Stable Diffusion 1.x, 2.x and XL have"
        )
    if config.get("timestep_type") == "continuous":
        raise ValueError(
            f"its scheduler, a {name}, gives the UNet logarithms of sigmas for timesteps "
            "(timestep_type='continuous'); DDIM needs a UNet trained on whole timesteps"
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"its UNet predicts {prediction!r}; DDIM needs one of {', '.join(PREDICTIONS)}"
        )
    _of_schedule(DDIMScheduler, scheduler)


def clean_of(
    scheduler: DDIMScheduler, prediction: torch.Tensor, timestep: torch.Tensor, noisy: torch.Tensor
) -> torch.Tensor:
    """The clean latents that a prediction stands for.

    Args:
        scheduler: Scheduler of the pipeline's noise schedule.
        prediction: Prediction [N, c, h, w] of the schedule's kind.
        timestep: Timestep, an integer tensor of one element.
        noisy: Latents [N, c, h, w] that it was made from.

    Source: DDIM, arXiv 2010.02502, equation 12; v-prediction, arXiv 2202.00512, appendix D.
    """
    signal, noise = _signal_and_noise(scheduler, timestep)
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        return (noisy - noise * prediction) / signal
    return signal * noisy - noise * prediction if kind == "v_prediction" else prediction


def prediction_of(
    scheduler: DDIMScheduler, clean: torch.Tensor, timestep: torch.Tensor, noisy: torch.Tensor
) -> torch.Tensor:
    """The prediction that stands for clean latents; the inverse of `clean_of`."""
    signal, noise = _signal_and_noise(scheduler, timestep)
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        return (noisy - signal * clean) / noise
    return (signal * noisy - clean) / noise if kind == "v_prediction" else clean


def noised(
    scheduler: DDIMScheduler,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    noisier: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Latents of a timestep taken to a noisier one by fresh noise.

    Args:
        scheduler: Scheduler of the pipeline's noise schedule.
        latents: Latents [N, c, h, w] at `timestep`.
        timestep: Timestep, an integer tensor of one element.
        noisier: Timestep to go to, likewise, not before the other.
        noise: Standard normal noise [N, c, h, w].

    Source: arXiv 2006.11239, equation 2, over several steps.
    """
    alphas = scheduler.alphas_cumprod
    kept = float(alphas[int(noisier)]) / float(alphas[int(timestep)])
    return kept**0.5 * latents + (1 - kept) ** 0.5 * noise


def _signal_and_noise(scheduler: DDIMScheduler, timestep: torch.Tensor) -> tuple[float, float]:
    signal = float(scheduler.alphas_cumprod[int(timestep)])
    return signal**0.5, (1 - signal) ** 0.5
