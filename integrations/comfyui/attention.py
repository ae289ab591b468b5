"""STEM attention: the self-attentions of a MODEL's UNet through EM bases of a whole video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention

from stem_kernels import stem_attention

Patch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]
"""ComfyUI's form of an attention: q, k and v [images, tokens, heads * channels], options."""
Block = tuple[str, int]
"""ComfyUI's name of a part of a UNet, such as ("input", 1)."""


class StemAttention:
    """A MODEL whose self-attentions go through EM bases; the one that came in stays as it was."""

    CATEGORY = "model_patches/unet"
    DESCRIPTION = (
        "Replaces the self-attentions of a UNet by attention to a few EM bases of all frames, so "
        "that the images of a batch share what they look like, at a cost that grows with the "
        "number of tokens and not with its square."
    )
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        percent = {"min": 0.0, "max": 1.0, "step": 0.001}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "Model with a UNet: Stable Diffusion 1, 2 or XL."}),
                "num_bases": (
                    "INT",
                    {
                        "default": 256,
                        "min": 1,
                        "max": 16384,
                        "tooltip": "Number of bases. A layer that has no more tokens than this "
                        "attends to all of them exactly.",
                    },
                ),
                "frames": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 16384,
                        "tooltip": "Number of consecutive images of the batch that are one video "
                        "and share bases. 0: all. 1: every image has bases of its own.",
                    },
                ),
                "start_percent": (
                    "FLOAT",
                    {
                        **percent,
                        "default": 0.0,
                        "tooltip": "Part of the sampling, from 0.0 at the most noise to 1.0 at "
                        "none, where the bases begin.",
                    },
                ),
                "end_percent": (
                    "FLOAT",
                    {**percent, "default": 1.0, "tooltip": "Part of the sampling where they end."},
                ),
                "min_tokens": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 1048576,
                        "tooltip": "Smallest number of tokens of one image; layers with fewer "
                        "stay as they are.",
                    },
                ),
                "dense_blocks": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Blocks that stay as they are, such as: input_1, middle_0, "
                        "output_11",
                    },
                ),
                "calibration": (
                    ["none", "moments", "linear", "joint"],
                    {
                        "default": "moments",
                        "tooltip": "Correction that brings the output nearer to exact attention. "
                        "linear and joint are fitted to the exact attention of some tokens.",
                    },
                ),
            }
        }

    def patch(
        self,
        model: Any,
        num_bases: int,
        frames: int,
        start_percent: float,
        end_percent: float,
        min_tokens: int,
        dense_blocks: str,
        calibration: str,
    ) -> tuple[Any]:
        """A clone of the model with its self-attentions replaced.

        Args:
            model: ModelPatcher of ComfyUI.
            num_bases: Number of bases, at least 1.
            frames: Number of consecutive images of a branch that are one video; 0: all.
            start_percent: Part of the sampling, 0.0 to 1.0, where the bases begin.
            end_percent: Part of the sampling, at least `start_percent`, where they end.
            min_tokens: Smallest number of tokens of one image in a layer that is replaced.
            dense_blocks: Names of blocks that stay, such as "input_1", with commas between.
            calibration: Form of the correction, see `stem_kernels.stem_attention`.

        Raises:
            ValueError: the model has no such UNet, or a value does not fit.
        """
        if start_percent > end_percent:
            raise ValueError(
                f"STEM attention: start_percent is {start_percent} and end_percent {end_percent}; "
                "start_percent must not be the larger one"
            )
        blocks = self_attentions(model.get_model_object("diffusion_model"))
        left = set(dense_blocks.replace(",", " ").split())
        if unknown := sorted(left - blocks.keys()):
            raise ValueError(
                f"STEM attention: dense_blocks names {', '.join(unknown)}; this model has "
                f"{', '.join(blocks)}"
            )
        patched = model.clone()
        options = patched.model_options["transformer_options"]
        earlier = options.get("patches_replace", {}).get("attn1", {})
        noise = None
        if start_percent > 0 or end_percent < 1:
            sampling = model.get_model_object("model_sampling")
            least, most = map(sampling.percent_to_sigma, (end_percent, start_percent))
            noise = (least, most)
        for name, block in blocks.items():
            if name in left:
                continue
            replacement = attention_through_bases(
                earlier.get(block, dense),
                noise=noise,
                frames=frames,
                min_tokens=min_tokens,
                num_bases=num_bases,
                calibration=calibration,
            )
            # Without the number of a layer: guidances by perturbed attention, which name a block
            # or one of its layers for calls of their own, then come before this.
            patched.set_model_attn1_replace(replacement, *block)
        return (patched,)


def self_attentions(unet: Any) -> dict[str, Block]:
    """The blocks of a UNet that have self-attentions over space, by name.

    Raises:
        ValueError: the model is no UNet of this kind, or one with layers over time of its own.
    """
    kind = type(unet).__name__
    if not hasattr(unet, "input_blocks"):
        raise ValueError(
            f"STEM attention: the model is a {kind}; it must be a UNet, as those of Stable "
            "Diffusion 1, 2 and XL are"
        )
    middle = [] if unet.middle_block is None else [unet.middle_block]
    found = {}
    for section, blocks in (
        ("input", unet.input_blocks), ("middle", middle), ("output", unet.output_blocks),
    ):  # fmt: skip
        for number, block in enumerate(blocks):
            for part in block:
                if hasattr(part, "time_stack"):
                    raise ValueError(
                        f"STEM attention: the {kind} has layers over time (Stable Video "
                        "Diffusion), which ComfyUI hands to patches under the names of those over "
                        "space; use a model without"
                    )
                layers = getattr(part, "transformer_blocks", ())
                # Some upscalers have attention to the prompt in the place of self-attention.
                if len(layers) and not any(layer.disable_self_attn for layer in layers):
                    found[f"{section}_{number}"] = (section, number)
    if not found:
        raise ValueError(f"STEM attention: the {kind} has no self-attention")
    return found


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """What a layer computes without a patch: every image attends to itself."""
    return optimized_attention(
        q,
        k,
        v,
        options["n_heads"],
        attn_precision=options["attn_precision"],
        transformer_options=options,
    )


def attention_through_bases(
    otherwise: Patch,
    *,
    noise: tuple[float, float] | None,
    frames: int,
    min_tokens: int,
    num_bases: int,
    calibration: str,
) -> Patch:
    """A patch for the self-attentions of one block.

    Args:
        otherwise: Attention where the bases are not asked for.
        noise: Smallest and largest sigma with bases; None: all. A call reads its sigma only where
            they are given, because on a GPU it waits for that.
        frames: Number of consecutive images of a branch that are one video; 0: all.
        min_tokens: Smallest number of tokens of one image.
        num_bases: Number of bases.
        calibration: Form of the correction.
    """

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        images, branches = options["original_shape"][0], len(options["cond_or_uncond"])
        # Tiled attention has more rows than images.
        if q.shape[0] * q.shape[1] < min_tokens * images:
            return otherwise(q, k, v, options)
        if noise is not None and not noise[0] <= float(options["sigmas"][0]) <= noise[1]:
            return otherwise(q, k, v, options)
        of_branch = images // branches
        length = frames or of_branch
        if of_branch % length:
            raise ValueError(
                f"STEM attention: frames is {frames} and the batch has {of_branch} images; it "
                "must divide them, or be 0 for all of them"
            )
        # Rows are in the order of branches, then images, so a video's are beside one another.
        videos, heads = images // length, options["n_heads"]
        query, key, value = (
            part.reshape(videos, -1, heads, part.shape[-1] // heads).transpose(1, 2)
            for part in (q, k, v)
        )
        out = stem_attention(query, key, value, num_bases=num_bases, calibration=calibration)
        return out.transpose(1, 2).reshape(q.shape)

    return attention
