"""What a pipeline is loaded from: a model's name and what is added to it, known without torch."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .names import EMBEDDED_MODEL, EMBEDDED_VIDEO_MODEL, RANDOM_MODEL
from .storage import tensor_shapes

WEIGHTS = ".safetensors"
"""The end of a name of a file that can be read without running code in it."""
CHECKPOINT = "model.diffusion_model."
"""The start of the UNet's names in a file of a whole Stable Diffusion model."""
FILE_VAE = "first_stage_model."
"""The start of the VAE's names in such a file."""
FILE_ENCODERS = ("cond_stage_model.", "conditioner.embedders.")
"""The starts of the text encoders' names in such a file: 1.x and 2.x's, XL's."""
TWO_ENCODERS = ("clip_l", "clip_g")
"""Names of a textual inversion's tensors for the two text encoders of Stable Diffusion XL."""
LATENTS = "latents.json"
"""File of a video model on the embedded VAE's latents, with their mean and deviation."""
WAN = "WanPipeline"
"""Class of diffusers whose pipelines are video models."""
_INDEX = "model_index.json"
_PICKLES = (".ckpt", ".bin", ".pt", ".pth")
_RANDOM = re.compile(rf"{RANDOM_MODEL}(?::(-?\d+))?")
_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
_TO_FOLDER = (
    f"--model takes a {WEIGHTS} file or a folder; "
    "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER) (of "
    "diffusers; StableDiffusionXLPipeline for XL) makes a folder of a checkpoint's file"
)
_OPTIONS = {
    "a whole model": "--model (model)",
    "a LoRA": "--lora (loras)",
    "a VAE": "--vae (vae)",
    "a textual inversion": "--textual-inversion (textual_inversions)",
}


_CLASSES = {"ControlNet": "ControlNetModel", "motion adapter": "MotionAdapter"}


class ModelError(ValueError):
    """A model that cannot be loaded, or that this package cannot use."""


@dataclass(frozen=True)
class ModelSource:
    """What a pipeline is loaded from; the fields are arguments of `load_pipeline`.

    Args:
        name: Hub id, folder in diffusers' format, .safetensors file, "embedded" or "random:SEED".
        variant: Variant of the weights of a hub id or a folder ("fp16").
        config: Folder or hub id of a pipeline whose configuration a file's model has.
        vae: Hub id, folder or file of a VAE that takes the place of the model's own.
        loras: Texts "FILE" or "FILE:SCALE".
        textual_inversions: Texts "FILE" or "FILE:TOKEN".
        controlnets: Hub ids or folders of ControlNets, or "embedded".
        motion_adapter: Hub id or folder of a motion adapter of AnimateDiff.
        motion_window: Number of frames that its layers see at once; None: all.
    """

    name: str
    variant: str | None = None
    config: str | None = None
    vae: str | None = None
    loras: tuple[str, ...] = ()
    textual_inversions: tuple[str, ...] = ()
    controlnets: tuple[str, ...] = ()
    motion_adapter: str | None = None
    motion_window: int | None = None

    @classmethod
    def of(cls, record: str | Mapping[str, Any]) -> ModelSource:
        """The source of a name, or of a record.

        Args:
            record: Name of a model, or what `record` gave.

        Raises:
            TypeError: it is neither.
        """
        if isinstance(record, str):
            return cls(record)
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(record, Mapping) or "name" not in record or not record.keys() <= known:
            raise TypeError(
                f"model is {record!r}; it must be a name, or a mapping of a name and the other "
                f"arguments of load_pipeline, of {', '.join(sorted(known))}"
            )
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in record.items()
        }
        return cls(**values)

    @property
    def is_file(self) -> bool:
        """Whether the model is one file."""
        return self.name.endswith(WEIGHTS)

    @property
    def is_built_in(self) -> bool:
        """Whether the model comes with this package."""
        return self.name in (EMBEDDED_MODEL, EMBEDDED_VIDEO_MODEL) or self.seed is not None

    @property
    def is_video_model(self) -> bool:
        """Whether the model is a video transformer, as far as can be said without the hub: its
        folder, or what the hub's cache has of it, names diffusers' WanPipeline."""
        folder = Path(self.name)
        if self.name == EMBEDDED_VIDEO_MODEL or (folder / LATENTS).is_file():
            return True
        try:
            index = self._index()
            return index is not None and json.loads(index.read_bytes())["_class_name"] == WAN
        except (OSError, ValueError, KeyError, TypeError):
            return False  # who loads it says what is wrong

    def _index(self) -> Path | None:
        """The file that names the pipeline's class, where it is on this machine."""
        folder = Path(self.name)
        if folder.is_dir():
            return folder / _INDEX
        if self.is_file or self.is_built_in or not _HUB_ID.fullmatch(self.name):
            return None
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.name, _INDEX)
        return Path(found) if isinstance(found, str) else None

    @property
    def seed(self) -> int | None:
        """The seed of a model of random numbers; None for any other.

        Raises:
            ModelError: it is no whole number of 64 bits.
        """
        found = _RANDOM.fullmatch(self.name)
        if found is None:
            return None
        seed = int(found[1] or 0)
        if not -(2**63) <= seed < 2**63:
            raise ModelError(
                f"model is {self.name!r}, and its seed is {seed}; it must be a whole number of 64 "
                "bits"
            )
        return seed

    @property
    def additions(self) -> dict[str, Any]:
        """What is set beside the name, as JSON types."""
        fields = dataclasses.asdict(self).items()
        found = {key: value for key, value in fields if value and key != "name"}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()}

    def record(self) -> str | dict[str, Any]:
        """What to write down: the name, or a mapping where there is more to say."""
        return {"name": self.name, **self.additions} if self.additions else self.name

    def renamed(self, name: str) -> ModelSource:
        """The source of another name, with what is added to it; the rest where it can apply."""
        other = dataclasses.replace(self, name=name)
        return dataclasses.replace(
            other,
            config=self.config if other.is_file else None,
            variant=None if other.is_file or other.is_built_in else self.variant,
        )

    def __str__(self) -> str:
        parts = [
            f"{key.replace('_', ' ')} {', '.join(value) if isinstance(value, list) else value}"
            for key, value in self.additions.items()
        ]
        return f"{self.name!r}{' with ' if parts else ''}{', '.join(parts)}"

    def check(self) -> None:
        """Raise where the model cannot be loaded, as far as that can be said before.

        Raises:
            ModelError: a file that is missing, damaged, of another kind than its option takes or
                no .safetensors file; a scale that is no number; a variant or a configuration where
                none can be; LoRAs without peft; a ControlNet or a motion adapter that is neither a
                folder here nor can be a hub id; a window without a motion adapter.
        """
        if self.is_file:
            check_checkpoint(Path(self.name), has_vae=self.vae is not None)
        elif Path(self.name).is_file():
            raise ModelError(f"{self.name!r} is no {WEIGHTS} file; {_TO_FOLDER}")
        elif not Path(self.name).is_dir() and not self.is_built_in:
            if Path(self.name).suffix in _PICKLES:
                raise ModelError(f"there is no file {self.name!r} here; {_TO_FOLDER}")
            if not _HUB_ID.fullmatch(self.name):
                raise ModelError(
                    f"{self.name!r} is no folder here, and cannot be a hub id; {_TO_FOLDER}"
                )
        if self.config is not None and not self.is_file:
            raise ModelError(
                f"config is {self.config!r}, and the model {self.name!r} has its own: "
                f"--model-config (config) is for a model in one {WEIGHTS} file"
            )
        if self.variant is not None and (self.is_file or self.is_built_in):
            raise ModelError(
                f"variant is {self.variant!r}, and the model {self.name!r} has no variants: "
                "--variant (variant) is for hub ids and folders"
            )
        if self.vae is not None and self.vae.endswith(WEIGHTS):
            check_kind(Path(self.vae), "a VAE")
        for text in self.loras:
            check_kind(lora_of(text)[0], "a LoRA")
        for text in self.textual_inversions:
            check_kind(embedding_of(text)[0], "a textual inversion")
        for name in self.controlnets:
            if name != EMBEDDED_MODEL:
                check_part(name, "ControlNet", "--controlnet (controlnets)")
        if self.motion_adapter is not None:
            option = "--motion-adapter (motion_adapter)"
            check_part(self.motion_adapter, "motion adapter", option)
        window = self.motion_window
        if window is not None and (type(window) is not int or window < 2):
            raise ModelError(
                f"motion_window is {window!r}; it must be a number of frames of at least 2"
            )
        if window is not None and self.motion_adapter is None:
            raise ModelError(
                f"motion_window is {window}, and there is no motion adapter: --motion-window "
                "(motion_window) goes with --motion-adapter (motion_adapter)"
            )
        if self.loras and importlib.util.find_spec("peft") is None:
            raise ModelError(
                "a LoRA (--lora, loras) needs peft, which is not installed; pip install "
                "'stem-inversion[lora]'"
            )


def check_part(name: str, kind: str, option: str) -> None:
    """Raise where a part of a pipeline cannot be loaded, as far as that can be said before.

    Args:
        name: Hub id, or folder in diffusers' format.
        kind: Kind of the part, a key of `_CLASSES`.
        option: Option that takes it, for messages.

    Raises:
        ModelError: a file, or a text that is neither.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"the {kind} {name!r} is a folder without config.json; {option} takes a {kind}'s "
                "own folder in diffusers' format"
            )
    elif path.is_file() or path.suffix in (WEIGHTS, *_PICKLES) or not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"the {kind} {name!r} is no folder here, and cannot be a hub id; {option} takes one of "
            f"these. {_CLASSES[kind]}.from_single_file(FILE).save_pretrained(FOLDER) (of "
            "diffusers) makes a folder of a file"
        )


def lora_of(text: str) -> tuple[Path, float]:
    """The file and the scale of a LoRA.

    Args:
        text: Text FILE or FILE:SCALE.

    Raises:
        ModelError: the file is no .safetensors file, or the scale is no finite number.
    """
    path, scale = _split(text, _OPTIONS["a LoRA"], "SCALE")
    try:
        number = 1.0 if scale is None else float(scale)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ModelError(
            f"{_OPTIONS['a LoRA']} is {text!r}, and its scale {scale!r} is no number; write "
            "FILE:SCALE, such as style.safetensors:0.7"
        )
    return path, number


def embedding_of(text: str) -> tuple[Path, str | None]:
    """The file of a textual inversion, and the word for it; None where the file says it.

    Args:
        text: Text FILE or FILE:TOKEN.

    Raises:
        ModelError: the file is no .safetensors file, or the word is empty.
    """
    option = _OPTIONS["a textual inversion"]
    path, token = _split(text, option, "TOKEN")
    if token is not None and (not token or token.split() != [token]):
        raise ModelError(
            f"{option} is {text!r}, and its token {token!r} is no single word; write FILE:TOKEN, "
            "such as cat.safetensors:<cat>"
        )
    return path, token


def _split(text: str, option: str, second: str) -> tuple[Path, str | None]:
    path, mark, rest = text.partition(f"{WEIGHTS}:")
    if mark:
        return Path(path + WEIGHTS), rest
    if not text.endswith(WEIGHTS):
        raise ModelError(
            f"{option} is {text!r}; it takes a {WEIGHTS} file, or FILE{WEIGHTS}:{second}. Other "
            "files of weights are pickles, which can run code when they are read"
        )
    return Path(text), None


def check_kind(path: Path, wanted: str) -> None:
    """Raise where a file is missing, damaged, or holds weights of another kind.

    Args:
        path: Path of a .safetensors file.
        wanted: Kind that it must be of: "a whole model", "a LoRA", "a VAE" or
            "a textual inversion".

    Raises:
        ModelError: with the option that takes the file.
    """
    option = _OPTIONS[wanted]
    if not path.is_file():
        raise ModelError(f"there is no file {str(path)!r} for {option}")
    try:
        names = tensor_shapes(path)
    except ValueError as error:
        raise ModelError(f"{error}, for {option}") from error
    kind = _kind_of(names)
    if kind != wanted:
        to = f"; pass it with {_OPTIONS[kind]}" if kind in _OPTIONS else ""
        raise ModelError(f"{str(path)!r} is {kind}, and {option} takes {wanted}{to}")


def _kind_of(names: Mapping[str, tuple[int, ...]]) -> str:
    if not names:
        return "empty"
    if any(name.startswith(CHECKPOINT) for name in names):
        return "a whole model"
    if any("lora" in name for name in names):
        return "a LoRA"
    if any(name.removeprefix(FILE_VAE).startswith("decoder.conv_in.") for name in names):
        return "a VAE"
    small = all(len(shape) <= 2 for shape in names.values())
    if small and (len(names) == 1 or set(names) == set(TWO_ENCODERS)):
        return "a textual inversion"
    return f"of another kind (its first tensor is {min(names)!r})"


def check_checkpoint(path: Path, *, has_vae: bool) -> None:
    """Raise where a file is no whole model of Stable Diffusion 1.x, 2.x or XL.

    Args:
        path: Path of a .safetensors file.
        has_vae: Whether a VAE comes from elsewhere.

    Raises:
        ModelError: with the reason.
    """
    check_kind(path, "a whole model")
    shapes = tensor_shapes(path)
    first = shapes.get(f"{CHECKPOINT}input_blocks.0.0.weight")
    if first is None:
        raise ModelError(
            f"{str(path)!r} holds no UNet of Stable Diffusion (no {CHECKPOINT}input_blocks); use a "
            "file of Stable Diffusion 1.x, 2.x or XL"
        )
    if first[1] != 4:
        raise ModelError(
            f"the UNet in {str(path)!r} takes {first[1]} channels: it is made for inpainting, "
            "depth or instructions and wants more than latents; use a file of the base model"
        )
    if not any(name.startswith(FILE_ENCODERS) for name in shapes):
        raise ModelError(
            f"{str(path)!r} holds no text encoder (no {' and no '.join(FILE_ENCODERS)}); use a "
            "file of the whole model"
        )
    if not has_vae and not any(name.startswith(FILE_VAE) for name in shapes):
        raise ModelError(
            f"{str(path)!r} holds no VAE; name the one that it was made for with --vae (vae)"
        )
