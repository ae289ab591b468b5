"""A training loop: optimiser, average of weights, checkpoints, and a record of the losses."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

WARM_UP = 100
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Args:
        steps: optimiser steps.
        learning_rate: Rate of the optimisers after WARM_UP steps; it falls to 0 along a cosine.
        average_decay: Decay of the exponential moving average of the weights.
        checkpoint_every: steps between checkpoints.
    """

    steps: int
    learning_rate: float
    average_decay: float = 0.999
    checkpoint_every: int = 250


@dataclass
class History:
    """The loss of every step so far, and the seconds that it took."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def fit(
    name: str,
    model: nn.Module,
    loss_at: Callable[[int, torch.Generator], torch.Tensor],
    schedule: Schedule,
    folder: Path,
    *,
    seed: int,
    until: int | None = None,
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
) -> History:
    """Train `model`, or go on from the checkpoint in `folder`; then give it its averaged weights.

    A step's random numbers come from a generator seeded by (seed, step) alone, so a run that was
    killed and resumed sees what an uninterrupted one sees.

    Args:
        name: Name of the checkpoint, `folder`/`name`.pt.
        model: trained in place.
        loss_at: the loss of one step, from the step's number and its generator.
        schedule: Schedule of the whole training.
        folder: Folder of the checkpoint.
        seed: Seed of every step's generator.
        until: stop after so many steps, keeping the checkpoint; None: at the end.
        optimizers: Optimizers of parts of the model, all at the schedule's rate; None: AdamW of
            all of it.

    Returns:
        What all steps so far, those before an interruption included, came to.

    Raises:
        ValueError: the checkpoint is of another schedule or seed.
    """
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(schedule.average_decay))
    if optimizers is None:
        optimizers = [
            torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=0.01)
        ]
    checkpoint = folder / f"{name}.pt"
    settings = {"seed": seed, **vars(schedule)}
    history = History()
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
        if saved["settings"] != settings:
            raise ValueError(
                f"{checkpoint} was trained with {saved['settings']}, not {settings}; take another "
                "folder, or remove it to start afresh"
            )
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        history = History(**saved["history"])
    last = schedule.steps if until is None else min(until, schedule.steps)
    model.train()
    losses = history.losses
    bar = tqdm(range(len(losses), last), initial=len(losses), total=last, desc=name, disable=None)
    for step in bar:
        start = time.perf_counter()
        loss = loss_at(step, torch.Generator().manual_seed(seed * 1_000_003 + step))
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * _rate(step, schedule.steps)
            optimizer.step()
        average.update_parameters(model)
        losses.append(float(loss.detach()))
        history.seconds.append(time.perf_counter() - start)
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}")
        if len(losses) % schedule.checkpoint_every == 0 or len(losses) == last:
            state = {
                "settings": settings,
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "history": vars(history),
            }
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            os.replace(partial, checkpoint)
    model.load_state_dict(average.module.state_dict())
    model.eval()
    return history


def _rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARM_UP)
    return warm * 0.5 * (1 + math.cos(math.pi * step / steps))
