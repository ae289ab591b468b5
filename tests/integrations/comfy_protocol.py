"""What the nodes use of ComfyUI: ComfyUI itself where COMFYUI names its folder, else as recorded.

The recorded part follows ComfyUI 0.3.64, commit a125cd84b054a57729b5eecab930ca9408719832.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

FOLDER = os.environ.get("COMFYUI")
"""ComfyUI's folder, if tests are to run against ComfyUI itself."""
FRAMES, SIZE, STEPS = 2, 32, 2
"""Images of a branch, places a side of their latents, steps."""
SIGMAS = (14.6146, 0.0292)
"""Noise at the two steps, the most and the least that Stable Diffusion has."""
CALLS = [
    (("input", 1), 0, 1024, 32),
    (("middle", 0), 0, 256, 64),
    (("output", 2), 0, 1024, 32),
    (("output", 3), 0, 1024, 32),
]
"""Self-attentions of one call of the UNet: block, layer, tokens of an image, channels."""
HEADS = 8
OPTIONS = {
    "original_shape": [2 * FRAMES, 4, SIZE, SIZE],
    "cond_or_uncond": [1, 0],
    "n_heads": HEADS,
}
"""What patches are told at every call, as far as the nodes read it, with two branches."""


class Itself:
    """ComfyUI, with a small random UNet in the form of Stable Diffusion 1."""

    def model(self, seed: int = 0) -> Any:
        import comfy.model_base
        import comfy.model_patcher
        import comfy.supported_models

        config = comfy.supported_models.SD15(
            {
                "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32,
                "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 0],
                "transformer_depth_output": [1, 1, 0, 0], "transformer_depth_middle": 1,
                "use_spatial_transformer": True, "context_dim": 16, "legacy": False,
                "use_checkpoint": False, "use_linear_in_transformer": False, "dtype": torch.float32,
            }
        )  # fmt: skip
        config.set_inference_dtype(torch.float32, None)
        device = torch.device("cpu")
        model = comfy.model_base.BaseModel(config, device=device).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim == 1:
                    weight.fill_(float(name.endswith("weight")))
                else:
                    drawn = torch.randn(weight.shape, generator=generator)
                    weight.copy_(drawn / weight[0].numel() ** 0.5)
        return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)

    def run(self, model: Any) -> torch.Tensor:
        """Latents of a sampling with guidance."""
        import comfy.sample

        generator = torch.Generator().manual_seed(1)
        prompts = torch.randn(2, 1, 77, 16, generator=generator)
        positive, negative = ([[prompt, {}]] for prompt in prompts)
        noise = torch.randn(FRAMES, 4, SIZE, SIZE, generator=generator)
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, STEPS, 7.5, "euler", "normal", positive, negative,
                torch.zeros_like(noise), seed=1, disable_pbar=True,
            )  # fmt: skip


class Patcher:
    """ModelPatcher as far as the nodes use it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> Patcher:
        other = Patcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        return other

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)

    def set_model_attn1_replace(
        self, patch: Any, name: str, number: int, index: Any = None
    ) -> None:
        options = self.model_options["transformer_options"]
        patches = options.setdefault("patches_replace", {}).setdefault("attn1", {})
        patches[(name, number) if index is None else (name, number, index)] = patch


class Recorded:
    """The recorded calls, each with a query, key and value drawn from the model's seed."""

    def model(self, seed: int = 0) -> Patcher:
        layer = SimpleNamespace(disable_self_attn=False)
        transformer = SimpleNamespace(transformer_blocks=[layer])
        resnet = SimpleNamespace()
        unet = SimpleNamespace(
            input_blocks=[[resnet], [resnet, transformer], [resnet], [resnet]],
            middle_block=[resnet, transformer, resnet],
            output_blocks=[[resnet], [resnet], [resnet, transformer], [resnet, transformer]],
        )
        sampling = SimpleNamespace(percent_to_sigma=percent_to_sigma)
        return Patcher(SimpleNamespace(diffusion_model=unet, model_sampling=sampling, seed=seed))

    def run(self, model: Patcher) -> torch.Tensor:
        """Results of all calls, one after the other."""
        replaced = model.model_options["transformer_options"].get("patches_replace", {})
        patches = replaced.get("attn1", {})
        generator = torch.Generator().manual_seed(model.model.seed)
        found = []
        for sigma in SIGMAS:
            for block, index, tokens, channels in CALLS:
                shape = (3, 2 * FRAMES, tokens, channels)
                q, k, v = torch.randn(shape, generator=generator)
                options = call_options(sigma, channels)
                patch = patches.get((*block, index), patches.get(block))
                out = attention(q, k, v, HEADS) if patch is None else patch(q, k, v, options)
                found.append(out.flatten())
        return torch.cat(found)


def call_options(sigma: float, channels: int) -> dict[str, Any]:
    """What a patch is told at a call."""
    per_head = {"dim_head": channels // HEADS, "attn_precision": None}
    return {**OPTIONS, **per_head, "sigmas": torch.full((FRAMES,), sigma)}


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **_: Any
) -> torch.Tensor:
    """`optimized_attention`: [B, n, h * d] each."""
    parts = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


def percent_to_sigma(percent: float) -> float:
    """Noise at a part of the sampling, with Stable Diffusion's schedule."""
    if percent <= 0 or percent >= 1:
        return 999999999.9 if percent <= 0 else 0.0
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)[round((1 - percent) * 999)]
    return float(((1 - kept) / kept).sqrt().float())  # ComfyUI holds them in float32


class Sampler:
    """`comfy.samplers.KSAMPLER`: what it holds."""

    def __init__(self, sampler_function: Callable[..., Any], extra_options: dict[str, Any]) -> None:
        self.sampler_function, self.extra_options = sampler_function, extra_options


def modules() -> dict[str, ModuleType]:
    """Modules in the places of ComfyUI's, with what the nodes import of them."""
    held: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.samplers": {"KSAMPLER": Sampler},
        "comfy.model_sampling": {"CONST": type("CONST", (), {})},
        "comfy.ldm": {},
        "comfy.ldm.modules": {},
        "comfy.ldm.modules.attention": {"optimized_attention": attention},
    }
    made = {name: ModuleType(name) for name in held}
    for name, names in held.items():
        vars(made[name]).update(names)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(made[parent], last, made[name])
    return made


@contextmanager
def comfyui() -> Iterator[Itself | Recorded]:
    """ComfyUI itself, or the recorded part of it, as long as the context lasts."""
    before = set(sys.modules)
    if FOLDER is None:
        sys.modules.update(modules())
        try:
            yield Recorded()
        finally:
            for name in set(sys.modules) - before:
                if name.partition(".")[0] == "comfy":
                    del sys.modules[name]
        return
    if not (Path(FOLDER) / "comfy").is_dir():
        raise ValueError(f"COMFYUI is {FOLDER}; it must be the folder of ComfyUI's main.py")
    sys.path.insert(0, FOLDER)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = True
    yield Itself()
