"""Which steps of an inversion are to do, and what they start from."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator

import torch

from ..diffusion.environment import warn_of_differences
from .folder import InversionFolder, MissingFileError

logger = logging.getLogger("stem")


def undone_steps(folder: InversionFolder, environment: dict[str, str]) -> list[int]:
    """The steps to do, ascending; the log says why where it is not the first run."""
    problems = [folder.step_problems(step) for step in range(len(folder.timesteps))]
    undone = [step for step, wrong in enumerate(problems) if wrong]
    whole = [step for step, wrong in enumerate(problems) if not wrong]
    # Missing files after the last whole step are of a run that was stopped; others were lost.
    last = max(whole, default=-1)
    for step in undone:
        for wrong in problems[step]:
            if step < last or not isinstance(wrong, MissingFileError):
                logger.warning("%s; step %d is computed again", wrong.problem, step + 1)
    name, total = folder.settings["method"], len(folder.timesteps)
    if undone and whole:
        logger.info("%s: %d of %d steps are done, going on", folder.path, len(whole), total)
        warn_of_differences(folder.path, folder.environment(whole[-1]), environment)
    elif undone:
        frames = folder.settings["video"]["num_frames"]
        logger.info("%s: inverting %d frames in %d steps", name, frames, total)
    return undone


def runs_of(steps: list[int]) -> Iterator[range]:
    """Ascending numbers as runs of consecutive ones."""
    for _, run in itertools.groupby(enumerate(steps), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        yield range(numbers[0], numbers[-1] + 1)


def latents_before(folder: InversionFolder, step: int) -> torch.Tensor:
    """The latents that a step starts from."""
    return folder.latents(step - 1) if step else folder.x0()


def mend_x0(
    folder: InversionFolder, environment: dict[str, str], encode: Callable[[], torch.Tensor]
) -> None:
    """Write the video's own latents where they are missing or damaged.

    Args:
        folder: Folder of the inversion.
        environment: Environment of this process.
        encode: Function that gives the latents.
    """
    wrong = folder.x0_problems()
    if not wrong:
        return
    if folder.steps_done or not isinstance(wrong[0], MissingFileError):
        logger.warning("%s; the video is encoded again", wrong[0].problem)
    folder.save_x0(encode(), environment)
