"""One edit at work: what every method is given, and what each of them has to say."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch

from ..attention import Hooks
from ..attention.families import family_of_unet
from ..attention.waiting.parked import current_parking
from ..config import AttentionConfig, StemConfig
from ..diffusion.pipeline import Conditioning, predict, vae_factor
from ..distributed import Ranks
from ..inversion import InversionFolder
from ..inversion.methods import attention_on, inversion_attention, inversion_scenes
from .regions.zoom import Zoom


@dataclass
class Job:
    """An inversion and what to make of it.

    Levels number the noise: level 0 is the video's own latents, level T the inversion's noisiest.
    The editing step s goes from level T - s to the one below.

    Args:
        pipeline: Pipeline that the inversion was made with.
        inversion: Inversion, complete.
        prompt: Prompt of the edited video.
        source: Conditioning of the inversion's prompt and control, one branch.
        negative: Conditioning of the negative prompt and the edit's control, one branch.
        target: Conditioning of the prompt and the edit's control, one branch.
        guidance: Guidance scale g of u + g (c - u).
        seed: Seed of whatever the method draws.
        device: Device that the pipeline computes on.
        ranks: Ranks that share the frames; the first one reads the inversion.
    """

    pipeline: Any
    inversion: InversionFolder
    prompt: str
    source: Conditioning
    negative: Conditioning
    target: Conditioning
    guidance: float
    seed: int
    device: torch.device
    ranks: Ranks = field(default_factory=lambda: Ranks(None))
    _last: tuple[int, torch.Tensor] | None = field(default=None, init=False, repr=False)

    @property
    def source_prompt(self) -> str:
        """The prompt of the inversion."""
        prompt: str = self.inversion.settings["prompt"]
        return prompt

    @property
    def num_steps(self) -> int:
        """The number T of steps of the inversion."""
        return len(self.inversion.timesteps)

    @property
    def num_frames(self) -> int:
        """The number N of frames."""
        frames: int = self.inversion.settings["video"]["num_frames"]
        return frames

    @property
    def scenes(self) -> list[range]:
        """The frames of each scene."""
        return inversion_scenes(self.inversion)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        video, factor = self.inversion.settings["video"], vae_factor(self.pipeline)
        return video["height"] // factor, video["width"] // factor

    @property
    def attention(self) -> AttentionConfig:
        """The attention that the inversion was made with, in its chunks.

        All frames at once are one chunk here, so that it can be halved where memory runs out: an
        edit has up to three branches, the inversion had one. Not so where the UNet's temporal parts
        see all frames of a call. Bases have no correction: methods mix the queries, keys and values
        of several branches, and a correction belongs to one.
        """
        found = inversion_attention(self.inversion)
        if isinstance(found, StemConfig):
            found = dataclasses.replace(found, calibration="none")
        if found.chunk or family_of_unet(self.pipeline).outputs is None:
            return found
        return dataclasses.replace(found, chunk=self.num_frames)

    def level(self, level: int) -> torch.Tensor:
        """The source's latents at a level, float32 [N, c, h, w], on the device; not to be changed.

        The level asked for last is held: a step asks for one several times.
        """
        if self._last is None or self._last[0] != level:
            read = partial(self.inversion.latents, level - 1) if level else self.inversion.x0
            found = self.ranks.from_main(read)
            self._last = level, current_parking().put(found.to(self.device))
        return self._last[1]

    def timestep(self, level: int) -> torch.Tensor:
        """The timestep of a level from 1 to T, an integer tensor of one element."""
        return torch.tensor(self.inversion.timesteps[level - 1])

    def predict(
        self,
        rows: list[torch.Tensor],
        timestep: torch.Tensor,
        *conditionings: Conditioning,
        frames: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The UNet's predictions for several branches in one call.

        Args:
            rows: Latents [n, c, h, w] of each branch, of equal shape.
            timestep: Timestep, an integer tensor of one element.
            conditionings: Conditionings, one for each branch.
            frames: Numbers of the n frames; None: all, from 0 on.

        Returns:
            float32 [n, c, h, w] for each branch.
        """
        joined = conditionings[0]
        for other in conditionings[1:]:
            joined = joined.joined(other)
        together = current_parking().joined(rows)
        found = predict(self.pipeline, together, timestep, joined, frames)
        return found.chunk(len(rows))


@dataclass(frozen=True)
class Edit:
    """An edited video, with the masks or pivots that the method used.

    Args:
        latents: Latents [N, c, h, w], or [1, C, F, h, w] through a video transformer, float32.
        masks: Masks of the places that may change, bool [N, h, w] in latent cells; None: all may.
        cores: Masks before they were dilated, bool [N, h, w], where a method has them, or None.
        pivots: Frames that TokenFlow drew, int64 [steps, chunks]; None: another method.
        settings: Settings that shaped the latents, as JSON types.
        pasted: Whether frames of the edit take the source's pixels outside the masks, see
            `stem.editing.pasting`.
        zoom: Windows that the latents show in the place of whole frames, or None.
        zoomed_masks: Masks in the windows' latent cells, bool [N, h, w], with a zoom.
    """

    latents: torch.Tensor
    masks: torch.Tensor | None
    cores: torch.Tensor | None
    pivots: torch.Tensor | None
    settings: dict[str, Any]
    pasted: bool = False
    zoom: Zoom | None = None
    zoomed_masks: torch.Tensor | None = None

    def of_frames(self, numbers: Sequence[int]) -> Edit:
        """The edit of some frames."""
        chosen: dict[str, Any] = {
            name: value[numbers]
            for name in ("latents", "masks", "cores", "zoom", "zoomed_masks")
            if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **chosen)


class Method(ABC):
    """One editing method at work on one job.

    Args:
        job: Job.
        options: Options of the method.

    Attributes:
        config: Configuration of the attention that is on while the method predicts.
        hooks: Hooks that are called in it.
        visits: Numbers of the editing steps, in the order in which they are done; steps come again
            where a method goes back.
        first_step: Place in `visits` of the first step that the method does.
        kept: Tensors that `state` returns.
        pasted: Whether frames of the edit take the source's pixels outside the masks.
    """

    pasted: bool = False

    def __init__(self, job: Job, options: Any) -> None:
        self.job = job
        self.options = options
        self.config: AttentionConfig = job.attention
        self.hooks = Hooks()
        self.visits: Sequence[int] = range(job.num_steps)
        self.first_step = 0
        self.kept: dict[str, torch.Tensor] = {}

    def begin(self) -> torch.Tensor:
        """What has to be found before the first step; returns the latents to start from."""
        return self.job.level(self.job.num_steps - self.first_step)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The attention on, for the length of a `with` block around `begin` and all steps."""
        group = self.job.ranks.group
        with attention_on(self.job.pipeline, self.config, group, hooks=self.hooks):
            yield

    @abstractmethod
    def predict(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The prediction that the step is made with.

        Args:
            step: Number of the editing step, 0 is the noisiest.
            timestep: Timestep, an integer tensor of one element.
            latents: Latents [N, c, h, w], float32.

        Returns:
            float32 [N, c, h, w], in the pipeline's own kind of prediction.
        """

    def after_step(self, place: int, latents: torch.Tensor) -> torch.Tensor | None:
        """Other latents to go on with, or None, after the step at a place in `visits`."""
        return None

    def state(self) -> dict[str, torch.Tensor]:
        """What the method needs beside the latents to go on after a step, and what an `Edit`
        tells: "masks" and "cores" bool [N, h, w], "pivots" int64 [steps, chunks]."""
        return self.kept

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take what `state` returned, in place of `begin`."""
        self.kept = {name: tensor.to(self.job.device) for name, tensor in state.items()}


@dataclass(frozen=True)
class Options:
    """Options of a method; its subclasses are frozen, and checked when made.

    Attributes:
        default_guidance: Guidance scale where none is given.
        presets: Names that the option `preset` takes; none where the method has no such option.
    """

    default_guidance: ClassVar[float] = 7.5
    presets: ClassVar[tuple[str, ...]] = ()

    def fill(self, values: Mapping[str, Any]) -> None:
        """Put values in the place of fields that are None, as a subclass is made."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @property
    def guidance(self) -> float:
        """The guidance scale that goes with these options."""
        return self.default_guidance

    def check(self, inversion: InversionFolder, prompt: str) -> None:
        """Raise ValueError where these options do not fit the inversion and the prompt."""

    def check_pipeline(self, pipeline: Any) -> None:
        """Raise ValueError where these options do not fit the pipeline's UNet."""


def steps_of(share: float, num_steps: int) -> int:
    """The number of steps that a share of them is, rounded down; exact where T * share is whole.

    In float64 0.7 * 10 is 7, but 0.29 * 100 is 28.999...: a millionth of a step is forgiven.
    """
    return int(share * num_steps + 1e-6)


def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU of its own for each seed and name of what is drawn."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def check_share(name: str, value: Any) -> None:
    """Raise ValueError where an option is no share of the steps, 0 ... 1."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value!r}; it must be a share of the steps, 0 ... 1")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError where an option is none of its choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError where an option is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be True or False")


def check_count(name: str, value: Any) -> None:
    """Raise ValueError where an option is no whole number of at least 1."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
