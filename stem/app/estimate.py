"""What a job will take, before it runs: bytes by counting, seconds by what earlier steps took.

The counts are those of a UNet's configuration: `held_bytes` is what `diffusion.memory` finds by
hooks. Seconds are those of timed steps of the same model and part on the same device, scaled by the
operations counted; where none was timed, nothing is claimed until a first step is.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ..names import EMBEDDED_MODEL, RANDOM_MODEL
from .commands import Edits, Inversion
from .jobs import Job

USED_SHARE = 0.7  # as `diffusion.memory` plans with
_WAITING_COPIES = 4  # likewise: residual, normalised input, queries and keys of a layer that waits
_PEAK_COPIES = 24  # of the widest activation, at once in a call of one frame; measured
_BASES, _PASSES = 256, 3  # of STEM: passes over the tokens are two of E+M and the attention
_BRANCHES = 3  # of an edit: the source, and the edit with and without its prompt
_MIB = 2**20


@dataclass(frozen=True)
class UNet:
    """What a UNet's configuration says of its size.

    Args:
        channels: Channels of each level.
        attends: Whether each level has attention.
        layers: Number of layers in a block.
        factor: Pixels a latent, along one side.
        latent_channels: Channels of the latents.
        weights: Bytes of all weights of the model on disk.
        item: Bytes of a number on the device.
    """

    channels: tuple[int, ...]
    attends: tuple[bool, ...]
    layers: int
    factor: int
    latent_channels: int
    weights: int
    item: int

    def held_bytes(self, height: int, width: int) -> int:
        """Bytes of a frame that live from block to block, where chunks wait for each other.

        Args:
            height: Height of the frame in pixels.
            width: Width of the frame in pixels.
        """
        sizes = list(self._skips(height, width))
        return self.item * (sum(sizes) + _WAITING_COPIES * max(sizes))

    def peak_bytes(self, height: int, width: int) -> int:
        """Bytes of a call on one frame beside the weights, about."""
        return self.item * _PEAK_COPIES * max(self._skips(height, width))

    def _skips(self, height: int, width: int) -> Iterable[int]:
        h, w = height // self.factor, width // self.factor
        yield self.channels[0] * h * w
        for level, channels in enumerate(self.channels):
            yield from (channels * h * w for _ in range(self.layers))
            if level + 1 < len(self.channels):
                h, w = math.ceil(h / 2), math.ceil(w / 2)
                yield channels * h * w

    def operations(self, frames: int, height: int, width: int, method: str) -> float:
        """Multiplications of a step over all frames, about.

        Args:
            frames: Number of frames.
            height: Height of the frames in pixels.
            width: Width of the frames in pixels.
            method: Name of the inversion method, which says what a token attends to.
        """
        h, w = height // self.factor, width // self.factor
        total = 0.0
        for level, channels in enumerate(self.channels):
            tokens = math.ceil(h / 2**level) * math.ceil(w / 2**level)
            keys = {
                "ddim": tokens,
                "st-ddim": 2 * tokens,
                "inflated": frames * tokens,
                "stem": _PASSES * min(_BASES, frames * tokens),
            }[method]
            layer = 2 * 9 * channels**2
            if self.attends[level]:
                layer += 20 * channels**2 + 2 * channels * keys
            total += (2 * self.layers + 1) * tokens * layer
        return frames * total


def unet_of(model: str, *, half: bool) -> UNet | None:
    """What the configuration of a model says; None where it is not on this machine.

    Args:
        model: Name of the model, as --model takes it.
        half: Whether its weights are in half precision on the device.
    """
    folder = _folder_of(model)
    try:
        unet = json.loads((folder / "unet" / "config.json").read_bytes()) if folder else None
        vae = json.loads((folder / "vae" / "config.json").read_bytes()) if folder else None
    except (OSError, ValueError):
        return None
    if not unet or not vae or not isinstance(unet.get("layers_per_block", 2), int):
        return None
    weights = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) if folder else 0
    return UNet(
        tuple(unet["block_out_channels"]),
        tuple("Attn" in kind for kind in unet["down_block_types"]),
        unet.get("layers_per_block", 2),
        2 ** (len(vae["block_out_channels"]) - 1),
        vae.get("latent_channels", 4),
        weights,
        2 if half else 4,
    )


def _folder_of(model: str) -> Path | None:
    if model == EMBEDDED_MODEL:
        return Path(__file__).parents[1] / "world" / "model"
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache  # it only looks at the disk
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "unet/config.json")
    except HFValidationError:
        return None
    return Path(found).parents[1] if isinstance(found, str) else None


def _is_here(model: str) -> bool:
    """Whether a model is on this machine, be it without a configuration."""
    return model == RANDOM_MODEL or Path(model).is_file() or _folder_of(model) is not None


def free_bytes(device: str) -> int:
    """Free bytes of a device; of the default's, the first GPU's where there is one.

    Args:
        device: Name of the device, or "" for the default.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None or device == "cpu":
        return int(psutil.virtual_memory().available)
    number = device.partition(":")[2] or "0"
    asked = ["--query-gpu=memory.free", "--format=csv,noheader,nounits", f"--id={number}"]
    done = subprocess.run([tool, *asked], capture_output=True, text=True)
    text = done.stdout.strip()
    if done.returncode or not text.isdecimal():
        return int(psutil.virtual_memory().available)
    return int(text) * _MIB


def shape_of(width: int, height: int, size: str, factor: int) -> tuple[int, int]:
    """Width and height of the frames that a model gets.

    Args:
        width: Width of the video in pixels.
        height: Height of the video in pixels.
        size: Size asked for: "" for the video's own, "256" for the shorter side, or "512x320".
        factor: Number that they are made multiples of.
    """
    if "x" in size:
        wide, high = (int(part) for part in size.split("x"))
    elif size:
        scale = int(size) / min(width, height)
        wide, high = round(width * scale), round(height * scale)
    else:
        wide, high = width, height
    return wide // factor * factor, high // factor * factor


@dataclass(frozen=True)
class Estimate:
    """What a job will take.

    Args:
        width: Width of the frames in pixels.
        height: Height of the frames in pixels.
        memory: Bytes of memory at least, beside what the chunk adds; None: not known.
        free: Bytes of memory that may be used.
        disk: Bytes on disk at most; None: not known.
        free_disk: Free bytes of the disk.
        seconds: Seconds; None where no step of its like has been timed.
        advice: What to change for it to fit; "" where it does.
        here: Whether the model is on this machine.
    """

    width: int
    height: int
    memory: int | None
    free: int
    disk: int | None
    free_disk: int
    seconds: float | None
    advice: str
    here: bool = True


def estimate(
    asked: Inversion | Edits,
    inversion: Inversion,
    video: tuple[int, int],
    device: str,
    jobs: Iterable[Job],
) -> Estimate:
    """What an inversion or edits will take.

    Args:
        asked: Inversion or edits.
        inversion: The inversion, or that of the edits.
        video: Width and height of the video in pixels.
        device: Name of the device, or "" for the default.
        jobs: Jobs, whose timed steps count.
    """
    half = device != "cpu" and shutil.which("nvidia-smi") is not None
    unet = unet_of(inversion.model, half=half)
    width, height = shape_of(video[0], video[1], inversion.size, unet.factor if unet else 8)
    free = int(USED_SHARE * free_bytes(device))
    free_disk = shutil.disk_usage(Path(inversion.out)).free
    if unet is None or min(width, height) < unet.factor:
        here = _is_here(inversion.model)
        return Estimate(width, height, None, free, None, free_disk, None, "", here)
    branches = _BRANCHES if isinstance(asked, Edits) else 1
    waits = inversion.method != "ddim"
    fixed = unet.weights + branches * unet.peak_bytes(height, width)
    a_frame = branches * unet.held_bytes(height, width) if waits else 0
    memory = fixed + a_frame * inversion.frames
    latents = 4 * unet.latent_channels * (height // unet.factor) * (width // unet.factor)
    disk_a_frame = (inversion.steps + 1) * latents * (1 + _windows(asked))
    disk = disk_a_frame * inversion.frames
    advice = ""
    if memory > free:
        shorter = min(width, height)
        advice = _memory_advice(free, unet.weights, fixed, a_frame, inversion.frames, shorter)
    elif disk > free_disk:
        fits = free_disk // disk_a_frame
        advice = f"the disk takes {fits} frames" if fits else "free some space on the disk"
    seconds = _seconds(asked, inversion, unet, (width, height), video, device, jobs)
    return Estimate(width, height, memory, free, disk, free_disk, seconds, advice)


def _memory_advice(
    free: int, weights: int, fixed: int, a_frame: int, frames: int, shorter: int
) -> str:
    fits = (free - fixed) // a_frame if a_frame else 0
    if fits >= 1:
        return f"take at most {fits} frames of this size"
    # All but the weights grows with the pixels.
    scale = math.sqrt(max(0, free - weights) / (fixed - weights + a_frame * frames))
    size = int(shorter * scale) // 64 * 64
    return f"take a size of {size}" if size else "take a smaller model"


def _seconds(
    asked: Inversion | Edits,
    inversion: Inversion,
    unet: UNet,
    shape: tuple[int, int],
    video: tuple[int, int],
    device: str,
    jobs: Iterable[Job],
) -> float | None:
    rates = timed_rates(jobs, inversion.model, device, unet, video)
    back = f"reconstruct {inversion.method}"
    if isinstance(asked, Edits):
        parts = [f"edit {method}" for method in asked.methods for _ in asked.prompts] + [back]
        parts += [f"invert {inversion.method}"] * _windows(asked)
    else:
        parts = [f"invert {inversion.method}"]
    if any(part not in rates for part in parts):
        return None
    operations = unet.operations(inversion.frames, shape[1], shape[0], inversion.method)
    return sum(rates[part] for part in parts) * operations * inversion.steps


def _windows(asked: Inversion | Edits) -> int:
    """The most inversions in windows that are made for edits."""
    return len(asked.prompts) if isinstance(asked, Edits) and asked.zoom else 0


def timed_rates(
    jobs: Iterable[Job], model: str, device: str, unet: UNet, video: tuple[int, int]
) -> dict[str, float]:
    """Seconds of an operation by the name of a part, of the last jobs of a model on a device.

    Args:
        jobs: Jobs, the oldest first.
        model: Name of the model.
        device: Name of the device, or "" for the default.
        unet: UNet of the model.
        video: Width and height in pixels of videos that a job does not name the size of.
    """
    found: dict[str, float] = {}
    for job in jobs:
        inversion = inversion_of(job.asked)
        if inversion is None or inversion.model != model or (job.device or "") != device:
            continue
        size = job.asked.get("video_size", video)
        width, height = shape_of(size[0], size[1], inversion.size, unet.factor)
        operations = unet.operations(inversion.frames, height, width, inversion.method)
        for step in job.timed():
            if step.done > step.before and operations:
                found[step.name] = step.seconds / (step.done - step.before) / operations
    return found


def inversion_of(asked: Mapping[str, Any]) -> Inversion | None:
    """The inversion that a job makes or starts from; None where the page did not ask for it.

    Args:
        asked: What was asked for, a job's `asked`.
    """
    record = asked if asked.get("kind") == "invert" else asked.get("source")
    if not isinstance(record, Mapping):
        return None
    return Inversion.of(record)


def shown_bytes(count: float) -> str:
    """A number of bytes, for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{max(1, count / _MIB):.0f} MiB"


def shown_seconds(seconds: float) -> str:
    """A time, for people."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
