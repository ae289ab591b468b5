"""Models in one file: their configuration, and their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version

from ..sources import CHECKPOINT, ModelError, ModelSource
from ..storage import tensor_shapes
from .reasons import reason_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_LOWEST = "0.39"
_CONFIGURATION = ("**/*.json", "*.json", "**/*.txt", "*.txt")
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
# By the width of the text embeddings that the UNet attends to.
_STANDARD = {
    768: "stable-diffusion-v1-5/stable-diffusion-v1-5",
    2048: "stabilityai/stable-diffusion-xl-base-1.0",
}
_PLAYGROUND = "playgroundai/playground-v2.5-1024px-aesthetic"
_V2 = ("stabilityai/stable-diffusion-2-1-base", "stabilityai/stable-diffusion-2-1")
_V2_WIDTH = 1024


def load_single_file(source: ModelSource, dtype: torch.dtype, **parts: Any) -> DiffusionPipeline:
    """The pipeline of a model in one file.

    Args:
        source: Source whose name is a .safetensors file.
        dtype: Dtype of the weights.
        parts: Parts of the pipeline that are there already.

    Raises:
        ModelError: there is no configuration, or the file does not fit it.
    """
    import diffusers

    if Version(diffusers.__version__) < Version(_LOWEST):
        # Below, it does not find the text encoder's weights under transformers' names of today.
        raise ModelError(
            f"{source.name!r} is a model in one file, which needs diffusers {_LOWEST} or newer, "
            f"and this is {diffusers.__version__}"
        )
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    folder = configuration_folder(source)
    name = json.loads((folder / "model_index.json").read_bytes()).get("_class_name")
    if name not in _PIPELINES:
        raise ModelError(
            f"the configuration {str(folder)!r} is of a {name}, and a file's model must be a "
            f"{' or a '.join(_PIPELINES)}"
        )
    try:
        pipeline = getattr(diffusers, name).from_single_file(
            source.name, config=str(folder), local_files_only=True, torch_dtype=dtype, **parts
        )
        _check_whole(pipeline)
    except (OSError, ValueError, KeyError, NotImplementedError, SingleFileComponentError) as error:
        raise ModelError(
            f"{source.name!r} does not fit the configuration {str(folder)!r}: {reason_of(error)}. "
            "Name that of its kind with --model-config (config)"
        ) from error
    _follow_marks(pipeline, tensor_shapes(Path(source.name)))
    return pipeline


def configuration_folder(source: ModelSource) -> Path:
    """The folder of the configuration of a model in one file, from the hub where it is not here.

    Args:
        source: Source whose name is a .safetensors file.

    Raises:
        ModelError: there is none, with what to do.
    """
    name = source.config or _standard(source)
    folder = Path(name)
    if not folder.is_dir():
        folder = _from_hub(source, name)
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"{str(folder)!r} has no model_index.json; name a pipeline's folder in diffusers' "
            "format with --model-config (config); its weights need not be there"
        )
    return folder


def _from_hub(source: ModelSource, name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_CONFIGURATION)))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source.name!r} holds weights only, and the configuration {name!r} is neither a "
            "folder here nor in the hub's cache, and cannot be downloaded. Name a folder in "
            "diffusers' format of a model of the same kind with --model-config FOLDER (config); or "
            f"run, where there is a network, hf download {name} "
            f"{' '.join(f'--include {pattern!r}' for pattern in _CONFIGURATION)}"
        ) from error


def _standard(source: ModelSource) -> str:
    """The hub id of the model whose configuration a file has, by the names in it."""
    shapes = tensor_shapes(Path(source.name))
    if "edm_mean" in shapes:
        return _PLAYGROUND
    widths = [
        shape[-1]
        for name, shape in shapes.items()
        if name.startswith(CHECKPOINT) and name.endswith("attn2.to_k.weight")
    ]
    width = widths[0] if widths else 0
    if width == _V2_WIDTH:
        raise ModelError(
            f"{source.name!r} is a model of Stable Diffusion 2.x, and the file does not say "
            "whether it predicts noise (as 2.1 base, 512 pixels) or velocity (as 2.1, 768 pixels); "
            f"say it with --model-config {_V2[0]} or --model-config {_V2[1]} (config), or "
            "with a folder"
        )
    if width not in _STANDARD:
        raise ModelError(
            f"the UNet in {source.name!r} takes text of {width} channels, and Stable Diffusion "
            f"1.x, 2.x and XL have 768, {_V2_WIDTH} and 2048; name a folder in diffusers' format "
            "of a model of the same kind with --model-config FOLDER (config)"
        )
    return _STANDARD[width]


def _check_whole(pipeline: Any) -> None:
    """Raise where weights were not in the file."""
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            absent = [key for key, value in part.state_dict().items() if value.is_meta]
            if absent:
                raise ValueError(f"it lacks the {name}'s {absent[0]} ({len(absent)} tensors)")


def _follow_marks(pipeline: Any, names: Mapping[str, Any]) -> None:
    """Set what a file of Stable Diffusion XL says about its training by tensors of one number."""
    said: dict[str, Any] = {}
    if "v_pred" in names:
        said["prediction_type"] = "v_prediction"
    if "ztsnr" in names:
        said["rescale_betas_zero_snr"] = True
    if said:
        scheduler = pipeline.scheduler
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, **said)
