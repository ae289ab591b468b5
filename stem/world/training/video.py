"""Train the embedded video transformer: `python -m stem.world.training.video --out FOLDER`.

It takes the latents of the embedded model's autoencoder and the text of its text encoder, which
stay as they are. Run the same command again after an interruption and it goes on from its
checkpoints.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch.nn.functional import mse_loss

from ...models import EMBEDDED_FOLDER, load_pipeline
from ..render import render
from ..sampling import sample_scene
from .card import LATENTS
from .fitting import History, Schedule, fit
from .networks import LATENT_CHANNELS, RESOLUTION, TEXT_WIDTH
from .train import CAPTION_DROPOUT, encoded, plot_losses, write_record

FRAMES = 16
SHIFT = 3.0
# Of the noise levels' logits: most of a sampler's steps are at high noise, and little of a video is
# to be learned at low.
LEVEL_MEAN, LEVEL_STD = 0.6, 1.3

Form = tuple[int, int, int]
"""Frames, places to a side, and videos of a step."""

STAGES: dict[str, tuple[Form, ...]] = {
    "frames": ((1, 16, 8),),
    "windows": ((16, 6, 4), (8, 8, 4), (4, 12, 4), (2, 16, 4)),
    "videos": ((8, 16, 1), (8, 16, 1), (8, 16, 1), (16, 12, 1), (16, 16, 1)),
    "refinement": ((8, 16, 1), (8, 16, 1), (8, 16, 1), (16, 12, 1), (16, 16, 1)),
}
"""What the steps of a stage are drawn from: attention's cost grows with the square of the tokens,
and what a few of them can teach comes first."""


@dataclass(frozen=True)
class Recipe:
    """How the video transformer is trained.

    Args:
        clips: Number of world videos of FRAMES frames, of seeds 0 ... clips - 1.
        frames_steps, windows_steps, videos_steps, refinement_steps: Numbers of the stages' steps.
        rates_over: Steps over which the rate of each stage falls to 0, at least as many as its own.
        layers: Number of blocks of the transformer.
        learning_rate: Highest rate, of Muon and of AdamW.
        seed: Seed of the first weights and of every step.
    """

    clips: int = 2_000
    frames_steps: int = 1_000
    windows_steps: int = 800
    videos_steps: int = 800
    refinement_steps: int = 2_200
    rates_over: tuple[int, int, int, int] = (1_000, 2_000, 1_000, 2_200)
    layers: int = 4
    learning_rate: float = 2e-3
    seed: int = 0


def make_transformer(layers: int) -> WanTransformer3DModel:
    """A transformer of the Wan class in miniature, one token for each latent."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=512,
        num_layers=layers,
        rope_max_seq_len=64,
    )


def make_optimizers(model: WanTransformer3DModel, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else, at the same rate."""
    matrices = [values for values in model.blocks.parameters() if values.ndim == 2]
    of_muon = set(map(id, matrices))
    others = [values for values in model.parameters() if id(values) not in of_muon]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@torch.no_grad()
def make_clips(pipeline: Any, count: int, *, first_seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of world videos and the text of their captions.

    Args:
        pipeline: Pipeline of the world, whose autoencoder and text encoder are used.
        count: Number of videos, of the seeds `first_seed`, `first_seed` + 1, ...
        first_seed: First seed; training and test take ranges that do not meet.

    Returns:
        float16 [count, channels, FRAMES, h, w], without the scaling factor, and float32
        [1 + count, words, width], that of no caption first.
    """
    latents, captions = [], [""]
    for seed in range(first_seed, first_seed + count):
        clip = render(sample_scene(seed), FRAMES, RESOLUTION)
        latents.append(encoded(pipeline.vae, clip.frames).transpose(0, 1))
        captions.append(clip.caption)
    ids = pipeline.tokenizer(
        captions, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    text = torch.cat([pipeline.text_encoder(part)[0] for part in ids.split(256)])
    return torch.stack(latents), text


def loss_of(
    model: WanTransformer3DModel,
    latents: torch.Tensor,
    text: torch.Tensor,
    form: Form,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of the velocity on random parts of random videos.

    Args:
        model: Transformer to train.
        latents: Whitened latents [n, channels, FRAMES, h, w].
        text: Text [1 + n, words, width], that of no caption first.
        form: Form of the step.
        generator: Generator of the step.
    """

    def drawn(bound: int) -> int:
        return int(torch.randint(bound, (), generator=generator))

    frames, side, batch = form
    stride = 1 + drawn(2) if 2 * frames <= FRAMES else 1
    first = drawn(FRAMES - stride * (frames - 1))
    shown = slice(first, first + stride * (frames - 1) + 1, stride)
    top, left = (drawn(latents.shape[-1] - side + 1) for _ in range(2))
    chosen = torch.randint(len(latents), (batch,), generator=generator)
    clean = latents[chosen, :, shown, top : top + side, left : left + side].float()
    noise = torch.randn(clean.shape, generator=generator)
    logits = LEVEL_MEAN + LEVEL_STD * torch.randn(batch, generator=generator)
    levels = logits.sigmoid()
    told = torch.rand(batch, generator=generator) >= CAPTION_DROPOUT
    noisy = clean.lerp(noise, levels.view(-1, 1, 1, 1, 1))
    velocity = model(noisy, 1000 * levels, text[(chosen + 1) * told], return_dict=False)[0]
    return mse_loss(velocity, noise - clean)


def train(
    recipe: Recipe, out: Path, *, model: str | Path = EMBEDDED_FOLDER, until: int | None = None
) -> WanTransformer3DModel | None:
    """Train the transformer, save it to `out`/video_model, and draw its losses.

    Args:
        recipe: Recipe of the training.
        out: Folder of the latents, the checkpoints, the plot and the model.
        model: Folder of the model whose autoencoder and text encoder are used.
        until: Number of steps of all stages to stop after, with checkpoints alone; None: all.

    Returns:
        The trained transformer, float16 as saved; None where `until` stopped it.
    """
    out.mkdir(parents=True, exist_ok=True)
    kept = out / f"clips-{recipe.clips}.pt"
    if not kept.is_file():
        pipeline: Any = load_pipeline(str(model), device="cpu")
        pipeline.vae.to(memory_format=torch.channels_last)
        partial = kept.with_suffix(".partial")
        torch.save(make_clips(pipeline, recipe.clips, first_seed=0), partial)
        partial.replace(kept)
    latents, text = torch.load(kept, weights_only=True)
    numbers = latents.float()
    mean, std = (of((0, 2, 3, 4), keepdim=True) for of in (numbers.mean, numbers.std))
    white = ((numbers - mean) / std).half()
    del numbers
    torch.manual_seed(recipe.seed)
    net = make_transformer(recipe.layers)
    histories: dict[str, History] = {}
    done = 0
    for (name, forms), rate_over in zip(STAGES.items(), recipe.rates_over, strict=True):
        steps = getattr(recipe, f"{name}_steps")

        def loss(
            step: int, generator: torch.Generator, forms: tuple[Form, ...] = forms
        ) -> torch.Tensor:
            form = forms[int(torch.randint(len(forms), (), generator=generator))]
            return loss_of(net, white, text, form, generator)

        histories[name] = fit(
            name,
            net,
            loss,
            Schedule(rate_over, recipe.learning_rate, checkpoint_every=100),
            out,
            seed=recipe.seed,
            until=steps if until is None else min(steps, until - done),
            optimizers=make_optimizers(net, recipe.learning_rate),
        )
        done += steps
        if len(histories[name].losses) < steps or (until is not None and until <= done):
            return None
    plot_losses(histories, out / "losses.png")
    folder = out / "video_model"
    net.half().save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(folder / "scheduler")
    numbers = {"mean": mean.flatten().tolist(), "std": std.flatten().tolist()}
    (folder / LATENTS).write_text(json.dumps(numbers, indent=2) + "\n")
    write_record(folder, recipe, "cpu", histories)
    return net


def main(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoints and the model.")],
    model: Annotated[Path, typer.Option(help="Folder of the trained model.")] = EMBEDDED_FOLDER,
    clips: int = Recipe.clips,
    frames_steps: int = Recipe.frames_steps,
    windows_steps: int = Recipe.windows_steps,
    videos_steps: int = Recipe.videos_steps,
    refinement_steps: int = Recipe.refinement_steps,
    rates_over: tuple[int, int, int, int] = Recipe.rates_over,
    layers: int = Recipe.layers,
    learning_rate: float = Recipe.learning_rate,
    seed: int = Recipe.seed,
    until: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
) -> None:
    """Train the video transformer beside a trained model of the world."""
    recipe = Recipe(
        clips,
        frames_steps,
        windows_steps,
        videos_steps,
        refinement_steps,
        rates_over,
        layers,
        learning_rate,
        seed,
    )
    train(recipe, out, model=model, until=until)


if __name__ == "__main__":
    typer.run(main)
