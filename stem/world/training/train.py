"""Train the embedded model from nothing: `python -m stem.world.training.train --out FOLDER`.

Run the same command again after an interruption and it goes on from its checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torch import nn
from torch.nn.functional import l1_loss, mse_loss
from transformers import PreTrainedTokenizerFast

from stem_kernels.info import provenance

from ...models import sd_scheduler
from ...report.pictures import contact_sheet
from ..grammar import Scene, caption
from .card import TRAINING_RECORD
from .data import natural_frames, to_images, world_frames
from .fitting import History, Schedule, fit
from .networks import (
    RESOLUTION,
    make_autoencoder,
    make_pipeline,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    sample_frames,
)

CAPTION_DROPOUT = 0.1
NATURAL_SHARE = 0.4
NATURAL_SEED = 0
LATENT_WEIGHT = 1e-3  # keeps the latents' means near unit size
MAX_SNR = 5.0
LAYOUT_SHARE = 0.7  # of the refinement's timesteps are drawn from LAYOUT_TIMESTEPS
LAYOUT_TIMESTEPS = (400, 950)
SINGLE_SHARE = 0.5  # of the refinement's scenes have one object
GRID_SEED = 10_000_000
GRID_CAPTIONS = 6
FINAL_STEPS = 500


@dataclass(frozen=True)
class Recipe:
    """How the embedded model is trained.

    Args:
        scenes: world frames drawn once, of seeds 0 ... scenes - 1.
        natural: crops of photographs and of a clip, for the autoencoder alone.
        autoencoder_steps, autoencoder_batch: of the autoencoder.
        diffusion_steps, diffusion_batch: of the UNet and the text encoder, on its latents.
        refinement_steps: Number of steps of both once more, where noise leaves the layout and the
            text alone.
        seed: Seed of the networks' first weights and of every step.
    """

    scenes: int = 30_000
    natural: int = 10_000
    autoencoder_steps: int = 14_000
    autoencoder_batch: int = 8
    diffusion_steps: int = 8_000
    diffusion_batch: int = 32
    refinement_steps: int = 12_000
    seed: int = 0


class Denoiser(nn.Module):
    """The UNet and the text encoder, trained together."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.unet = make_unet()
        self.text_encoder = make_text_encoder(tokenizer)

    def forward(
        self, latents: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        text = self.text_encoder(ids)[0]
        return self.unet(latents, timesteps, text, return_dict=False)[0]


def train(
    recipe: Recipe, out: Path, *, device: str = "cpu", until: int | None = None
) -> StableDiffusionPipeline | None:
    """Train everything, save the pipeline to `out`/model, and draw losses and samples.

    Args:
        recipe: the recipe.
        out: folder of checkpoints, plots and model.
        device: to train on, such as "cpu" or "cuda".
        until: stop after so many steps, those of the autoencoder counted first; only checkpoints
            are written then.

    Returns:
        The trained pipeline, as saved; None where `until` stopped it.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    frames, scenes = world_frames(recipe.scenes, RESOLUTION, first_seed=0)
    # Convolutions of few channels are faster so, on a CPU and on a GPU.
    vae = make_autoencoder().to(device=device, memory_format=torch.channels_last)
    natural = natural_frames(recipe.natural, RESOLUTION, seed=NATURAL_SEED)

    def autoencoder_loss(step: int, generator: torch.Generator) -> torch.Tensor:
        wild = int(NATURAL_SHARE * recipe.autoencoder_batch)
        images = torch.cat(
            [
                to_images(pool[torch.randint(len(pool), (count,), generator=generator)])
                for pool, count in ((frames, recipe.autoencoder_batch - wild), (natural, wild))
            ]
        )
        images = images.to(device)
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        latents = posterior.mean + posterior.std.detach() * noise
        decoded = vae.decode(latents, return_dict=False)[0]
        loss = l1_loss(decoded, images) + mse_loss(decoded, images)
        return loss + LATENT_WEIGHT * posterior.mean.square().mean()

    histories = {
        "autoencoder": fit(
            "autoencoder",
            vae,
            autoencoder_loss,
            Schedule(recipe.autoencoder_steps, 1e-3),
            out,
            seed=recipe.seed,
            until=until,
        )
    }
    if until is not None and until <= recipe.autoencoder_steps:
        return None
    latents = encoded(vae, frames)
    scaling_factor = float(1 / latents.float().std())
    vae.register_to_config(scaling_factor=scaling_factor)
    tokenizer = make_tokenizer()
    ids = tokenizer(
        ["", *map(caption, scenes)], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    denoiser = Denoiser(tokenizer).to(device)
    denoiser.unet.to(memory_format=torch.channels_last)
    scheduler = sd_scheduler()
    batch = recipe.diffusion_batch

    def loss_on(
        chosen: torch.Tensor,
        timesteps: torch.Tensor,
        weights: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor:
        clean = latents[chosen].float() * scaling_factor
        noise = torch.randn(clean.shape, generator=generator)
        told = torch.rand(batch, generator=generator) >= CAPTION_DROPOUT
        noisy = scheduler.add_noise(clean, noise, timesteps)
        words = ids[(chosen + 1) * told]
        predicted = denoiser(noisy.to(device), timesteps.to(device), words.to(device))
        errors = mse_loss(predicted, noise.to(device), reduction="none").mean((1, 2, 3))
        return (errors * weights[timesteps].to(device)).mean()

    even = min_snr_weights(scheduler.alphas_cumprod)

    def diffusion_loss(step: int, generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        timesteps = torch.randint(1000, (batch,), generator=generator)
        return loss_on(chosen, timesteps, even, generator)

    layout = layout_weights(scheduler.alphas_cumprod)
    single = of_one_object(scenes)

    def refinement_loss(step: int, generator: torch.Generator) -> torch.Tensor:
        chosen, timesteps = layout_draw(len(latents), single, batch, generator)
        return loss_on(chosen, timesteps, layout, generator)

    done = recipe.autoencoder_steps
    for name, loss, steps in (
        ("diffusion", diffusion_loss, recipe.diffusion_steps),
        ("refinement", refinement_loss, recipe.refinement_steps),
    ):
        histories[name] = fit(
            name,
            denoiser,
            loss,
            Schedule(steps, 5e-4),
            out,
            seed=recipe.seed,
            until=None if until is None else until - done,
        )
        done += steps
        if len(histories[name].losses) < steps or (until is not None and until <= done):
            return None
    pipeline = make_pipeline(vae, denoiser.unet, denoiser.text_encoder, tokenizer).to("cpu")
    plot_losses(histories, out / "losses.png")
    _, wanted = world_frames(GRID_CAPTIONS, RESOLUTION, first_seed=GRID_SEED)
    sample_grid(pipeline, [caption(scene) for scene in wanted]).save(out / "samples.png")
    for part in (pipeline.unet, pipeline.vae):
        part.to(memory_format=torch.contiguous_format)  # safetensors takes no other
    # The text encoder stays in float32: transformers would load float16 as such, diffusers not.
    pipeline.unet.half()
    pipeline.vae.half()
    pipeline.save_pretrained(out / "model")
    write_record(out / "model", recipe, device, histories)
    return pipeline


def write_record(folder: Path, recipe: Any, device: str, histories: dict[str, History]) -> None:
    """Write down in a model's folder how it was trained, for those who find it.

    Args:
        folder: Folder of the model.
        recipe: Recipe, a dataclass.
        device: Device that it was trained on.
        histories: History of each stage by its name.
    """
    record = {
        "recipe": dataclasses.asdict(recipe),
        "device": device,
        "stages": {
            name: {
                "steps": len(history.losses),
                "hours": round(sum(history.seconds) / 3600, 2),
                "final_loss": statistics.fmean(history.losses[-FINAL_STEPS:]),
            }
            for name, history in histories.items()
        },
        "final_loss": f"mean of the last {FINAL_STEPS} steps",
        "provenance": provenance("diffusers", "transformers"),
    }
    (folder / TRAINING_RECORD).write_text(json.dumps(record, indent=2) + "\n")


def min_snr_weights(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Weights min(SNR, 5) / SNR of the squared error of the noise, by timestep.

    Without them most of the gradient comes from the least noisy timesteps, where the noise is hard
    to tell from the latents' own detail and nothing is to be learned of colours and shapes.

    Source: Min-SNR weighting, arXiv 2303.09556.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=MAX_SNR) / snr


def layout_weights(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """`min_snr_weights` over sqrt(SNR) where the SNR is below 1, divided by their mean.

    There a picture's layout and its objects' shapes are decided, by the text alone, and an error
    in them is a small part of the noise.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weights = min_snr_weights(alphas_cumprod) * snr.pow(-0.5).clamp(min=1)
    return weights / weights.mean()


def of_one_object(scenes: Sequence[Scene]) -> torch.Tensor:
    """Numbers of the scenes with one object, int64 [n]."""
    return torch.tensor([index for index, scene in enumerate(scenes) if len(scene.things) == 1])


def layout_draw(
    count: int, single: torch.Tensor, batch: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scenes and timesteps of a step that teaches layout and shapes, int64 [batch] each.

    Args:
        count: Number of scenes to draw from.
        single: Numbers of those with one object, int64 [n].
        batch: how many to draw.
        generator: Generator of the step.
    """
    chosen = torch.randint(count, (batch,), generator=generator)
    ones = int(SINGLE_SHARE * batch)
    chosen[:ones] = single[torch.randint(len(single), (ones,), generator=generator)]
    noisiest = torch.randint(*LAYOUT_TIMESTEPS, (batch,), generator=generator)
    timesteps = torch.randint(1000, (batch,), generator=generator)
    where = torch.rand(batch, generator=generator) < LAYOUT_SHARE
    return chosen, torch.where(where, noisiest, timesteps)


@torch.no_grad()
def encoded(vae: AutoencoderKL, frames: torch.Tensor) -> torch.Tensor:
    """Posterior means of frames, uint8 [n, H, W, 3], in float16, without the scaling factor."""
    means = [
        vae.encode(to_images(part).to(vae.device)).latent_dist.mean.half().cpu()
        for part in frames.split(64)
    ]
    return torch.cat(means)


def sample_grid(
    pipeline: StableDiffusionPipeline, captions: Sequence[str], *, columns: int = 6, seed: int = 0
) -> Image.Image:
    """Pictures sampled from captions, `columns` of each in a line below the caption."""
    frames = sample_frames(
        pipeline, captions, num_steps=25, guidance=4.0, seed=seed, per_caption=columns
    )
    lines = dict(zip(captions, frames.split(columns), strict=True))
    return contact_sheet(lines, columns, numbered=False)


def plot_losses(histories: dict[str, History], path: Path) -> None:
    """Draw the losses of every stage, means of 50 steps, to a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    grid = figure.subplots(1, len(histories), squeeze=False)
    for axes, (name, history) in zip(grid[0], histories.items(), strict=True):
        values = history.losses
        axes.plot(torch.tensor(values).unfold(0, min(50, len(values)), 1).mean(-1))
        axes.set(title=f"{name}: mean of 50 steps", xlabel="step", ylabel="loss", yscale="log")
    figure.savefig(path)


def main(
    out: Annotated[Path, typer.Option(help="Folder of checkpoints, plots and the model.")],
    scenes: int = Recipe.scenes,
    autoencoder_steps: int = Recipe.autoencoder_steps,
    diffusion_steps: int = Recipe.diffusion_steps,
    refinement_steps: int = Recipe.refinement_steps,
    seed: int = Recipe.seed,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
    until: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
) -> None:
    """Train the embedded model from nothing."""
    recipe = Recipe(
        scenes=scenes,
        autoencoder_steps=autoencoder_steps,
        diffusion_steps=diffusion_steps,
        refinement_steps=refinement_steps,
        seed=seed,
    )
    train(recipe, out, device=device, until=until)


if __name__ == "__main__":
    typer.run(main)
