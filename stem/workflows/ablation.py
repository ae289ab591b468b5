"""STEM's options changed one at a time on a video of one's own: what each of them is worth."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stem_kernels.info import provenance
from stem_kernels.measure import PeakMemory

from ..config import StemConfig
from ..diffusion.checks import check_pipeline
from ..diffusion.control import check_uncontrolled
from ..diffusion.fingerprint import fingerprint
from ..diffusion.motion import check_without_motion
from ..diffusion.pipeline import decode_latents, encode_frames, execution_device
from ..diffusion.schedule import inverse_scheduler
from ..inversion.inverting import check_chunk
from ..inversion.round_trips import chunked, round_trip
from ..metrics import psnr, ssim
from ..metrics.fidelity import SSIM_VARIANT
from ..progress import steps
from ..report.ablation_files import ablation_files, write_plot
from ..report.files import write_json, write_with_hashes
from ..report.rows import AblationRow, read_ablation
from ..storage import check_output, remove_stale, tensor_hash
from ..video import Video
from .ablation_plan import OPTIONS, base_config, fields_of, in_order, variants_of
from .comparison import result_name
from .measuring import check_measurable, warm_up


@dataclass(frozen=True)
class Ablation:
    """What `ablate` found, and the files it wrote.

    Args:
        rows: Figures of the options asked for, in the order of OPTIONS.
        memory: Name of the quantity in `peak_bytes`.
        json: Path of the figures' file, which holds those of earlier runs, too.
        plot: Path of the plot.
    """

    rows: list[AblationRow]
    memory: str
    json: Path
    plot: Path


def ablate(
    pipeline: Any,
    video: Video,
    prompt: str,
    out: str | Path,
    only: Sequence[str] = tuple(OPTIONS),
    *,
    form: str = "defaults",
    options: Mapping[str, Any] | None = None,
    num_steps: int = 50,
    chunk: int | str | None = "auto",
    model: str | Mapping[str, Any] = "",
    note: str = "",
    progress: bool = True,
) -> Ablation:
    """Invert and reconstruct a video with STEM's options changed one at a time.

    It writes ablation.png, and after every configuration ablation.json, so that an interrupted run
    goes on after the last configuration. Equal configurations are measured once. The time of each
    is measured once, so run nothing else meanwhile.

    Args:
        pipeline: Pipeline, as for `invert`.
        video: Video to invert.
        prompt: Prompt that describes it.
        out: Folder below which the two files get a folder of their own. Its name depends on the
            video, the machine and everything else that the figures depend on.
        only: Names of OPTIONS to change.
        form: Configuration that the options are changed from, a key of FORMS. With "defaults" no
            base is ever empty, so that all values of "empty" give the same figures; use "paper" to
            compare them.
        options: Fields of StemConfig that differ from that form; a value that is compared may set
            them again.
        num_steps: Number of steps of each inversion and of each reconstruction.
        chunk: Number of frames that go through the UNet at once, as for `invert`.
        model: Name of the pipeline, for the record, or more, as for `invert`.
        note: Note for ablation.json, such as that the weights are random.
        progress: Whether to show progress.

    Raises:
        ValueError: an option or form does not exist, the frames are too small for SSIM, a file of
            an earlier run cannot be read, or the pipeline or number of steps cannot be inverted. It
            is raised before anything is computed.
        OSError: `out` cannot be written.
    """
    out = Path(out)
    check_output(out)
    check_measurable(video, ["stem"], {})
    check_pipeline(pipeline)
    check_uncontrolled(pipeline, "ablate")
    check_without_motion(pipeline, "ablate")
    inverse_scheduler(pipeline, num_steps)
    check_chunk(chunk)
    base = base_config(form, options or {}, video.num_frames)
    variants = variants_of(base, only)
    device = execution_device(pipeline)
    memory = PeakMemory(device).what
    settings = {
        "note": note,
        "model": model,
        "prompt": prompt,
        "num_steps": num_steps,
        "chunk": chunk,
        "base": fields_of(base),
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "device": device.type,
        "ssim_variant": SSIM_VARIANT,
        "peak_memory": memory,
        "provenance": provenance("diffusers"),
    }
    parts = [json.dumps(settings), repr(fingerprint(pipeline)), tensor_hash(video.frames)]
    folder = out / result_name(video.name, parts)
    figures, plot = ablation_files(folder)
    rows = read_ablation(figures)
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale(folder)
    latents = encode_frames(pipeline, video.frames)
    warm_up(pipeline)
    with steps(len(variants), name="ablate", show=progress) as shown:
        for (option, value), config in variants.items():
            if (option, value) not in rows:
                fields = fields_of(config)
                row = next((row for row in rows.values() if row.config == fields), None)
                if row is None:
                    figures_of_config = measure_config(
                        pipeline, video, latents, prompt, config, num_steps, chunk
                    )
                    is_base = fields == fields_of(base)
                    row = AblationRow(option, value, fields, is_base, **figures_of_config)
                rows[option, value] = dataclasses.replace(row, option=option, value=value)
                write_json(figures, _document(settings, video, rows))
            shown.update()
    document = _document(settings, video, rows)
    write_plot(plot, document["rows"])
    write_with_hashes(figures, document, (plot,))
    return Ablation([rows[key] for key in variants], memory, figures, plot)


def measure_config(
    pipeline: Any,
    video: Video,
    latents: torch.Tensor,
    prompt: str,
    config: StemConfig,
    num_steps: int,
    chunk: int | str | None,
) -> dict[str, Any]:
    """The figures of one configuration: a video there and back, by name as in `AblationRow`.

    Args:
        pipeline: Pipeline, as for `invert`.
        video: Video to invert.
        latents: Latents of its frames, float32 [N, c, h, w], from `encode_frames`.
        prompt: Prompt that describes it.
        config: Configuration of the attention.
        num_steps: Number of steps of the inversion, and of the way back.
        chunk: Number of frames that go through the UNet at once, as for `invert`.
    """
    config_of_video = chunked(pipeline, config, latents, chunk)
    with PeakMemory(latents.device) as memory:
        start = time.perf_counter()
        back = round_trip(pipeline, latents, prompt, num_steps, config_of_video)
        if back.device.type == "cuda":
            torch.cuda.synchronize(back.device)
        seconds = time.perf_counter() - start
    decoded = decode_latents(pipeline, back)
    return {
        "psnr": psnr(decoded, video.frames),
        "ssim": ssim(decoded, video.frames),
        "latent_error": float((back - latents).norm() / latents.norm()),
        "seconds": seconds,
        "peak_bytes": memory.extra_bytes,
    }


def _document(
    settings: Mapping[str, Any], video: Video, rows: Mapping[tuple[str, str], AblationRow]
) -> dict[str, Any]:
    return {
        **settings,
        "video": {"name": video.name, "frames": list(video.frames.shape)},
        "rows": [dataclasses.asdict(rows[key]) for key in in_order(rows)],
    }
