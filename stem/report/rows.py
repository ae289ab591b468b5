"""Figures of results, a row each: measured by workflows, written to documents, shown."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Row:
    """One method's figures.

    Args:
        method: Name of the method; "vae" is the VAE's round trip without any diffusion, the
            ceiling.
        psnr: PSNR in dB against the source frames.
        ssim: SSIM against the source frames.
        latent_error: Relative error |x - x0| / |x0| of the reconstructed latents x, free of the
            VAE's own loss.
        invert_seconds: Seconds of the inversion; None where steps of an earlier run were reused.
        reconstruct_seconds: Seconds of the sampling; None as above.
        peak_bytes: Memory above the loaded model's; None as above, or where it is not measured.
        inversion: Path of the inversion's folder; None for "vae".
    """

    method: str
    psnr: float
    ssim: float
    latent_error: float
    invert_seconds: float | None = None
    reconstruct_seconds: float | None = None
    peak_bytes: int | None = None
    inversion: str | None = None


@dataclass(frozen=True)
class Measured:
    """What `measure` found.

    Args:
        rows: Figures, "vae" first, then one row a method.
        reconstructions: Frames by method, uint8 [N, H, W, 3], "vae" first.
        device: Type of the device that it ran on.
        memory: Name of the quantity in `peak_bytes`.
        worked: Whether any step was done; False where all is of earlier runs.
    """

    rows: list[Row]
    reconstructions: dict[str, torch.Tensor]
    device: str
    memory: str
    worked: bool


@dataclass(frozen=True)
class AblationRow:
    """One option's one value: the video inverted and reconstructed with it.

    Args:
        option: Name of the option, a key of OPTIONS.
        value: Name of the value.
        config: Fields of the whole configuration.
        is_base: Whether this is the configuration that the others are changes of.
        psnr: PSNR in dB against the source frames.
        ssim: SSIM against the source frames.
        latent_error: Relative error |x - x0| / |x0| of the reconstructed latents.
        seconds: Seconds of the inversion and the way back.
        peak_bytes: Memory above the start; None where it is not measured.
    """

    option: str
    value: str
    config: dict[str, Any]
    is_base: bool
    psnr: float
    ssim: float
    latent_error: float
    seconds: float
    peak_bytes: int | None


def read_ablation(path: Path) -> dict[tuple[str, str], AblationRow]:
    """The rows of an earlier run by option and value; none where there is no file.

    Raises:
        ValueError: the file is not what `ablate` writes.
    """
    if not path.is_file():
        return {}
    try:
        rows = [AblationRow(**row) for row in json.loads(path.read_text())["rows"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to measure again") from error
    # JSON has no infinity; `write_json` writes the text "inf".
    rows = [dataclasses.replace(row, psnr=float(row.psnr)) for row in rows]
    return {(row.option, row.value): row for row in rows}
