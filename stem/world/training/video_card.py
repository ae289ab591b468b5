"""The model card of the embedded video transformer, written from its records."""

from __future__ import annotations

from typing import Any

from .card import machine_of
from .train import CAPTION_DROPOUT
from .video import LEVEL_MEAN, LEVEL_STD, SHIFT

_TEXT = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---

# A small text-to-video transformer of a procedural world

A `WanTransformer3DModel` in miniature: {layers} blocks, 4 heads of 32 channels, one token for each
of the 16x16 latents of a frame, so 8 frames are 2,048 tokens and 16 are 4,096. It is there for
trying and comparing attention, inversion and edits of video transformers without a model hub.
`python -m stem.world.training.video` trained it; `python -m stem.world.training.evaluate_video`
measured its figures.

| | |
|---|---|
| `transformer/` | float16 on disk, float32 once loaded, with diffusers alone |
| `scheduler/` | `FlowMatchEulerDiscreteScheduler`, its shift is {shift:g} |
| `latents.json` | mean and standard deviation of each channel of the autoencoder's latents |

Autoencoder, tokenizer and text encoder are those of the embedded model beside it
(`stem/world/model`). The autoencoder takes each frame by itself; its latents, without the scaling
factor, minus the mean, over the standard deviation, are what the transformer sees. The text is
the text encoder's last hidden state of the padded caption.

## Data

{clips:,} videos of the world, `stem.world`, of 16 frames of 64x64 pixels: one or two moving objects
on a background, with captions of a grammar of few words. Seeds 0 to {last:,}; all that is measured
has other seeds.

## Recipe

Flow matching: latents x0 and noise e at the level t are (1 - t) x0 + t e, the prediction is
e - x0, the loss its mean squared error; t is the logistic function of a normal variable (mean
{level_mean:g}, standard deviation {level_std:g}). {dropout:.0%} of the captions are dropped, for
guidance. First single frames, then few places or few frames, then whole videos:

| stage | steps | hours | final loss |
|---|---|---|---|
{stages}

Muon for the blocks' matrices and AdamW for the rest, averaged weights (EMA). In each stage the
rate is {rate:g} after a warm-up and falls along a cosine, to 0 after {rates_over}
steps; the stages in the middle ended before. The final loss is the {final_loss}.
Trained on {training_machine}.

## Measured

| | |
|---|---|
{figures}

On unseen videos of {frames} frames. PSNR of denoising is to the video through the autoencoder.
Colour and shape of the middle frame are judged by `stem.world.judge`. Measured on
{evaluation_machine}.

## Limits

It knows the grammar's words and nothing else; its videos are of 64x64 pixels and of this world. It
was trained for {hours:.1f} hours on a shared core: samples mostly have the colours asked for, but
objects lack a clear shape, or there are several: their shapes are right no more often than by
chance. It has no safety checker, and nothing to check.
"""


def video_card(training: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """The Markdown of the card.

    Args:
        training: Record of `stem.world.training.video`.
        evaluation: Figures of `stem.world.training.evaluate_video`.
    """
    recipe, size, text = training["recipe"], evaluation["size"], evaluation["text"]
    inversion = evaluation["inversion"]
    stages = "\n".join(
        f"| {name} | {stage['steps']:,} | {stage['hours']:.2f} | {stage['final_loss']:.3f} |"
        for name, stage in training["stages"].items()
    )
    figures = [
        *(
            (
                f"noise of level {level} taken away in one step, {size['clips']} videos",
                f"{row['psnr']:.1f} dB PSNR, {row['noisy_psnr']:.1f} dB before; "
                f"squared error of the velocity {row['error']:.1%} of its square",
            )
            for level, row in evaluation["denoising"].items()
        ),
        (
            f"inversion and back, midpoint, {size['inversion_steps']} steps, {size['inverted']} "
            "videos, to the videos through the autoencoder",
            f"{inversion['psnr_to_vae']:.1f} dB PSNR",
        ),
        ("the same, to the videos", f"{inversion['psnr']:.1f} dB PSNR"),
        ("the autoencoder alone on those", f"{inversion['vae_psnr']:.1f} dB PSNR"),
        (
            f"{size['samples']} samples of unseen one-object captions, {size['sampling_steps']} "
            f"steps, guidance {text['guidance']:g}: colour as asked",
            f"{text['colour']:.0%}",
        ),
        ("the same: shape as asked", f"{text['shape']:.0%}"),
    ]
    return _TEXT.format(
        layers=recipe["layers"],
        shift=SHIFT,
        clips=recipe["clips"],
        last=recipe["clips"] - 1,
        level_mean=LEVEL_MEAN,
        level_std=LEVEL_STD,
        dropout=CAPTION_DROPOUT,
        hours=sum(stage["hours"] for stage in training["stages"].values()),
        stages=stages,
        rate=recipe["learning_rate"],
        rates_over=", ".join(f"{steps:,}" for steps in recipe["rates_over"]),
        final_loss=training["final_loss"],
        training_machine=machine_of(training["provenance"]),
        figures="\n".join(f"| {name} | {value} |" for name, value in figures),
        frames=size["frames"],
        evaluation_machine=machine_of(evaluation["provenance"]),
    )
