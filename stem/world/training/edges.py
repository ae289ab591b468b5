"""Train the embedded ControlNet on edges: `python -m stem.world.training.edges --out FOLDER`.

It stands beside a trained model of the world, whose weights stay as they are. Run the same command
again after an interruption and it goes on from its checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn
from torch.nn.functional import mse_loss

from ...control import canny
from ...models import EMBEDDED_FOLDER, load_pipeline
from ..grammar import caption
from .data import world_frames
from .fitting import Schedule, fit
from .networks import RESOLUTION
from .train import encoded, layout_draw, layout_weights, of_one_object, plot_losses, write_record

STAGE = "edges"
CAPTION_DROPOUT = 0.5  # as the ControlNets' authors; what the edges say must not need the text
EMBEDDING = (16, 16, 32)  # channels at 64x64, 32x32 and 16x16 pixels, the latents' size


@dataclass(frozen=True)
class Recipe:
    """How the ControlNet on edges is trained.

    Args:
        scenes: world frames drawn once, of seeds 0 ... scenes - 1, and their edges.
        steps, batch: of the training.
        learning_rate: AdamW's highest.
        seed: Seed of the new layers' first weights and of every step.
    """

    scenes: int = 4_000
    steps: int = 1_500
    batch: int = 8
    learning_rate: float = 1e-3
    seed: int = 0


def make_controlnet(unet: UNet2DConditionModel, seed: int) -> ControlNetModel:
    """A ControlNet of a UNet's own down blocks, which adds nothing at first.

    Args:
        unet: trained UNet.
        seed: Seed of the layers that the UNet does not have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=EMBEDDING)
        # With diffusers' first weights, zeros at the end, hundreds of steps pass before any edge is
        # seen. Zeros where the copy's features leave it are enough to add nothing.
        for values in net.controlnet_cond_embedding.parameters():
            if values.ndim == 1:
                nn.init.zeros_(values)
            else:
                # Makes the edges' features as large as those of latents: SiLU halves small numbers.
                nn.init.normal_(values, std=1.75 / math.sqrt(values[0].numel()))
    return net


def train(
    recipe: Recipe, out: Path, *, model: str | Path = EMBEDDED_FOLDER, until: int | None = None
) -> ControlNetModel | None:
    """Train the ControlNet, save it to `out`/controlnet, and draw its losses.

    Args:
        recipe: the recipe.
        out: folder of the checkpoint, the plot and the ControlNet.
        model: Folder of the model that it is to stand beside.
        until: stop after so many steps, with the checkpoint alone; None: at the end.

    Returns:
        The trained ControlNet, as saved; None where `until` stopped it.
    """
    out.mkdir(parents=True, exist_ok=True)
    pipeline: Any = load_pipeline(str(model), device="cpu")
    vae, unet, text_encoder = pipeline.vae, pipeline.unet, pipeline.text_encoder
    net = make_controlnet(unet, recipe.seed)
    for part in (vae, unet, text_encoder):
        part.requires_grad_(False)
    for part in (vae, unet, net):
        part.to(memory_format=torch.channels_last)
    frames, scenes = world_frames(recipe.scenes, RESOLUTION, first_seed=0)
    latents = encoded(vae, frames)
    edges = canny(frames)[..., 0] > 0
    ids = pipeline.tokenizer(
        ["", *map(caption, scenes)], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    alphas = pipeline.scheduler.alphas_cumprod
    weights, single = layout_weights(alphas), of_one_object(scenes)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        chosen, timesteps = layout_draw(len(latents), single, recipe.batch, generator)
        clean = latents[chosen].float() * vae.config.scaling_factor
        noise = torch.randn(clean.shape, generator=generator)
        told = torch.rand(recipe.batch, generator=generator) >= CAPTION_DROPOUT
        noisy = pipeline.scheduler.add_noise(clean, noise, timesteps)
        text = text_encoder(ids[(chosen + 1) * told])[0]
        shown = edges[chosen].float()[:, None].expand(-1, 3, -1, -1)
        down, middle = net(noisy, timesteps, text, shown, return_dict=False)
        predicted = unet(
            noisy,
            timesteps,
            text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        errors = mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))
        return (errors * weights[timesteps]).mean()

    history = fit(
        STAGE,
        net,
        loss,
        Schedule(recipe.steps, recipe.learning_rate, average_decay=0.99, checkpoint_every=100),
        out,
        seed=recipe.seed,
        until=until,
    )
    if len(history.losses) < recipe.steps:
        return None
    histories = {STAGE: history}
    plot_losses(histories, out / "losses.png")
    net.to(memory_format=torch.contiguous_format)  # safetensors takes no other
    net.half().save_pretrained(out / "controlnet")
    write_record(out / "controlnet", recipe, "cpu", histories)
    return net


def main(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint and the ControlNet.")],
    model: Annotated[Path, typer.Option(help="Folder of the trained model.")] = EMBEDDED_FOLDER,
    scenes: int = Recipe.scenes,
    steps: int = Recipe.steps,
    batch: int = Recipe.batch,
    learning_rate: float = Recipe.learning_rate,
    seed: int = Recipe.seed,
    until: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
) -> None:
    """Train a ControlNet on edges beside a trained model of the world."""
    recipe = Recipe(scenes, steps, batch, learning_rate, seed)
    train(recipe, out, model=model, until=until)


if __name__ == "__main__":
    typer.run(main)
