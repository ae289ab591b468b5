"""Measure the ControlNet on edges: `python -m stem.world.training.evaluate_edges --model FOLDER`.

Writes evaluation.json into the folder controlnet of the model's folder, and the model's card.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn.functional import max_pool2d

from stem_kernels.info import provenance

from ...control import canny
from ...diffusion.pipeline import decode_latents, encode_frames
from ...metrics import psnr
from ...models import EMBEDDED_FOLDER, load_pipeline
from ..grammar import caption
from ..sampling import sample_scene
from .evaluate import FIRST_SEED, GUIDANCE, middle_frames, shares, write_figures
from .networks import sample_frames


@dataclass(frozen=True)
class Size:
    """How much to measure on.

    Args:
        frames: unseen captions of one object to sample from, without and with edges.
        steps: Number of steps of the sampling.
    """

    frames: int = 100
    steps: int = 20


def evaluate_edges(model: str | Path, size: Size = Size()) -> dict[str, Any]:
    """All figures of the card's part on the ControlNet, as JSON types.

    Args:
        model: Folder of the model, with the ControlNet in it.
        size: how much to measure on.
    """
    scenes = [sample_scene(FIRST_SEED + index, num_things=1) for index in range(size.frames)]
    frames = middle_frames(scenes)
    edges = canny(frames)
    alone = load_pipeline(str(model))
    both = load_pipeline(str(model), controlnets=[str(Path(model) / "controlnet")])
    found: dict[str, Any] = {"size": asdict(size), "guidance": GUIDANCE}
    for way, pipeline, shown in (("without", alone, None), ("with", both, edges)):
        sampled = sample_frames(
            pipeline,
            [caption(scene) for scene in scenes],
            num_steps=size.steps,
            guidance=GUIDANCE,
            seed=FIRST_SEED,
            edges=shown,
        )
        found[way] = {
            **shares(sampled, scenes),
            "psnr": psnr(sampled, frames),
            "edges": edge_agreement(canny(sampled), edges),
        }
    decoded = decode_latents(alone, encode_frames(alone, frames))
    found["autoencoder_edges"] = edge_agreement(canny(decoded), edges)
    return found


def edge_agreement(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """F-score, 0 ... 1, of edges: a pixel counts where the others have one no farther than a pixel.

    Args:
        found: Edges of pictures, uint8 [N, H, W, 3], white on black.
        wanted: Edges that they should have, of the same shape.
    """
    ours, theirs = (edges[:, None, ..., 0].float() / 255 for edges in (found, wanted))
    near_ours, near_theirs = (max_pool2d(edges, 3, 1, 1) for edges in (ours, theirs))
    precision = float((ours * near_theirs).sum() / ours.sum().clamp(min=1))
    recall = float((theirs * near_ours).sum() / theirs.sum().clamp(min=1))
    return 2 * precision * recall / max(precision + recall, 1e-9)


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = EMBEDDED_FOLDER,
) -> None:
    """Measure a model's ControlNet, and write its figures and the model's card."""
    found = {**evaluate_edges(model), "provenance": provenance("diffusers", "transformers")}
    write_figures(found, model / "controlnet", model)


if __name__ == "__main__":
    typer.run(main)
