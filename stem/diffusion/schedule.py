"""DDIM's two directions on a pipeline's noise schedule."""

from __future__ import annotations

from typing import Any

from diffusers import DDIMInverseScheduler, DDIMScheduler


def inverse_scheduler(pipeline: Any, num_steps: int) -> DDIMInverseScheduler:
    """DDIM inversion on the pipeline's noise schedule, timesteps ascending."""
    return _prepared(DDIMInverseScheduler, pipeline, num_steps)


def sampling_scheduler(pipeline: Any, num_steps: int) -> DDIMScheduler:
    """DDIM sampling on the pipeline's noise schedule, timesteps descending."""
    return _prepared(DDIMScheduler, pipeline, num_steps)


def _prepared(scheduler_class: Any, pipeline: Any, num_steps: int) -> Any:
    train_steps = pipeline.scheduler.config.num_train_timesteps
    if num_steps < 1 or train_steps % num_steps:
        allowed = [n for n in range(1, train_steps + 1) if train_steps % n == 0]
        nearest = sorted(allowed, key=lambda n: abs(n - num_steps))[:3]
        raise ValueError(
            f"{num_steps} steps do not divide the {train_steps} training steps, so the inversion "
            f"would not mirror the sampling; take {', '.join(map(str, sorted(nearest)))}"
        )
    scheduler = scheduler_class.from_config(
        pipeline.scheduler.config, clip_sample=False, timestep_spacing="leading"
    )
    scheduler.set_timesteps(num_steps)
    last = int(scheduler.timesteps.max())
    if last >= train_steps:
        raise ValueError(
            f"with {num_steps} steps the noisiest timestep would be {last}, and the schedule ends "
            f"at {train_steps - 1} (its steps_offset is {scheduler.config.steps_offset}); take "
            f"{train_steps // 2} steps or fewer"
        )
    return scheduler
