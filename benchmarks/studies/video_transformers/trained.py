"""`python -m benchmarks.studies.video_transformers.trained`: attention on trained weights.

The velocity, samples and inversions of the embedded video transformer with each form in the place
of its self-attention. Writes `results/video-transformers-trained.json`, of which `python -m
benchmarks.readme` makes the tables of docs/video-transformers.md.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from stem.attention.video import VIDEO_FAMILIES
from stem.flow import EmbeddedVideoModel, invert_flow, reconstruct_flow
from stem.flow.loading import EMBEDDED_VIDEO_FOLDER
from stem.metrics import psnr, ssim
from stem.world import render, sample_scene
from stem_kernels.info import provenance

from ... import records
from .forms import DEFAULTS, EXACT, FORMS, NARROW, Form, Layer, exact

OUT = records.RESULTS / "video-transformers-trained.json"
FIRST_SEED = 30_000_000  # training takes its scenes from 0 on, the evaluation from 20,000,000
PIXELS = 64
LEVELS = (0.3, 0.6, 0.9)
SAMPLED = (EXACT, DEFAULTS, NARROW, "best clusters, rest by means")
"""Forms that samples are drawn with, the first being what the others are compared with."""
INVERTED = (EXACT, DEFAULTS, NARROW)
"""Forms that clips are inverted and reconstructed with."""
SOLVERS = ("euler", "midpoint")
FAMILY = VIDEO_FAMILIES["WanTransformer3DModel"]


@dataclass(frozen=True)
class Size:
    """How much to measure on.

    Args:
        frames: Numbers of frames that the velocity is measured with.
        clips: Number of unseen clips that it is measured on.
        samples: Number of first noises, and captions, that samples are drawn of; of the first of
            `frames`.
        sampling_steps: Number of steps of a sample, by Euler's rule, without guidance.
        taken_apart: Number of unseen clips that blocks and heads are looked at one by one on, with
            the last of `frames`.
        inverted: Number of unseen clips that are inverted and reconstructed, of the first of
            `frames`.
        inversion_steps: Number of steps of the inversion, and of the way back.
    """

    frames: tuple[int, ...] = (8, 16)
    clips: int = 10
    samples: int = 20
    sampling_steps: int = 24
    taken_apart: int = 2
    inverted: int = 4
    inversion_steps: int = 12


class FormProcessor:
    """Takes the place of a Wan block's self-attention.

    Args:
        form: Form of attention.

    Attributes:
        flops: Of the last call, over those of exact attention.
    """

    def __init__(self, form: Form) -> None:
        self.form = form
        self.grid = (0, 0, 0)
        self.flops = 0.0

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        video, _ = FAMILY.project(attn, hidden_states, None, rotary_emb)
        layer = Layer(video.query, video.key, video.value, self.grid)
        attended = self.form(layer)
        self.flops = layer.flops
        return FAMILY.output(attn, attended.transpose(1, 2).flatten(2), None)


@contextlib.contextmanager
def with_form(transformer: Any, form: Form) -> Iterator[Callable[[], float]]:
    """Put a form into a transformer's self-attentions, for the length of a block.

    Yields:
        Function that returns the FLOPs of the last call's attention over those of exact attention,
        the mean of all blocks.
    """
    attentions = list(FAMILY.attentions(transformer).values())
    before = [attn.processor for attn in attentions]
    placed = [FormProcessor(form) for _ in attentions]

    def note_grid(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        for processor in placed:
            processor.grid = FAMILY.grid(module.config, FAMILY.call(args, kwargs))

    hook = transformer.register_forward_pre_hook(note_grid, with_kwargs=True)
    for attn, processor in zip(attentions, placed, strict=True):
        attn.set_processor(processor)
    try:
        yield lambda: statistics.fmean(processor.flops for processor in placed)
    finally:
        hook.remove()
        for attn, processor in zip(attentions, before, strict=True):
            attn.set_processor(processor)


@torch.no_grad()
def velocities(parts: EmbeddedVideoModel, size: Size, frames: int) -> dict[str, Any]:
    """Of each form the FLOPs and the velocity's relative error at each of LEVELS, clip by clip."""
    errors: dict[str, list[list[float]]] = {name: [] for name in FORMS}
    shares: dict[str, list[float]] = {name: [] for name in FORMS}
    for seed in range(FIRST_SEED, FIRST_SEED + size.clips):
        noisy, conditions = _noisy(parts, seed, frames)
        with with_form(parts.transformer, exact):
            wanted = _of_levels(parts.transformer, noisy, conditions)
        for name, form in FORMS.items():
            with with_form(parts.transformer, form) as flops:
                found = _of_levels(parts.transformer, noisy, conditions)
                shares[name].append(flops())
            errors[name].append([off(*pair) for pair in zip(found, wanted, strict=True)])
    return {
        name: {"flops": statistics.fmean(shares[name]), "errors": errors[name]} for name in FORMS
    }


def _noisy(
    parts: EmbeddedVideoModel, seed: int, frames: int
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Latents of a clip with noise of each of LEVELS, and the conditions."""
    clip = render(sample_scene(seed), frames, PIXELS)
    clean = parts.encode(clip.frames)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return [clean.lerp(noise, level) for level in LEVELS], parts.conditions(clip.caption)


def _of_levels(
    transformer: Any, noisy: list[torch.Tensor], conditions: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    return [
        transformer(latents, torch.tensor([1000.0 * level]), return_dict=False, **conditions)[0]
        for level, latents in zip(LEVELS, noisy, strict=True)
    ]


@torch.no_grad()
def blocks(parts: EmbeddedVideoModel, size: Size) -> list[dict[str, Any]]:
    """Where the defaults' error comes from, block by block, means of clips and of LEVELS.

    Of each block the velocity's error where it alone does not attend exactly ("alone"); of its
    heads the relative error of the output ("heads") and the share of keys that hold nine tenths
    of a query's weight, mean of some queries ("keys").
    """
    attentions = len(FAMILY.attentions(parts.transformer))
    found: list[dict[str, list[Any]]] = [
        {"alone": [], "heads": [], "keys": []} for _ in range(attentions)
    ]
    for seed in range(FIRST_SEED, FIRST_SEED + size.taken_apart):
        noisy, conditions = _noisy(parts, seed, size.frames[-1])
        seen: list[Layer] = []

        def keep(layer: Layer, seen: list[Layer] = seen) -> torch.Tensor:
            seen.append(layer)
            return exact(layer)

        with with_form(parts.transformer, keep):
            wanted = _of_levels(parts.transformer, noisy, conditions)
        for number, layer in enumerate(seen):
            block = found[number % attentions]
            of_heads = zip(FORMS[DEFAULTS](layer)[0], exact(layer)[0], strict=True)
            block["heads"].append([off(*pair) for pair in of_heads])
            block["keys"].append(keys_held(layer))
        for number, block in enumerate(found):
            calls = itertools.count()

            def alone(
                layer: Layer, calls: Iterator[int] = calls, number: int = number
            ) -> torch.Tensor:
                return (FORMS[DEFAULTS] if next(calls) % attentions == number else exact)(layer)

            with with_form(parts.transformer, alone):
                got = _of_levels(parts.transformer, noisy, conditions)
            block["alone"] += [off(*pair) for pair in zip(got, wanted, strict=True)]
    return [
        {
            "alone": statistics.fmean(block["alone"]),
            **{key: torch.tensor(block[key]).mean(0).tolist() for key in ("heads", "keys")},
        }
        for block in found
    ]


def keys_held(layer: Layer, share: float = 0.9, queries: int = 64) -> list[float]:
    """Share of all keys that hold `share` of a query's weight, by head, mean of some queries."""
    some = layer.query[0, :, :: layer.tokens // queries]
    weights = (some @ layer.key[0].mT * some.shape[-1] ** -0.5).softmax(-1)
    held = weights.sort(-1, descending=True).values.cumsum(-1) < share
    return (held.sum(-1) + 1).float().mean(-1).div(layer.tokens).tolist()


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative error ||found - wanted|| / ||wanted||."""
    return float((found - wanted).norm() / wanted.norm())


def samples(parts: EmbeddedVideoModel, size: Size) -> dict[str, list[dict[str, float]]]:
    """Samples of each of SAMPLED against the exact ones of the same noise: dB and SSIM of the
    decoded videos."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SAMPLED[1:]}
    for seed in range(FIRST_SEED, FIRST_SEED + size.samples):
        conditions = parts.conditions(render(sample_scene(seed), 1, PIXELS).caption)
        generator = torch.Generator().manual_seed(seed)
        side = PIXELS // 4
        channels = parts.transformer.config.in_channels
        noise = torch.randn((1, channels, size.frames[0], side, side), generator=generator)
        wanted = None
        for name in SAMPLED:
            with with_form(parts.transformer, FORMS.get(name, exact)):
                latents = reconstruct_flow(
                    parts.transformer,
                    noise,
                    conditions,
                    num_steps=size.sampling_steps,
                    solver="euler",
                )
            frames = parts.decode(latents)
            if wanted is None:
                wanted = frames
            else:
                row = {"psnr": psnr(frames, wanted), "ssim": ssim(frames, wanted)}
                found[name].append(row)
                print(seed, name, row, flush=True)
    return found


def inversions(parts: EmbeddedVideoModel, size: Size) -> dict[str, dict[str, list[float]]]:
    """Inverted and reconstructed clips: dB of the latents and of the decoded videos to the clips'
    own, by form and solver."""
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(FIRST_SEED, FIRST_SEED + size.inverted):
        clip = render(sample_scene(seed), size.frames[0], PIXELS)
        latents, conditions = parts.encode(clip.frames), parts.conditions(clip.caption)
        alone = parts.decode(latents)
        for name in INVERTED:
            for solver in SOLVERS:
                how: dict[str, Any] = {"num_steps": size.inversion_steps, "solver": solver}
                with with_form(parts.transformer, FORMS.get(name, exact)):
                    noise = invert_flow(parts.transformer, latents, conditions, **how)
                    back = reconstruct_flow(parts.transformer, noise, conditions, **how)
                row = found.setdefault(f"{name}, {solver}", {"latents": [], "frames": []})
                spread = latents.max() - latents.min()
                error = (back - latents).square().mean()
                row["latents"].append(float(10 * torch.log10(spread**2 / error)))
                row["frames"].append(psnr(parts.decode(back), alone))
                print(seed, name, solver, row["latents"][-1], row["frames"][-1], flush=True)
    return found


def measure(
    parts: EmbeddedVideoModel,
    size: Size = Size(),
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """All figures, as JSON types.

    Args:
        parts: Embedded video transformer, with its autoencoder and text encoder.
        size: Size of what is measured on.
        keep: Function that is called with the results after each part of them.
    """
    results: dict[str, Any] = {
        "size": asdict(size),
        "levels": LEVELS,
        "provenance": provenance("diffusers"),
    }
    measured: dict[str, Callable[[], Any]] = {
        f"velocity, {frames} frames": partial(velocities, parts, size, frames)
        for frames in reversed(size.frames)
    }
    measured["samples"] = partial(samples, parts, size)
    measured["inversions"] = partial(inversions, parts, size)
    measured["blocks"] = partial(blocks, parts, size)
    for name, run in measured.items():
        start = time.perf_counter()
        results[name] = run()
        keep(results)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return results


def main() -> None:
    """Measure on one thread, and write the results."""
    torch.set_num_threads(1)
    measure(EmbeddedVideoModel(EMBEDDED_VIDEO_FOLDER), keep=partial(records.write, path=OUT))


if __name__ == "__main__":
    main()
