"""Models of each diffusers class that a mechanism goes into, of few random weights; their calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    I2VGenXLUNet,
    SparseControlNetModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from pipelines import make_unet

FRAMES = 3
SIZE = 4
WIDTH = 16
_LEVELS: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1}
_NORMED: dict[str, Any] = {**_LEVELS, "norm_num_groups": 8, "cross_attention_dim": WIDTH}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A family's model and how it is called.

    Args:
        make: Function that makes the model; the random state is set before.
        frame_axis: Dimension of the sample that frames lie along; None: its rows are frames.
        layers: Number of its spatial self-attentions.
        arguments: Function of (videos, frames) that gives what follows sample and timestep.
        timestep: Timestep of the calls.
    """

    make: Callable[[], Any]
    frame_axis: int | None
    layers: int
    arguments: Callable[[int, int], dict[str, Any]]
    timestep: float | int = 501
    channels: int = 4


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _text(rows: int) -> dict[str, Any]:
    return {"encoder_hidden_states": _random(rows, 5, WIDTH)}


def _motion(**changes: Any) -> UNetMotionModel:
    return UNetMotionModel(
        **{
            "down_block_types": ("CrossAttnDownBlockMotion",) * 2,
            "up_block_types": ("CrossAttnUpBlockMotion",) * 2,
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
            **_NORMED,
            **changes,
        }
    )


def _motion_xl() -> UNetMotionModel:
    return _motion(
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"),
        num_attention_heads=(2, 4),
        use_motion_mid_block=False,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )


def _of_xl(videos: int, frames: int) -> dict[str, Any]:
    added = {"text_embeds": _random(videos, 16), "time_ids": torch.full((videos, 6), 64.0)}
    return {**_text(videos * frames), "added_cond_kwargs": added}


def _unet_3d() -> UNet3DConditionModel:
    return UNet3DConditionModel(
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=8,
        **_NORMED,
    )


def _spatio_temporal() -> UNetSpatioTemporalConditionModel:
    return UNetSpatioTemporalConditionModel(
        down_block_types=("CrossAttnDownBlockSpatioTemporal",) * 2,
        up_block_types=("CrossAttnUpBlockSpatioTemporal",) * 2,
        num_attention_heads=(2, 4),
        cross_attention_dim=WIDTH,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        **_LEVELS,
    )


def _of_spatio_temporal(videos: int, frames: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": _random(videos, 1, WIDTH),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).expand(videos, 3),
    }


def _i2vgen_xl() -> I2VGenXLUNet:
    return I2VGenXLUNet(
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=8,
        **_NORMED,
    )


def _of_i2vgen_xl(videos: int, frames: int) -> dict[str, Any]:
    return {
        "fps": torch.tensor([16]).expand(videos),
        "image_latents": _random(videos, 4, frames, SIZE, SIZE),
        "image_embeddings": _random(videos, 1, WIDTH),
        **_text(videos),
    }


def with_control(model: Any) -> Any:
    """The same, with weights where training begins at 0."""
    for module in (*model.controlnet_down_blocks, model.controlnet_mid_block):
        torch.nn.init.normal_(module.weight, std=0.2)
    embedding = model.controlnet_cond_embedding
    torch.nn.init.normal_(getattr(embedding, "conv_out", embedding).weight, std=0.2)
    return model


def _controlnet() -> ControlNetModel:
    return with_control(
        ControlNetModel(
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            attention_head_dim=2,
            conditioning_embedding_out_channels=(8, 8),
            **_NORMED,
        )
    )


def _of_controlnet(videos: int, frames: int) -> dict[str, Any]:
    rows = videos * frames
    return {**_text(rows), "controlnet_cond": _random(rows, 3, 2 * SIZE, 2 * SIZE)}


def _sparse_controlnet(levels: int = 2) -> SparseControlNetModel:
    return with_control(
        SparseControlNetModel(
            **{
                **_NORMED,
                "down_block_types": ("CrossAttnDownBlockMotion",) * levels,
                "block_out_channels": _LEVELS["block_out_channels"][:levels],
                "attention_head_dim": 2,
                "motion_num_attention_heads": 2,
            }
        )
    )


def _of_sparse_controlnet(videos: int, frames: int) -> dict[str, Any]:
    return {
        **_text(videos * frames),
        "controlnet_cond": _random(videos, 4, frames, SIZE, SIZE),
        "conditioning_mask": torch.ones(videos, 1, frames, SIZE, SIZE),
    }


KINDS = {
    "UNet2DConditionModel": Kind(make_unet, None, 7, lambda n, f: _text(n * f)),
    "UNetMotionModel": Kind(_motion, 2, 7, lambda n, f: _text(n * f)),
    "UNetMotionModel of XL": Kind(_motion_xl, 2, 8, _of_xl),
    "UNet3DConditionModel": Kind(_unet_3d, 2, 4, lambda n, f: _text(n)),
    # Timesteps are a quarter of a logarithm of sigma.
    "UNetSpatioTemporalConditionModel": Kind(
        _spatio_temporal, 1, 7, _of_spatio_temporal, timestep=1.637, channels=8
    ),
    "I2VGenXLUNet": Kind(_i2vgen_xl, 2, 4, _of_i2vgen_xl),
    "ControlNetModel": Kind(_controlnet, None, 3, _of_controlnet),
    "SparseControlNetModel": Kind(_sparse_controlnet, 2, 3, _of_sparse_controlnet),
}
# What takes time to compile takes less of it here.
ONE_LEVEL = Kind(lambda: _sparse_controlnet(1), 2, 2, _of_sparse_controlnet)


def make_model(kind: str | Kind) -> Any:
    """Two levels of 32 and 64 channels."""
    described = KINDS[kind] if isinstance(kind, str) else kind
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return described.make().eval()


def model_inputs(kind: str, videos: int = 1, frames: int = FRAMES) -> dict[str, Any]:
    """The keyword arguments of one call, without `return_dict`."""
    described = KINDS[kind]
    picture = (described.channels, SIZE, SIZE)
    shape = {
        None: (videos * frames, *picture),
        1: (videos, frames, *picture),
        2: (videos, described.channels, frames, SIZE, SIZE),
    }[described.frame_axis]
    return {
        "sample": _random(*shape),
        "timestep": torch.tensor(described.timestep),
        **described.arguments(videos, frames),
    }


def outputs(returned: Any) -> tuple[torch.Tensor, ...]:
    """All tensors of what a model returned: one, or a ControlNet's several."""
    return tuple(
        part
        for given in returned
        for part in (given if isinstance(given, (list, tuple)) else [given])
    )


def call_model(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The output of one call; a ControlNet's several ones in a row."""
    with torch.no_grad():
        found = outputs(model(**inputs, return_dict=False))
    return torch.cat([part.flatten() for part in found])
