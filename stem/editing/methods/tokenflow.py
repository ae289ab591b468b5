"""TokenFlow: edits a frame of each chunk, and carries its attention to the chunk's other frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from stem_kernels import nearest_token

from ...attention import Hook, Hooks
from ...attention.families import family_of_unet
from ...attention.layers.hooks import Attend, Operands, Site
from ...attention.layers.processor import attend_densely
from ...attention.layers.projections import project_keys_and_values
from ...attention.waiting.parked import current_parking
from ...config import InflatedConfig, StemConfig
from ...diffusion.loop import with_guidance
from ...distributed import Ranks
from ...inversion import InversionFolder
from ...inversion.methods import attention_on, inversion_scenes
from ..job import Job, Options, check_choice, check_count, generator_of
from .pnp import PnP, PnPOptions

BLENDS = ("released", "adjacent")
EXTENDED = ("dense", "stem")


@dataclass(frozen=True)
class PropagationOptions(Options):
    """Options of every method that propagates the attention of its pivots.

    Args:
        chunk: Number of frames of which one is the pivot, at least 1. The last chunk may have
            fewer. With a chunk of 1 every frame is a pivot, and nothing is blended.
        blend: Pivots that a frame is made of. "released": the pivots of its chunk and of the
            previous chunk, weighed by the distance from the middles of these chunks. "adjacent":
            the nearest pivots on both sides of the frame, with weights linear in the distance.
        pivots: Frame numbers [steps, chunks] of the pivots, an int64 tensor or nested lists, such
            as an earlier `Edit.pivots`; they are kept as tuples. None: drawn anew in each step.
        extended: Attention of the pivots to each other. "dense": to all of their tokens. "stem":
            to bases of these tokens, with the inversion's settings if it is an inversion by STEM.
    """

    chunk: int = 8
    blend: str = "released"
    pivots: torch.Tensor | Sequence[Sequence[int]] | None = None
    extended: str = "dense"

    def __post_init__(self) -> None:
        check_count("chunk", self.chunk)
        check_choice("blend", self.blend, BLENDS)
        check_choice("extended", self.extended, EXTENDED)
        if self.pivots is not None:
            object.__setattr__(self, "pivots", _frame_numbers(self.pivots))

    def check(self, inversion: InversionFolder, prompt: str) -> None:
        if self.pivots is None:
            return
        frames = inversion.settings["video"]["num_frames"]
        chunks = chunks_of(inversion_scenes(inversion), self.chunk)
        steps = len(inversion.timesteps)
        lengths = sorted({len(row) for row in self.pivots})
        if len(self.pivots) != steps or lengths != [len(chunks)]:
            raise ValueError(
                f"pivots are {len(self.pivots)} rows of {', '.join(map(str, lengths)) or 'no'} "
                f"frames; {steps} steps of {frames} frames in chunks of {self.chunk} need {steps} "
                f"rows of {len(chunks)}"
            )
        for step, row in enumerate(self.pivots):
            for pivot, chunk in zip(row, chunks, strict=True):
                if pivot not in chunk:
                    raise ValueError(
                        f"pivots[{step}] holds frame {pivot} for the chunk of frames "
                        f"{chunk.start} ... {chunk.stop - 1}; name one of these"
                    )

    def check_pipeline(self, pipeline: Any) -> None:
        family = family_of_unet(pipeline)
        if family.temporal and self.chunk > 1:
            raise ValueError(
                f"chunk is {self.chunk}: the pivot of each chunk would go through the UNet without "
                f"the frames between, and the temporal parts of {family.name} "
                f"({', '.join(family.temporal)}) take the frames of a call for neighbours, so that "
                "the pivots' features would not be those that they have among all frames; take "
                "chunk=1 (--option METHOD.chunk=1), with which every frame is a pivot, or fusion, "
                "fatezero or pnp"
            )


@dataclass(frozen=True)
class TokenFlowOptions(PropagationOptions, PnPOptions):
    """Options of `tokenflow`.

    Args:
        attention_until: Share of the steps in which the source's queries and keys are injected.
        features_until: Share of the steps in which the source's features are injected.
        chunk: Number of frames of which one is the pivot, at least 1. The last chunk may have
            fewer. With a chunk of 1 every frame is a pivot, and nothing is blended.
        blend: Pivots that a frame is made of. "released": the pivots of its chunk and of the
            previous chunk, weighed by the distance from the middles of these chunks. "adjacent":
            the nearest pivots on both sides of the frame, with weights linear in the distance.
        pivots: Frame numbers [steps, chunks] of the pivots, an int64 tensor or nested lists, such
            as an earlier `Edit.pivots`; they are kept as tuples. None: drawn anew in each step.
        extended: Attention of the pivots to each other. "dense": to all of their tokens. "stem":
            to bases of these tokens, with the inversion's settings if it is an inversion by STEM.

    Raises:
        ValueError: a value does not fit; the message names what is allowed.

    Source: arXiv 2307.10373.
    """

    def __post_init__(self) -> None:
        PnPOptions.__post_init__(self)
        PropagationOptions.__post_init__(self)


class TokenFlow(PnP):
    """Two passes of rows [source | unconditional | conditional] a step: pivots, then all frames.

    What the pivots leave for the frames is held for one step, where `parking` says: four tensors
    [pivots, S, C] a self-attention.
    """

    def __init__(self, job: Job, options: TokenFlowOptions) -> None:
        super().__init__(job, options)
        by_scene = [chunks_of([scene], options.chunk) for scene in job.scenes]
        chunks = [chunk for of_scene in by_scene for chunk in of_scene]
        if options.pivots is None:
            self.kept["pivots"] = draw_pivots(chunks, job.num_steps, job.seed)
        else:
            self.kept["pivots"] = torch.tensor(options.pivots)
        chunk = job.attention.chunk
        size = None if chunk is None else min(len(chunks), chunk)
        # Of too few pivots to share every rank runs all.
        shared = job.ranks.size <= -(-len(chunks) // (size or len(chunks)))
        self._pivots_of = job.ranks if shared else Ranks(None)
        self._pass = PivotPass(len(chunks), self._pivots_of)
        self._propagation = Propagation(self._pass)
        self.hooks = Hooks(propagation=self._propagation)
        cuts = tuple(accumulate(map(len, by_scene)))[:-1]
        shape: dict[str, Any] = {"num_frames": len(chunks), "chunk": size, "cuts": cuts}
        self._extended: InflatedConfig | StemConfig = InflatedConfig(**shape)
        if options.extended == "stem":
            bases = StemConfig(calibration="none")
            own = job.attention if isinstance(job.attention, StemConfig) else bases
            self._extended = dataclasses.replace(own, **shape)

    def predict(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        job, options = self.job, self.options
        self.inject(step)
        # Where keys are injected, base k must be the same in all branches; bases of each branch's
        # own are nearer to dense attention (2.5 % off after an edit against 3.8 %).
        self._pass.joint_bases = self.attention.active
        source = job.level(job.num_steps - step)
        pivots = self.kept["pivots"][step].cpu()
        texts = (job.source, job.negative, job.target)
        hooks = Hooks(injection=self.attention, pivots=self._pass)
        group = self._pivots_of.group
        with attention_on(job.pipeline, self._extended, group, hooks=hooks) as handle:
            assert handle is not None
            chosen = latents[pivots.to(latents.device)]
            job.predict(
                [source[pivots.to(source.device)], chosen, chosen],
                timestep,
                *texts,
                frames=pivots.tolist(),
            )
            # Memory may have run out in it: the next step need not find that out again.
            self._extended = dataclasses.replace(self._extended, chunk=handle.chunk)
        self._pass.share()
        self._propagation.plan = pivots_of_scenes(pivots, job.scenes, options.chunk, options.blend)
        _, without, prompted = job.predict([source, latents, latents], timestep, *texts)
        self._pass.clear()
        return with_guidance(without, prompted, job.guidance)


class PivotPass(Hook):
    """Attention of the pivots: the source's each to itself, those of other branches to all.

    Args:
        pivots: Number of pivots.
        ranks: Ranks that share the pivots.

    Attributes:
        kept: By the self-attention's name, the source's normalised inputs [pivots, S, C] and the
            projected outputs of all branches [branches, pivots, S, C].
    """

    def __init__(self, pivots: int, ranks: Ranks) -> None:
        self._pivots = pivots
        self._ranks = ranks
        self._own: set[int] = set()
        self.kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        # Of chunks that wait for each other between `before` and `attend`, by layer and chunk.
        self._tokens: dict[tuple[str, int], torch.Tensor] = {}

    def share(self) -> None:
        """Let every rank hold what all of them found."""
        for inputs, outputs in self.kept.values():
            self._ranks.fill(inputs, self._own)
            self._ranks.fill(outputs.transpose(0, 1), self._own)

    def clear(self) -> None:
        """Hold nothing any more."""
        self.kept.clear()
        self._own.clear()
        self._tokens.clear()

    def before(self, site: Site, tokens: torch.Tensor) -> None:
        self._tokens[site.name, site.frames[0]] = tokens[0]

    def attend(self, site: Site, operands: Operands, attend: Attend) -> torch.Tensor:
        tokens = self._tokens.pop((site.name, site.frames[0]))
        frames, num_tokens, _ = tokens.shape
        key, value = project_keys_and_values(site.attention, tokens, frames)
        query = operands.query[0, 0].unflatten(1, (frames, num_tokens)).transpose(0, 1)
        source = attend_densely(Operands(*(part.unsqueeze(0) for part in (query, key, value))))
        # [1, frames, h, S, d] -> [1, 1, h, frames * S, d]
        joined = source.transpose(1, 2).flatten(2, 3).unsqueeze(1)
        return torch.cat([joined, attend(operands.of(slice(1, None)))])

    def after(self, site: Site, tokens: torch.Tensor, output: torch.Tensor) -> None:
        if site.name not in self.kept:
            parking = current_parking()
            inputs = parking.empty(tokens, (self._pivots, *tokens.shape[2:]))
            outputs = parking.empty(output, (len(output), self._pivots, *output.shape[2:]))
            self.kept[site.name] = inputs, outputs
        inputs, outputs = self.kept[site.name]
        here = list(site.frames)
        inputs[here] = tokens[0].to(inputs.device)
        outputs[:, here] = output.to(outputs.device)
        self._own.update(here)


@dataclass(frozen=True)
class Plan:
    """Which pivots each frame is made of.

    Args:
        first: Numbers of a pivot among the pivots, int64 [N].
        second: Numbers of another one, int64 [N].
        weight: Weights of the first, 0 ... 1, float32 [N]; where it is 1 there is no second.
    """

    first: torch.Tensor
    second: torch.Tensor
    weight: torch.Tensor


class Propagation(Hook):
    """Pivots' outputs in place of every self-attention: each token takes those of the pivot's
    tokens that the source's own is most similar to.

    Args:
        pivots: Pass that left them.

    Attributes:
        plan: Pivots of each frame.

    Source: arXiv 2307.10373, section 4.2.
    """

    def __init__(self, pivots: PivotPass) -> None:
        self.plan: Plan | None = None
        self._pivots = pivots

    def before(self, site: Site, tokens: torch.Tensor) -> torch.Tensor:
        assert self.plan is not None
        frames = list(site.frames)
        output = self._carried(site.name, tokens[0], self.plan.first[frames])
        weight = self.plan.weight[frames]
        mixed = (weight < 1).nonzero().squeeze(1)
        if len(mixed):
            second = self.plan.second[frames][mixed]
            other = self._carried(site.name, tokens[0, mixed], second)
            share = weight[mixed].to(output.device)[:, None, None]
            blended = share * output[:, mixed] + (1 - share) * other
            output[:, mixed] = blended.to(output.dtype)
        return output

    def _carried(self, name: str, tokens: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
        """The outputs [branches, n, S, C] that source tokens [n, S, C] take from pivots [n]."""
        inputs, outputs = self._pivots.kept[name]
        pivots = pivots.to(inputs.device)
        index = nearest_token(tokens, inputs[pivots].to(tokens.device)).long()
        return outputs[:, pivots[:, None], index.to(inputs.device)].to(tokens.device)


def chunks_of(scenes: Sequence[range], chunk: int) -> list[range]:
    """The frames of each chunk; the last of a scene may have fewer."""
    return [
        scene[start : start + chunk] for scene in scenes for start in range(0, len(scene), chunk)
    ]


def draw_pivots(chunks: list[range], num_steps: int, seed: int) -> torch.Tensor:
    """A frame of each chunk for each step, int64 [steps, chunks]."""
    shares = torch.rand(
        num_steps, len(chunks), generator=generator_of(seed, "pivots"), dtype=torch.float64
    )
    starts, lengths = (
        torch.tensor([number(chunk) for chunk in chunks]) for number in (lambda c: c.start, len)
    )
    return starts + (shares * lengths).long()


def pivots_of_scenes(pivots: torch.Tensor, scenes: Sequence[range], chunk: int, blend: str) -> Plan:
    """Which pivots each frame of several scenes is made of, all of them of its own scene.

    Args:
        pivots: Frame numbers of the pivots, one in each chunk, int64 [chunks].
        scenes: Frames of each scene.
        chunk: Number of frames of a chunk.
        blend: Kind of blend, "released" or "adjacent", see `PropagationOptions`.
    """
    first, second, weight = [], [], []
    before = 0
    for scene in scenes:
        count = len(chunks_of([scene], chunk))
        own = pivots[before : before + count] - scene.start
        plan = pivots_of_frames(own, len(scene), chunk, blend)
        first.append(plan.first + before)
        second.append(plan.second + before)
        weight.append(plan.weight)
        before += count
    return Plan(torch.cat(first), torch.cat(second), torch.cat(weight))


def pivots_of_frames(pivots: torch.Tensor, num_frames: int, chunk: int, blend: str) -> Plan:
    """Which pivots each frame is made of.

    Args:
        pivots: Frame numbers of the pivots, one in each chunk, int64 [chunks].
        num_frames: Number N of frames.
        chunk: Number of frames of a chunk.
        blend: Kind of blend, "released" or "adjacent", see `PropagationOptions`.
    """
    frames = torch.arange(num_frames)
    if blend == "released":
        first = frames // chunk
        second = (first - 1).clamp(min=0)
        middle = chunk // 2
        own = (frames - chunk * first - middle).abs()
        previous = (frames - chunk * second - middle).abs()
        weight = torch.sigmoid(previous / (own + previous))
        alone = first == 0
        if chunk == 1:
            alone[:] = True
    else:
        before = torch.searchsorted(pivots, frames, right=True) - 1
        first = before.clamp(min=0)
        second = (before + 1).clamp(max=len(pivots) - 1)
        distance = pivots[second] - pivots[first]
        weight = (pivots[second] - frames) / distance
        alone = (before < 0) | (distance == 0)
    return Plan(first, second, weight.masked_fill(alone, 1.0))


def _frame_numbers(pivots: torch.Tensor | Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    rows = pivots.tolist() if isinstance(pivots, torch.Tensor) else pivots
    nested = isinstance(rows, Sequence) and all(
        isinstance(row, Sequence) and all(type(frame) is int for frame in row) for row in rows
    )
    if not nested:
        raise ValueError(f"pivots are {pivots!r}; they must be whole frame numbers [steps, chunks]")
    return tuple(tuple(row) for row in rows)
