"""Several inversions of one video, side by side: a table, a contact sheet and a video."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stem_kernels.info import provenance
from stem_kernels.measure import PeakMemory

from .diffusion.pipeline import decode_latents, encode_prompt, execution_device, predict
from .inversion import InversionFolder, invert, reconstruct_latents
from .inversion.methods import attention_config
from .metrics import psnr, ssim
from .metrics.fidelity import SSIM_VARIANT
from .pictures import contact_sheet, side_by_side
from .video import Video, write_video


@dataclass(frozen=True)
class Row:
    """One method's figures.

    Args:
        method: its name; "vae" is the VAE's round trip without any diffusion, the ceiling.
        psnr: dB against the source frames.
        ssim: against the source frames.
        latent_error: |x - x0| / |x0| of the reconstructed latents x, free of the VAE's own loss.
        invert_seconds: of what this run did; None where a complete inversion was reused.
        reconstruct_seconds: of the sampling.
        peak_bytes: memory above the loaded model's; None where not measured.
        inversion: the folder.
    """

    method: str
    psnr: float
    ssim: float
    latent_error: float
    invert_seconds: float | None
    reconstruct_seconds: float | None
    peak_bytes: int | None
    inversion: str | None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found, and the files it wrote."""

    rows: list[Row]
    json: Path
    sheet: Path
    video: Path


def compare(
    pipeline: Any,
    video: Video,
    prompt: str,
    out: str | Path,
    methods: Sequence[str],
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    num_steps: int = 50,
    model: str = "",
    note: str = "",
    progress: bool = True,
) -> Comparison:
    """Invert and reconstruct a video by each method, and write compare.json, .png and .mp4.

    Args:
        pipeline: as for `invert`.
        video: the source.
        prompt: that describes it.
        out: folder of the three files; the inversions go to `out`/inversions and are reused.
        methods: names of METHODS.
        options: per method, fields of its configuration.
        num_steps: of each inversion and reconstruction.
        model: the pipeline's name, for the record.
        note: for compare.json, where the weights are random: says so, and so do the pictures.
        progress: show progress bars.

    Raises:
        ValueError: unknown methods or options, before anything is computed.
    """
    out = Path(out)
    options = options or {}
    _check(methods, options)
    _warm_up(pipeline)
    device = execution_device(pipeline)
    rows: list[Row] = []
    reconstructions: dict[str, torch.Tensor] = {}
    for method in methods:
        memory = PeakMemory(device)
        with memory:
            inversion, invert_seconds = _inverted(
                pipeline,
                video,
                prompt,
                out / "inversions",
                method=method,
                options=options.get(method),
                num_steps=num_steps,
                model=model,
                progress=progress,
            )
            start = time.perf_counter()
            latents = reconstruct_latents(pipeline, inversion, progress=progress)
            _synchronize(device)
            reconstruct_seconds = time.perf_counter() - start
        x0 = inversion.x0()
        if not rows:
            reconstructions["vae"] = decode_latents(pipeline, x0.to(device))
            rows.append(_row("vae", reconstructions["vae"], video.frames, 0.0))
        reconstructions[method] = decode_latents(pipeline, latents)
        error = float((latents.cpu() - x0).norm() / x0.norm())
        rows.append(
            dataclasses.replace(
                _row(method, reconstructions[method], video.frames, error),
                invert_seconds=invert_seconds,
                reconstruct_seconds=reconstruct_seconds,
                peak_bytes=memory.extra_bytes,
                inversion=str(inversion.path),
            )
        )
    result = Comparison(rows, out / "compare.json", out / "compare.png", out / "compare.mp4")
    # Without a word on the pictures, noise from random weights would look like a failure.
    suffix = ", random weights" if note else ""
    videos = {"source": video.frames}
    for label, frames in reconstructions.items():
        videos[("vae alone" if label == "vae" else label) + suffix] = frames
    contact_sheet(videos).save(result.sheet)
    write_video(result.video, torch.stack(list(side_by_side(videos))), video.fps)
    document = {
        "note": note,
        "model": model,
        "prompt": prompt,
        "num_steps": num_steps,
        "options": {method: dict(options.get(method, {})) for method in methods},
        "video": {
            "frames": video.frames.shape[0],
            "width": video.frames.shape[2],
            "height": video.frames.shape[1],
            "fps": str(video.fps),
            "notes": list(video.notes),
        },
        "ssim_variant": SSIM_VARIANT,
        "peak_memory": PeakMemory(device).what,
        "device": device.type,
        "provenance": provenance("diffusers"),
        "rows": [_finite(dataclasses.asdict(row)) for row in rows],
    }
    result.json.write_text(json.dumps(document, indent=2) + "\n")
    return result


def _check(methods: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> None:
    if not methods:
        raise ValueError("no methods to compare; name at least one")
    for method in methods:
        attention_config(method, options.get(method, {}), num_frames=1)
    for method in options:
        if method not in methods:
            raise ValueError(f"there are options for {method}, which is not among the methods")


def _warm_up(pipeline: Any) -> None:
    """One small call of the UNet, so that the first method does not pay for one-time set-up."""
    unet, size = pipeline.unet, 16
    latents = torch.zeros(1, unet.config.in_channels, size, size, device=execution_device(pipeline))
    conditioning = encode_prompt(pipeline, "", size, size)
    predict(pipeline, latents, torch.ones((), dtype=torch.int64), conditioning)


def _inverted(
    pipeline: Any, video: Video, prompt: str, root: Path, **settings: Any
) -> tuple[InversionFolder, float | None]:
    worked = False

    def note_work() -> None:
        nonlocal worked
        worked = True

    start = time.perf_counter()
    inversion = invert(pipeline, video, prompt, root, on_step=note_work, **settings)
    _synchronize(execution_device(pipeline))
    return inversion, time.perf_counter() - start if worked else None


def _row(method: str, frames: torch.Tensor, source: torch.Tensor, latent_error: float) -> Row:
    return Row(
        method, psnr(frames, source), ssim(frames, source), latent_error, None, None, None, None
    )


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity; an exact reconstruction's PSNR becomes the text "inf"."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
