"""Train the embedded model from nothing: `python -m stem.toy.train --out FOLDER`.

Run the same command again after an interruption and it goes on from its checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torch import nn
from torch.nn.functional import l1_loss, mse_loss
from transformers import PreTrainedTokenizerFast

from ..compare import contact_sheet
from ..models import sd_scheduler
from .data import natural_frames, to_images, world_frames
from .fitting import Schedule, fit
from .networks import (
    RESOLUTION,
    make_autoencoder,
    make_pipeline,
    make_text_encoder,
    make_tokenizer,
    make_unet,
)

CAPTION_DROPOUT = 0.1
NATURAL_SHARE = 0.3
KL_WEIGHT = 1e-6
GRID_SEED = 10_000_000
GRID_SAMPLES = 12


@dataclass(frozen=True)
class Recipe:
    """How the embedded model is trained.

    Args:
        scenes: world frames drawn once, of seeds 0 ... scenes - 1.
        autoencoder_steps, autoencoder_batch: of the autoencoder.
        diffusion_steps, diffusion_batch: of the UNet and the text encoder, on its latents.
        seed: of the networks' first weights and of every step.
    """

    scenes: int = 30_000
    autoencoder_steps: int = 6_000
    autoencoder_batch: int = 16
    diffusion_steps: int = 20_000
    diffusion_batch: int = 32
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


def train(recipe: Recipe, out: Path, *, until: int | None = None) -> StableDiffusionPipeline | None:
    """Train everything, save the pipeline to `out`/model, and draw losses and samples.

    Args:
        recipe: the recipe.
        out: folder of checkpoints, plots and model.
        until: stop after so many steps, those of the autoencoder counted first; only checkpoints
            are written then.

    Returns:
        The trained pipeline, as saved; None where `until` stopped it.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    frames, captions = world_frames(recipe.scenes, RESOLUTION, first_seed=0)
    vae = make_autoencoder()
    natural = natural_frames(RESOLUTION)

    def autoencoder_loss(step: int, generator: torch.Generator) -> torch.Tensor:
        wild = int(NATURAL_SHARE * recipe.autoencoder_batch)
        images = torch.cat(
            [
                to_images(pool[torch.randint(len(pool), (count,), generator=generator)])
                for pool, count in ((frames, recipe.autoencoder_batch - wild), (natural, wild))
            ]
        )
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0]
        loss = l1_loss(decoded, images) + mse_loss(decoded, images)
        return loss + KL_WEIGHT * posterior.kl().mean()

    losses = {
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
    latents, scaling_factor = _encoded(vae, frames)
    vae.register_to_config(scaling_factor=scaling_factor)
    tokenizer = make_tokenizer()
    ids = tokenizer(
        ["", *captions], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    denoiser = Denoiser(tokenizer)
    scheduler = sd_scheduler()

    def diffusion_loss(step: int, generator: torch.Generator) -> torch.Tensor:
        batch = recipe.diffusion_batch
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        clean = latents[chosen].float() * scaling_factor
        timesteps = torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        told = torch.rand(batch, generator=generator) >= CAPTION_DROPOUT
        noisy = scheduler.add_noise(clean, noise, timesteps)
        predicted = denoiser(noisy, timesteps, ids[(chosen + 1) * told])
        return mse_loss(predicted, noise)

    losses["diffusion"] = fit(
        "diffusion",
        denoiser,
        diffusion_loss,
        Schedule(recipe.diffusion_steps, 5e-4),
        out,
        seed=recipe.seed,
        until=None if until is None else until - recipe.autoencoder_steps,
    )
    if len(losses["diffusion"]) < recipe.diffusion_steps:
        return None
    pipeline = make_pipeline(vae, denoiser.unet, denoiser.text_encoder, tokenizer)
    _plot(losses, out / "losses.png")
    _, wanted = world_frames(GRID_SAMPLES, RESOLUTION, first_seed=GRID_SEED)
    sample_grid(pipeline, wanted).save(out / "samples.png")
    # The text encoder stays in float32: transformers would load float16 as such, diffusers not.
    pipeline.unet.half()
    pipeline.vae.half()
    pipeline.save_pretrained(out / "model")
    return pipeline


@torch.no_grad()
def _encoded(vae: AutoencoderKL, frames: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Posterior means of all frames in float16, and the factor that gives them unit variance."""
    means = [vae.encode(to_images(part)).latent_dist.mean.half() for part in frames.split(64)]
    latents = torch.cat(means)
    return latents, float(1 / latents.float().std())


def sample_grid(
    pipeline: StableDiffusionPipeline, captions: Sequence[str], *, columns: int = 6, seed: int = 0
) -> Image.Image:
    """Pictures sampled from captions, `columns` in a line, the captions above each line."""
    images = pipeline(
        list(captions),
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=25,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    frames = (torch.from_numpy(images) * 255).round().to(torch.uint8)
    lines = {
        " / ".join(captions[start : start + columns]): frames[start : start + columns]
        for start in range(0, len(captions), columns)
    }
    return contact_sheet(lines, columns=columns)


def _plot(losses: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, 2), losses.items(), strict=True):
        axes.plot(torch.tensor(values).unfold(0, min(50, len(values)), 1).mean(-1))
        axes.set(title=f"{name}: mean of 50 steps", xlabel="step", ylabel="loss", yscale="log")
    figure.savefig(path)


def main(
    out: Annotated[Path, typer.Option(help="Folder of checkpoints, plots and the model.")],
    scenes: int = Recipe.scenes,
    autoencoder_steps: int = Recipe.autoencoder_steps,
    diffusion_steps: int = Recipe.diffusion_steps,
    seed: int = Recipe.seed,
    until: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
) -> None:
    """Train the embedded model from nothing."""
    recipe = Recipe(
        scenes=scenes,
        autoencoder_steps=autoencoder_steps,
        diffusion_steps=diffusion_steps,
        seed=seed,
    )
    train(recipe, out, until=until)


if __name__ == "__main__":
    typer.run(main)
