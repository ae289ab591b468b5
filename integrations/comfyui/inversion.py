"""STEM invert: DDIM inversion as a SAMPLER, from the latents of a video to their noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import comfy.model_sampling
import comfy.samplers
import torch


class StemInvert:
    """A SAMPLER that walks the sigmas upwards."""

    CATEGORY = "sampling/custom_sampling/samplers"
    DESCRIPTION = (
        "DDIM inversion: from the latents of a video to the noise that the sampler euler makes it "
        "of again. For SamplerCustom with add_noise off, cfg 1.0 and the scheduler's sigmas as "
        "they are, not flipped."
    )
    FUNCTION = "sampler"
    RETURN_TYPES = ("SAMPLER",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "iterations": (
                    "INT",
                    {
                        "default": 1,
                        "min": 1,
                        "max": 100,
                        "tooltip": "Number of calls of the model at each step. 1: DDIM inversion. "
                        "More: nearer to the noise that euler leads back from.",
                    },
                )
            }
        }

    def sampler(self, iterations: int) -> tuple[Any]:
        """ComfyUI's sampler of `invert`."""
        return (comfy.samplers.KSAMPLER(invert, {"iterations": iterations}),)


@torch.no_grad()
def invert(
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    iterations: int = 1,
) -> torch.Tensor:
    r"""Latents with the noise of the first sigma, out of which Euler's steps make these ones.

    Each step looks for the $x_{t}$ with $x_{t} - x_{t-1} = (\sigma_t - \sigma_{t-1})\,
    \epsilon(x_t, \sigma_t)$. Its first guess is $x_{t-1}$ as the model sees it, which is DDIM
    inversion; further iterations put the result in the guess's place.

    Args:
        model: Model that a sampler of ComfyUI is given: (latents, sigmas [B]) -> clean latents.
        x: Latents [B, c, h, w] at the last of `sigmas`.
        sigmas: Noise levels [steps + 1], falling, as schedulers give them.
        extra_args: Arguments of the model.
        callback: Function called after each step.
        disable: Argument of ComfyUI's; there is no progress bar to leave out here.
        iterations: Number of the model's calls at a step, at least 1.

    Returns:
        Latents [B, c, h, w] at the first of `sigmas`.

    Raises:
        ValueError: noise was added, the latents have a mask, the sigmas rise, or the model is one
            of rectified flow.
    """
    arguments = extra_args or {}
    sampling = model.inner_model.inner_model.model_sampling
    if isinstance(sampling, comfy.model_sampling.CONST):
        raise ValueError(
            "STEM invert: the model is one of rectified flow; it must predict noise or v, as "
            "Stable Diffusion 1, 2 and XL do"
        )
    if model.noise.count_nonzero():
        raise ValueError("STEM invert: noise was added to the latents; turn add_noise off")
    if arguments.get("denoise_mask") is not None:
        raise ValueError("STEM invert: the latents have a noise mask; remove it before")
    if sigmas[0] < sigmas[-1]:
        raise ValueError(
            f"STEM invert: sigmas rise from {float(sigmas[0])} to {float(sigmas[-1])}; pass them "
            "as the scheduler gives them, without FlipSigmas"
        )
    rows = x.new_ones(x.shape[0])
    unit = sampling.sigma_data**2
    rising = sigmas.flip(0)
    for step, (low, high) in enumerate(pairwise(rising)):
        guess = x * ((high**2 + unit) / (low**2 + unit)).sqrt()
        for _ in range(iterations):
            clean = model(guess, high * rows, **arguments)
            guess = x + (high - low) * (guess - clean) / high
        x = guess
        if callback is not None:
            callback({"x": x, "i": step, "sigma": low, "sigma_hat": high, "denoised": clean})
    return x
