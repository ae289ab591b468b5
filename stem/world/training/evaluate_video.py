"""Measure the video transformer: `python -m stem.world.training.evaluate_video --model FOLDER`.

Writes evaluation.json and the model card, README.md, into the transformer's folder.
"""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from stem_kernels.info import provenance

from ...flow import EmbeddedVideoModel, invert_flow, noise_levels, reconstruct_flow
from ...flow.loading import EMBEDDED_VIDEO_FOLDER
from ...metrics import psnr
from ..grammar import caption
from ..render import render
from ..sampling import sample_scene
from .card import CARD, EVALUATION_RECORD, TRAINING_RECORD
from .evaluate import FIRST_SEED, shares
from .networks import RESOLUTION, VAE_FACTOR
from .video_card import video_card

LEVELS = (0.3, 0.6, 0.9)
GUIDANCE = 4.0


@dataclass(frozen=True)
class Size:
    """How much to measure on.

    Args:
        clips: Number of unseen world videos, of one object or two, that noise is taken from.
        inverted: Number of them that are inverted and reconstructed.
        samples: Number of unseen captions of one object to sample from.
        frames: Number of frames of each video.
        sampling_steps: Number of steps of a sample, by Euler's rule.
        inversion_steps: Number of steps of the inversion, and of the way back, by the midpoint
            rule.
    """

    clips: int = 20
    inverted: int = 4
    samples: int = 20
    frames: int = 8
    sampling_steps: int = 24
    inversion_steps: int = 12


def evaluate_video(parts: EmbeddedVideoModel, size: Size = Size()) -> dict[str, Any]:
    """All figures of the card, as JSON types.

    Args:
        parts: Transformer with its autoencoder and text encoder.
        size: Size of what is measured on.
    """
    return {
        "size": asdict(size),
        "denoising": _denoising(parts, size),
        "inversion": _inversion(parts, size),
        "text": _text(parts, size),
    }


@torch.no_grad()
def _denoising(parts: EmbeddedVideoModel, size: Size) -> dict[str, dict[str, float]]:
    """By noise level: the velocity's squared error over that of predicting 0, and the PSNR of
    videos with that noise, and of those from which it was taken in one step, to the videos through
    the autoencoder."""
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(FIRST_SEED, FIRST_SEED + size.clips):
        clip = render(sample_scene(seed), size.frames, RESOLUTION)
        clean, conditions = parts.encode(clip.frames), parts.conditions(clip.caption)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        alone = parts.decode(clean)
        for level in LEVELS:
            noisy = clean.lerp(noise, level)
            timestep = torch.tensor([1000 * level])
            velocity = parts.transformer(noisy, timestep, return_dict=False, **conditions)[0]
            wanted = noise - clean
            row = found.setdefault(str(level), {"error": [], "noisy_psnr": [], "psnr": []})
            row["error"].append(float((velocity - wanted).square().sum() / wanted.square().sum()))
            row["noisy_psnr"].append(psnr(parts.decode(noisy), alone))
            row["psnr"].append(psnr(parts.decode(noisy - level * velocity), alone))
    return {
        level: {name: statistics.fmean(values) for name, values in row.items()}
        for level, row in found.items()
    }


def _inversion(parts: EmbeddedVideoModel, size: Size) -> dict[str, float]:
    """Mean PSNR, to the videos, of the inversion and back and of the autoencoder alone."""
    through, through_alone, alone = [], [], []
    for seed in range(FIRST_SEED, FIRST_SEED + size.inverted):
        clip = render(sample_scene(seed), size.frames, RESOLUTION)
        latents, conditions = parts.encode(clip.frames), parts.conditions(clip.caption)
        steps = size.inversion_steps
        noise = invert_flow(parts.transformer, latents, conditions, num_steps=steps)
        back = reconstruct_flow(parts.transformer, noise, conditions, num_steps=steps)
        decoded, of_vae = parts.decode(back), parts.decode(latents)
        through.append(psnr(decoded, clip.frames))
        through_alone.append(psnr(decoded, of_vae))
        alone.append(psnr(of_vae, clip.frames))
    return {
        "psnr": statistics.fmean(through),
        "psnr_to_vae": statistics.fmean(through_alone),
        "vae_psnr": statistics.fmean(alone),
    }


def _text(parts: EmbeddedVideoModel, size: Size) -> dict[str, Any]:
    """Shares of samples whose middle frame shows the colour and the shape of the caption."""
    scenes = [sample_scene(FIRST_SEED + index, num_things=1) for index in range(size.samples)]
    videos = [
        sample_video(parts, caption(scene), size.frames, size.sampling_steps, seed=seed)
        for seed, scene in enumerate(scenes, FIRST_SEED)
    ]
    middle = torch.stack([video[size.frames // 2] for video in videos])
    return {"guidance": GUIDANCE, **shares(middle, scenes)}


@torch.no_grad()
def sample_video(
    parts: EmbeddedVideoModel,
    wanted: str,
    frames: int,
    num_steps: int,
    *,
    seed: int,
    guidance: float = GUIDANCE,
) -> torch.Tensor:
    """A video sampled from a caption by Euler's rule.

    Args:
        parts: Transformer with its autoencoder and text encoder.
        wanted: Caption.
        frames: Number of frames.
        num_steps: Number of steps.
        seed: Seed of the first noise.
        guidance: Factor of what the caption changes in the velocity.

    Returns:
        uint8 [frames, RESOLUTION, RESOLUTION, 3].
    """
    text = torch.cat([parts.conditions(words)["encoder_hidden_states"] for words in ("", wanted)])
    side = RESOLUTION // VAE_FACTOR
    shape = (1, parts.transformer.config.in_channels, frames, side, side)
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for level, following in itertools.pairwise(noise_levels(num_steps)[::-1]):
        timesteps = torch.full((2,), 1000 * level)
        both = parts.transformer(sample.expand(2, -1, -1, -1, -1), timesteps, text).sample
        without, with_text = both.split(1)
        velocity = without + guidance * (with_text - without)
        sample = sample + (following - level) * velocity
    return parts.decode(sample)


def main(
    model: Annotated[Path, typer.Option(help="Folder of the transformer.")] = EMBEDDED_VIDEO_FOLDER,
) -> None:
    """Measure the video transformer, and write its figures and its card into its folder."""
    found = {
        **evaluate_video(EmbeddedVideoModel(model)),
        "provenance": provenance("diffusers", "transformers"),
    }
    text = json.dumps(found, indent=2)
    (model / EVALUATION_RECORD).write_text(text + "\n")
    training = json.loads((model / TRAINING_RECORD).read_text())
    (model / CARD).write_text(video_card(training, found))
    print(text)


if __name__ == "__main__":
    typer.run(main)
