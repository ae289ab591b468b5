"""Pipelines: loaded from a hub, a folder or a file, or made on the spot with random weights."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version

from . import names
from .diffusion.checks import check_pipeline
from .loading.additions import add_loras, add_textual_inversions, load_vae
from .loading.controlnets import with_controlnets
from .loading.index import pipeline_index
from .loading.motion import with_motion
from .loading.offloading import check_offload, offload_weights
from .loading.single_file import configuration_folder, load_single_file
from .names import EMBEDDED_MODEL, RANDOM_MODEL
from .sources import WAN, WEIGHTS, ModelError, ModelSource

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline

EMBEDDED_FOLDER = Path(__file__).parent / "world" / "model"
"""The trained pipeline that comes with this package; see README.md in it."""
EMBEDDED_CONTROLNET = EMBEDDED_FOLDER / "controlnet"
"""Folder of the ControlNet on edges that was trained beside it."""
RANDOM_VAE_FACTOR = 8
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in names.DTYPES}
# Gives natural frames latents of about unit variance, as Stable Diffusion's own factor does.
RANDOM_SCALING_FACTOR = 5.25
# diffusion_pytorch_model.safetensors, model.fp16.safetensors, model-00001-of-00002.fp16.safetensors
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_|pytorch_)?model(?:-\d+-of-\d+)?(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?"
    r"\.(?:safetensors|bin)"
)
_SD_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def load_pipeline(
    model: str,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    variant: str | None = None,
    config: str | None = None,
    vae: str | None = None,
    loras: Sequence[str] = (),
    textual_inversions: Sequence[str] = (),
    controlnets: Sequence[str] = (),
    motion_adapter: str | None = None,
    motion_window: int | None = None,
    offload: str | None = None,
    offload_folder: str | Path | None = None,
) -> DiffusionPipeline:
    """Load a Stable Diffusion 1.x, 2.x or XL pipeline for inversions.

    Args:
        model: Hub id, local folder in diffusers' format, .safetensors file of a whole model,
            "embedded" (the small trained pipeline that comes with this package, for 64x64 pixels),
            or "random:SEED" (`random_pipeline`); "random" has seed 0.
        device: Device to load onto; None: "cuda" if there is a GPU, else "cpu".
        dtype: Dtype of the weights, "float32", "float16" or "bfloat16", or torch's; None: float16
            on a GPU, else float32.
        variant: Variant of a hub id's or a folder's weights, such as "fp16"; None: those without
            one, or a folder's only one.
        config: Folder in diffusers' format, or hub id, of a model of the same kind as the file;
            None: the standard one of the kind that the file's tensors show, from the hub's cache or
            the hub.
        vae: Hub id, folder or .safetensors file of a VAE in place of the model's own.
        loras: Texts "FILE" or "FILE:SCALE", the scale 1 where none is given. Each stays a layer of
            its own, as with diffusers' `set_adapters`. They need peft (the extra `lora`).
        textual_inversions: Texts "FILE" or "FILE:TOKEN". Without a token the word for it is the
            name of the file's tensor, or the file's own where that says nothing (`clip_l`,
            `clip_g` and `emb_params`).
        controlnets: Hub ids or folders of ControlNets, or of T2I-Adapters, made for this model, or
            "embedded" (on edges, for the model of that name); `invert` then needs `control`.
        motion_adapter: Hub id or folder of a motion adapter of AnimateDiff made for this model: its
            layers between the UNet's attend along the frames. The noise schedule becomes linear.
        motion_window: Number of frames that these layers see at once, in overlapping windows (by
            diffusers' FreeNoise), for videos of more frames than the adapter has places for; None:
            all frames.
        offload: Way of keeping weights away from a small accelerator: "model" (whole models on the
            CPU until they run), "sequential" or "group" (layer by layer); None: everything is on
            the device. No bit of a result depends on it, but on a CPU with a folder, where weights
            lie elsewhere in memory and the last bits can differ.
        offload_folder: Folder on a disk that "group" keeps the weights in, in place of the CPU's
            memory.

    Raises:
        ModelError: the model or a part of it cannot be loaded, or it cannot be inverted.
        ValueError: the device or the dtype does not exist here, or it cannot be offloaded so.
    """
    device, dtype = check_device(device, offload, offload_folder), dtype_of(dtype)
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
    repeated = {
        "loras": loras,
        "textual_inversions": textual_inversions,
        "controlnets": controlnets,
    }
    for name, texts in repeated.items():
        if isinstance(texts, str):
            raise TypeError(f"{name} is {texts!r}; pass a sequence of texts, such as [{texts!r}]")
    source = ModelSource(
        model,
        variant,
        config,
        vae,
        **{name: tuple(texts) for name, texts in repeated.items()},
        motion_adapter=motion_adapter,
        motion_window=motion_window,
    )
    source.check()
    if source.is_video_model:
        raise _video_model_error(model)
    with torch.random.fork_rng(devices=[]):  # what is resized is first filled with random numbers
        pipeline = _loaded(source, dtype)
        pipeline = with_motion(pipeline, source.motion_adapter, source.motion_window)
        add_loras(pipeline, source.loras)
        add_textual_inversions(pipeline, source.textual_inversions)
        nets = [
            str(EMBEDDED_CONTROLNET) if name == EMBEDDED_MODEL else name
            for name in source.controlnets
        ]
        pipeline = with_controlnets(pipeline, nets, dtype)
    _check(model, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    if offload is None:
        return pipeline.to(device)
    offload_weights(pipeline, offload, offload_folder, device)
    return pipeline


def _video_model_error(model: str) -> ModelError:
    return ModelError(
        f"{model!r} is a video transformer, which has no UNet; load it with "
        "stem.flow.load_video_model, and see docs/video-transformers.md for what goes through it"
    )


def _check(model: str, pipeline: object) -> None:
    try:
        check_pipeline(pipeline)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{model!r}: {error}") from error


def _loaded(source: ModelSource, dtype: torch.dtype) -> Any:
    """The pipeline of a source, before anything is added but its VAE."""
    if source.is_file:
        parts = {}
        if source.vae is not None:
            folder = configuration_folder(source)
            own = json.loads((folder / "vae" / "config.json").read_bytes())
            parts["vae"] = load_vae(source.vae, own, dtype)
        return load_single_file(source, dtype, **parts)
    if source.seed is not None:
        pipeline: Any = random_pipeline(source.seed).to(dtype=dtype)
    else:
        pipeline = _pretrained(source, dtype)
    if source.vae is not None and getattr(pipeline, "vae", None) is not None:
        pipeline.vae = load_vae(source.vae, pipeline.vae.config, dtype)
    return pipeline


def _pretrained(source: ModelSource, dtype: torch.dtype) -> Any:
    import diffusers

    folder = _local_folder(source.name)
    index = pipeline_index(folder or source.name)
    kind = index.get("_class_name")
    if kind == WAN:
        raise _video_model_error(source.name)
    if isinstance(kind, str) and "unet" not in index:
        _check(source.name, type(kind, (), {})())  # which says what is missing
    try:
        return diffusers.DiffusionPipeline.from_pretrained(
            folder or source.name,
            variant=source.variant or (None if folder is None else _only_variant(folder)),
            **loaded_as(dtype),
        )
    except (OSError, ValueError) as error:
        where = f"the folder {str(folder)!r}" if folder else f"the hub id {source.name!r}"
        raise ModelError(
            f"no pipeline can be loaded from {where}: {error}. --model takes a hub id, a local "
            f"folder in diffusers' format (one with model_index.json), a {WEIGHTS} file, "
            f"{EMBEDDED_MODEL!r} or {RANDOM_MODEL!r}"
        ) from error


def loaded_as(dtype: Any) -> dict[str, Any]:
    """The argument of diffusers' `from_pretrained` that says in which dtype weights are loaded.

    Args:
        dtype: Dtype of all parts, or a mapping of parts and "default" to dtypes.
    """
    import diffusers

    # diffusers 0.42 renamed it, and warns of the old name.
    renamed = Version(diffusers.__version__) >= Version("0.42")
    return {"dtype" if renamed else "torch_dtype": dtype}


def known_vae_factor(model: str, config: str | None = None) -> int | None:
    """Pixels per latent of a model, without loading it; None where the hub must be asked.

    Args:
        model: Name of the model, as for `load_pipeline`.
        config: Configuration of a model in one file, likewise.
    """
    if ModelSource(model).seed is not None:
        return RANDOM_VAE_FACTOR
    found = _config(config or model, "vae/config.json")
    return None if found is None else 2 ** (len(found["block_out_channels"]) - 1)


def known_schedule(model: str, config: str | None = None) -> dict[str, Any] | None:
    """The scheduler's configuration of a model, without loading it; None where the hub has it.

    Args:
        model: Name of the model, as for `load_pipeline`.
        config: Configuration of a model in one file, likewise.
    """
    if ModelSource(model).seed is not None:
        return dict(_SD_SCHEDULE)
    return _config(config or model, "scheduler/scheduler_config.json")


def _config(model: str, name: str) -> dict[str, Any] | None:
    folder = _local_folder(model)
    if folder is None or not (folder / name).is_file():
        return None
    config: dict[str, Any] = json.loads((folder / name).read_bytes())
    return config


def _local_folder(model: str) -> Path | None:
    if model == EMBEDDED_MODEL:
        return EMBEDDED_FOLDER
    return Path(model) if Path(model).is_dir() else None


def _only_variant(folder: Path) -> str | None:
    """The variant ("fp16") of weights that a part of a model has no others of."""
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        found = [_WEIGHTS.fullmatch(file.name) for file in sorted(part.iterdir())]
        variants = [match["variant"] for match in found if match is not None]
        if variants and None not in variants:
            return str(variants[0])
    return None


def check_device(
    device: str | torch.device | None,
    offload: str | None = None,
    offload_folder: str | Path | None = None,
) -> torch.device:
    """The device that a name means, where a pipeline can run on it.

    Args:
        device: Device; None: "cuda" if there is a GPU, else "cpu".
        offload: Way of keeping weights away from it, as for `load_pipeline`.
        offload_folder: Folder on a disk for them, likewise.

    Raises:
        ValueError: it does not exist here, or weights cannot be kept away from it so.
    """
    on_gpu = torch.cuda.is_available()
    try:
        found = torch.device(device or ("cuda" if on_gpu else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; write cpu, cuda or cuda:NUMBER") from error
    _, colon, number = str(device).partition(":")
    # torch keeps eight bits of the number: its cuda:256 is cuda:0.
    lost = bool(colon) and str(found.index) != number
    if found.type == "cuda" and (lost or (found.index or 0) >= torch.cuda.device_count()):
        raise ValueError(
            f"device is {device!r}, and torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA GPUs here; take another, or cpu"
        )
    accelerator = torch.accelerator.current_accelerator()
    usable = ["cpu"]
    if accelerator is not None and torch.accelerator.is_available():
        usable.append(accelerator.type)
    if found.type not in ("cuda", *usable):
        raise ValueError(
            f"device is {device!r}, and torch {torch.__version__} has only {' and '.join(usable)} "
            "here; take one of them"
        )
    check_offload(offload, offload_folder, found)
    return found


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype that a name means; None for None.

    Args:
        dtype: Name, torch's dtype, or None.

    Raises:
        ValueError: another name.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def random_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """A small pipeline of Stable Diffusion 1.x's shape whose weights are random numbers.

    It has SD's blocks, its VAE factor of 8 and its schedule, and about 8 million parameters. It is
    not trained; it serves to test code and to measure speed and memory. Equal seeds give equal
    weights. The global random state does not change.

    Args:
        seed: Seed of the weights, a whole number of 64 bits.
    """
    from diffusers import (
        AutoencoderKL,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(_byte_vocabulary()),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=77,
                bos_token_id=_byte_vocabulary()["<|startoftext|>"],
                eos_token_id=_byte_vocabulary()["<|endoftext|>"],
                pad_token_id=_byte_vocabulary()["<|endoftext|>"],
            )
        )
        unet = UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(32, 64, 128, 128),
            attention_head_dim=8,
            cross_attention_dim=64,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(16, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=8,
            sample_size=256,
            scaling_factor=RANDOM_SCALING_FACTOR,
        )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=CLIPTokenizer(vocab=_byte_vocabulary(), merges=[], model_max_length=77),
        unet=unet.eval(),
        scheduler=sd_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, without clipping."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**_SD_SCHEDULE)


def _byte_vocabulary() -> dict[str, int]:
    # CLIP's byte-level alphabet: printable bytes stand for themselves, the others for the code
    # points from 256 on; each also occurs at the end of a word.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [256 + index for index in range(256 - len(printable))]
    letters = [chr(code) for code in [*printable, *shifted]]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    return {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
