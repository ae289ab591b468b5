"""Files as the field hands them on: whole models in Stable Diffusion's own names, LoRAs, words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pipelines import make_pipeline
from safetensors.torch import save_file

# diffusers' names of a UNet's and a VAE's layers, and Stable Diffusion's own.
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def _unet_name(name: str, layers: int) -> str:
    """A tensor's name in a UNet of so many layers a block, as the authors' code has it."""
    for own, theirs in _UNET.items():
        if name.startswith(f"{own}."):
            return theirs + name.removeprefix(own)
    block, kind, index, rest = re.fullmatch(  # type: ignore[union-attr]
        r"((?:down_blocks|up_blocks)\.\d+|mid_block)\.(\w+)\.(\d+)\.(.*)", name
    ).groups()
    number, layer = int(block.rpartition(".")[2]) if "." in block else 0, int(index)
    if kind == "resnets":
        part, _, end = rest.rpartition(".")
        rest = f"{_RESNET[part]}.{end}"
    if block == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * layer}.{rest}"
    within = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2}[kind]
    if block.startswith("down"):
        place = (layers + 1) * number + (layers if kind == "downsamplers" else layer) + 1
        rest = rest.replace("conv.", "op.") if kind == "downsamplers" else rest
        return f"input_blocks.{place}.{within}.{rest}"
    place = (layers + 1) * number + (layers if kind == "upsamplers" else layer)
    return f"output_blocks.{place}.{within}.{rest}"


def _vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        for own, theirs in _VAE_ATTENTION.items():
            name = name.replace(f".{own}.", f".{theirs}.")
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)

    def up(found: re.Match[str]) -> str:
        return f"up.{levels - 1 - int(found[1])}"

    name = re.sub(r"up_blocks\.(\d+)(?=\.)", up, name)
    return name.replace(".resnets.", ".block.").replace(".upsamplers.0.", ".upsample.")


def vae_tensors(vae: Any) -> dict[str, torch.Tensor]:
    """A VAE's weights under the names of the authors' code."""
    levels = len(vae.config.block_out_channels)
    found = {_vae_name(key, levels): value for key, value in vae.state_dict().items()}
    return {
        key: value[:, :, None, None] if ".attn_1." in key and value.ndim == 2 else value
        for key, value in found.items()
    }


def checkpoint_tensors(pipeline: Any) -> dict[str, torch.Tensor]:
    """A whole Stable Diffusion 1.x or XL model under the names of the authors' code."""
    layers = pipeline.unet.config.layers_per_block
    clip = "cond_stage_model.transformer.text_model"
    found = {
        f"model.diffusion_model.{_unet_name(key, layers)}": value
        for key, value in pipeline.unet.state_dict().items()
    }
    found |= {f"first_stage_model.{key}": v for key, v in vae_tensors(pipeline.vae).items()}
    if hasattr(pipeline, "text_encoder_2"):
        clip = "conditioner.embedders.0.transformer.text_model"
        found |= _open_clip_tensors(pipeline.text_encoder_2)
    for key, value in pipeline.text_encoder.state_dict().items():
        found[f"{clip}.{key.removeprefix('text_model.')}"] = value
    return found


def _open_clip_tensors(encoder: Any) -> dict[str, torch.Tensor]:
    """The second text encoder of Stable Diffusion XL, which comes from open_clip."""
    state = {key.removeprefix("text_model."): v for key, v in encoder.state_dict().items()}
    found = {
        "text_projection": state.pop("text_projection.weight").T,
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
    }
    for end in ("weight", "bias"):
        found[f"ln_final.{end}"] = state.pop(f"final_layer_norm.{end}")
        for layer in range(encoder.config.num_hidden_layers):
            own, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
            parts = [state.pop(f"{own}.self_attn.{each}_proj.{end}") for each in "qkv"]
            found[f"{theirs}.attn.in_proj_{end}"] = torch.cat(parts)
            for part, name in _OPEN_CLIP.items():
                found[f"{theirs}.{name}.{end}"] = state.pop(f"{own}.{part}.{end}")
    assert not state, list(state)
    return {f"conditioner.embedders.1.model.{key}": value for key, value in found.items()}


def write_checkpoint(path: Path, pipeline: Any, **more: torch.Tensor) -> str:
    """Write a whole model in one file."""
    tensors = {key: value.contiguous() for key, value in checkpoint_tensors(pipeline).items()}
    save_file({**tensors, **more}, path)
    return str(path)


def write_lora(
    path: Path, shape: str = "sd1", seed: int = 0, encoder: bool = False, pipeline: Any = None
) -> str:
    """Write a LoRA of random numbers on the attentions of a UNet, and on a text encoder's.

    A pipeline of its own that is given keeps the LoRA; else it is for `make_pipeline(shape)`.
    """
    pipeline = pipeline or make_pipeline.__wrapped__(shape)
    layers = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        targets = {"unet": ["to_q", "to_v"], **({"text_encoder": ["q_proj"]} if encoder else {})}
        for part, modules in targets.items():
            module = getattr(pipeline, part)
            module.add_adapter(
                LoraConfig(r=2, lora_alpha=2, target_modules=modules, init_lora_weights=False)
            )
            layers[f"{part}_lora_layers"] = get_peft_model_state_dict(module)
    type(pipeline).save_lora_weights(path.parent, weight_name=path.name, **layers)
    return str(path)


def write_kohya_lora(path: Path, pipeline: Any, alpha: float) -> str:
    """Write a LoRA of rank 2 on one layer of a UNet, under the names of kohya's scripts."""
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    out, into = pipeline.unet.get_submodule(layer).weight.shape
    generator, name = torch.Generator().manual_seed(0), f"lora_unet_{layer.replace('.', '_')}"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(2, into, generator=generator),
        f"{name}.lora_up.weight": torch.randn(out, 2, generator=generator),
        f"{name}.alpha": torch.tensor(alpha),
    }
    save_file(tensors, path)
    return str(path)


def write_embedding(path: Path, name: str = "<cat>", channels: int = 16, seed: int = 0) -> str:
    """Write a textual inversion of two vectors, as diffusers' training script does."""
    generator = torch.Generator().manual_seed(seed)
    save_file({name: torch.randn(2, channels, generator=generator)}, path)
    return str(path)
