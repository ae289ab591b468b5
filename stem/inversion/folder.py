"""An inversion on disk: its settings, and the latents of every timestep as they come.

    <method>-<hash of the settings>/
        settings.json               everything that shaped the latents
        x0.safetensors              the VAE's latents of the video
        steps/000-t0001.safetensors latents after step 0, at timestep 1
        bases/000-t0001.safetensors the bases of that step, where kept

Every file is written under another name and renamed, so a killed run leaves whole files only.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stem_kernels.ops.soft_em import SoftEM

SETTINGS = "settings.json"
X0 = "x0.safetensors"


class InversionError(ValueError):
    """A folder that holds no usable inversion."""


@dataclass(frozen=True)
class InversionFolder:
    """One inversion's folder.

    Args:
        path: the folder.
        settings: everything that shaped the latents, as JSON types.
        timesteps: ascending, one per step.
    """

    path: Path
    settings: dict[str, Any]
    timesteps: tuple[int, ...]

    @classmethod
    def prepare(
        cls, root: Path, settings: dict[str, Any], timesteps: tuple[int, ...]
    ) -> InversionFolder:
        """The folder of these settings below `root`, made if it is not there yet."""
        text = json.dumps({"settings": settings, "timesteps": timesteps}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        path = root / f"{settings['method']}-{digest}"
        (path / "steps").mkdir(parents=True, exist_ok=True)
        (path / "bases").mkdir(exist_ok=True)
        document = {"settings": settings, "timesteps": list(timesteps)}
        _replace(path / SETTINGS, json.dumps(document, indent=2, sort_keys=True).encode())
        return cls(path, settings, timesteps)

    @classmethod
    def open(cls, path: str | Path) -> InversionFolder:
        """An inversion written earlier.

        Raises:
            InversionError: there is none, or its settings cannot be read.
        """
        path = Path(path)
        file = path / SETTINGS
        if not file.is_file():
            raise InversionError(
                f"{path} holds no {SETTINGS}; name a folder that `stem invert` wrote, such as "
                "out/inversions/stem-0123456789ab"
            )
        try:
            document = json.loads(file.read_text())
            return cls(path, document["settings"], tuple(document["timesteps"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InversionError(f"{file} cannot be read ({error!r}); invert again") from error

    @property
    def complete(self) -> bool:
        """Whether everything that the settings ask for is there."""
        return self.has_x0() and self.steps_done == len(self.timesteps)

    @property
    def steps_done(self) -> int:
        """How many steps, from the first on, have their latents (and bases, where kept)."""
        for step in range(len(self.timesteps)):
            kept = not self.settings["keep_bases"] or self.has_bases(step)
            if not (self._step_file("steps", step).is_file() and kept):
                return step
        return len(self.timesteps)

    def save_x0(self, latents: torch.Tensor) -> None:
        """Keep the video's own latents, float32 [N, c, h, w]."""
        _save(self.path / X0, {"latents": latents})

    def has_x0(self) -> bool:
        """Whether the video's own latents are there."""
        return (self.path / X0).is_file()

    def x0(self) -> torch.Tensor:
        """The video's own latents, float32 [N, c, h, w]."""
        return _load(self.path / X0)["latents"]

    def save_latents(self, step: int, latents: torch.Tensor) -> None:
        """Keep the latents after `step`; they are at `timesteps[step]`."""
        _save(self._step_file("steps", step), {"latents": latents})

    def latents(self, step: int) -> torch.Tensor:
        """The latents after `step` (-1: the last), float32 [N, c, h, w]."""
        return _load(self._step_file("steps", step % len(self.timesteps)))["latents"]

    def save_bases(self, step: int, bases: dict[int, SoftEM]) -> None:
        """Keep the bases of every layer at `step`."""
        tensors = {
            f"{layer}.{name}": tensor
            for layer, found in bases.items()
            for name, tensor in found._asdict().items()
            if tensor is not None
        }
        _save(self._step_file("bases", step), tensors)

    def has_bases(self, step: int) -> bool:
        """Whether the bases of a step are there."""
        return self._step_file("bases", step).is_file()

    def bases(self, step: int) -> dict[int, SoftEM]:
        """The bases of every layer at `step`."""
        by_layer: dict[int, dict[str, torch.Tensor | None]] = {}
        for key, tensor in _load(self._step_file("bases", step)).items():
            layer, name = key.split(".")
            by_layer.setdefault(int(layer), {"payload": None})[name] = tensor
        return {layer: SoftEM(**parts) for layer, parts in by_layer.items()}  # type: ignore[arg-type]

    def drop_bases(self, step: int) -> None:
        """Remove the bases of a step that nothing needs any more."""
        self._step_file("bases", step).unlink(missing_ok=True)

    def _step_file(self, kind: str, step: int) -> Path:
        return self.path / kind / f"{step:03d}-t{self.timesteps[step]:04d}.safetensors"


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    partial = _partial(path)
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial)
    os.replace(partial, path)


def _replace(path: Path, data: bytes) -> None:
    partial = _partial(path)
    partial.write_bytes(data)
    os.replace(partial, path)


def _partial(path: Path) -> Path:
    # The process in the name: two runs of equal settings must not write into one file.
    return path.with_suffix(f".{os.getpid()}.partial")


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InversionError(
            f"{path} is missing; run the inversion again, it goes on where it stopped"
        ) from error
    except SafetensorError as error:
        raise InversionError(f"{path} is damaged ({error}); delete it and invert again") from error
