"""Measure a trained model of the world: `python -m stem.world.training.evaluate --model FOLDER`.

Writes evaluation.json and the model card, README.md, into the model's folder.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from stem_kernels.info import provenance

from ...diffusion.pipeline import decode_latents, encode_frames
from ...inversion import round_trip
from ...metrics import psnr
from ...models import EMBEDDED_FOLDER, load_pipeline
from ...video import read_video
from ...video.clips import shipped_clip
from ..grammar import Scene, caption
from ..judge import judge
from ..render import render
from ..sampling import sample_scene
from .card import CARD, EVALUATION_RECORD, card_of
from .data import UNSEEN_CLIPS
from .networks import RESOLUTION, sample_frames

FIRST_SEED = 20_000_000  # training takes its scenes from 0 on
SAMPLING_STEPS = 50
GUIDANCE = 5.0


@dataclass(frozen=True)
class Size:
    """How much to measure on.

    Args:
        frames: unseen world frames through the autoencoder, and captions to sample from.
        natural: frames of each unseen natural clip through the autoencoder.
        videos: unseen world videos, of `video_frames` frames, through DDIM inversion and back.
        steps: Number of steps of the inversion, and of the way back.
    """

    frames: int = 200
    natural: int = 32
    videos: int = 20
    video_frames: int = 8
    steps: int = 50


def evaluate(pipeline: Any, size: Size = Size()) -> dict[str, Any]:
    """All figures of the model card, as JSON types.

    Args:
        pipeline: Pipeline of the world, at RESOLUTION.
        size: how much to measure on.
    """
    scenes = [sample_scene(FIRST_SEED + index, num_things=1) for index in range(size.frames)]
    return {
        "size": asdict(size),
        "autoencoder_psnr": _autoencoder(pipeline, size),
        "text": _text(pipeline, scenes),
        "inversion": _inversion(pipeline, size),
    }


def _autoencoder(pipeline: Any, size: Size) -> dict[str, float]:
    """PSNR of the round trip by what went through it."""
    scenes = [sample_scene(FIRST_SEED + index) for index in range(size.frames)]
    sources = {"world": middle_frames(scenes)}
    for name in UNSEEN_CLIPS:
        frames = read_video(shipped_clip(name), size=(RESOLUTION, RESOLUTION)).frames
        sources[name] = frames[:: max(1, len(frames) // size.natural)][: size.natural]
    return {
        name: psnr(decode_latents(pipeline, encode_frames(pipeline, frames)), frames)
        for name, frames in sources.items()
    }


def _text(pipeline: Any, scenes: list[Scene]) -> dict[str, Any]:
    """Share of pictures sampled from captions of one object that show its colour and its shape."""
    captions = [caption(scene) for scene in scenes]
    sampled = sample_frames(
        pipeline, captions, num_steps=SAMPLING_STEPS, guidance=GUIDANCE, seed=FIRST_SEED
    )
    return {
        "steps": SAMPLING_STEPS,
        "guidance": GUIDANCE,
        "samples": shares(sampled, scenes),
        "true_renders": shares(middle_frames(scenes), scenes),
    }


def middle_frames(scenes: list[Scene]) -> torch.Tensor:
    """uint8 [n, H, W, 3]: of each scene the frame in the middle of its motion."""
    return torch.cat([render(scene, 1, RESOLUTION, (0.5, 0.5)).frames for scene in scenes])


def shares(frames: torch.Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Shares of pictures, uint8 [n, H, W, 3], that show their scene's colour and its shape."""
    verdicts = [judge(frame) for frame in frames]
    return {
        kind: sum(
            verdict is not None and getattr(verdict, kind) == getattr(scene.things[0], kind)
            for verdict, scene in zip(verdicts, scenes, strict=True)
        )
        / len(scenes)
        for kind in ("colour", "shape")
    }


def _inversion(pipeline: Any, size: Size) -> dict[str, float]:
    """Mean PSNR of plain DDIM inversion and sampling, and of the autoencoder alone."""
    through, alone = [], []
    for index in range(size.videos):
        clip = render(sample_scene(FIRST_SEED + index), size.video_frames, RESOLUTION)
        latents = encode_frames(pipeline, clip.frames)
        back = round_trip(pipeline, latents, clip.caption, size.steps)
        through.append(psnr(decode_latents(pipeline, back), clip.frames))
        alone.append(psnr(decode_latents(pipeline, latents), clip.frames))
    return {"ddim_psnr": sum(through) / len(through), "vae_psnr": sum(alone) / len(alone)}


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = EMBEDDED_FOLDER,
) -> None:
    """Measure a model, and write its figures and its card into its folder."""
    found = {
        **evaluate(load_pipeline(str(model))),
        "provenance": provenance("diffusers", "transformers"),
    }
    write_figures(found, model, model)


def write_figures(found: dict[str, Any], folder: Path, model: Path) -> None:
    """Write figures into a folder of what they are of, and the card of the model; print them.

    Args:
        found: Figures, as JSON types.
        folder: Folder of the model, or of the ControlNet in it.
        model: Folder of the model.
    """
    text = json.dumps(found, indent=2)
    (folder / EVALUATION_RECORD).write_text(text + "\n")
    (model / CARD).write_text(card_of(model))
    print(re.sub(r'[{}"]', "", text))


if __name__ == "__main__":
    typer.run(main)
