"""`python -m benchmarks.studies.small_cards`: memory of an edit by what spares it, on a CPU.

A pipeline of Stable Diffusion 1.5's shape with random weights, float32, is written to a folder.
Each way then has a process of its own, which loads the pipeline, inverts a video, edits it and
decodes it, and reads its own high-water marks. It takes some ten minutes of one core, 9 GB of disk
and up to 10 GB of memory. Writes `results/small-cards.json`, of which `python -m benchmarks.readme`
makes a table of docs/small-cards.md; ways that the file holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel

from stem import Video, edit, invert, load_pipeline
from stem.models import random_pipeline
from stem_kernels.info import provenance
from stem_kernels.measure import PeakMemory

from ... import records
from ...cases.processes import measured_apart
from ...cases.unets import sd15_unet

OUT = records.RESULTS / "small-cards.json"
FRAMES, PIXELS = 4, 128
STEPS = 1  # each step holds what the others do
OPTIONS = {"guided_until": 1.0}  # or the only step would have no guidance
PROMPTS = ("a red ball", "a blue ball")
NEEDS_GPU = "needs an accelerator"


def _nothing(pipeline: Any) -> None:
    pass


def _slices(pipeline: Any) -> None:
    pipeline.vae.enable_slicing()


def _stored(dtype: torch.dtype) -> Callable[[Any], None]:
    def apply(pipeline: Any) -> None:
        pipeline.unet.enable_layerwise_casting(dtype, torch.float32)
        # What stays float32 lies in the file of the weights, and keeps all of it mapped.
        for parameter in pipeline.unet.parameters():
            parameter.data = parameter.data.clone()

    return apply


@dataclass(frozen=True)
class Way:
    """A way of sparing memory.

    Args:
        offload: Argument of `load_pipeline`, or None.
        on_disk: Whether it is given a folder.
        apply: Function that is called with the loaded pipeline.
        measured: Whether a CPU can measure it.
    """

    offload: str | None = None
    on_disk: bool = False
    apply: Callable[[Any], None] = field(default=_nothing)
    measured: bool = True


WAYS = {
    "nothing": Way(),
    "`--offload group`": Way("group"),
    "`--offload group --offload-folder`": Way("group", True),
    "the same, and the VAE in slices": Way("group", True, _slices),
    "`enable_layerwise_casting`, float16": Way(apply=_stored(torch.float16)),
    "`enable_layerwise_casting`, float8_e4m3fn": Way(apply=_stored(torch.float8_e4m3fn)),
    "`--offload model`": Way("model", measured=False),
    "`--offload sequential`": Way("sequential", measured=False),
    "group offloading with streams; bitsandbytes": Way(measured=False),
}
"""By what the table calls them."""


def write_pipeline(folder: Path) -> None:
    """Write a pipeline of Stable Diffusion 1.5's shape, with random weights, to a folder."""
    parts = dict(random_pipeline().components)
    tokenizer = parts["tokenizer"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts["text_encoder"] = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        parts["vae"] = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        )
    parts["unet"] = sd15_unet()
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)


def measure_point(way: Way, model: Path, folder: Path) -> dict[str, int]:
    """Bytes of this process at its peaks, with a pipeline loaded and used in one way.

    Args:
        way: Way of sparing memory.
        model: Folder of the pipeline.
        folder: Empty folder, for the inversion and for weights on a disk.

    Returns:
        Peaks of the resident set: "loading", and "running", an inversion with an edit.

    Raises:
        OSError: this system does not tell a process's peak.
    """
    weights = folder / "weights" if way.on_disk else None
    # Not ru_maxrss, which begins with what the process that started this one held.
    with PeakMemory() as loaded:
        before = psutil.Process().memory_info().rss
        pipeline = load_pipeline(
            str(model), device="cpu", offload=way.offload, offload_folder=weights
        )
        way.apply(pipeline)
    generator = torch.Generator().manual_seed(1)
    shape = (FRAMES, PIXELS, PIXELS, 3)
    video = Video(torch.randint(256, shape, generator=generator, dtype=torch.uint8), Fraction(8))
    with PeakMemory() as memory:
        start = psutil.Process().memory_info().rss
        settings: dict[str, Any] = {"num_steps": STEPS, "chunk": None, "progress": False}
        inversion = invert(pipeline, video, PROMPTS[0], folder, **settings)
        edit(pipeline, inversion, PROMPTS[1], options=OPTIONS, progress=False)
    if loaded.extra_bytes is None or memory.extra_bytes is None:
        raise OSError("this system does not tell the peak of a process's resident set")
    return {"loading": before + loaded.extra_bytes, "running": start + memory.extra_bytes}


def run(out: Path, model: Path) -> dict[str, Any]:
    """Measure the ways that `out` does not hold yet, and write it after each.

    Args:
        out: File of the results.
        model: Folder that a pipeline is written to, where it is empty.

    Raises:
        SystemExit: the earlier ways are of another machine or setting.
    """
    where = provenance("diffusers", "transformers")
    commit = where.pop("commit")
    results: dict[str, Any] = {
        "frames": FRAMES,
        "pixels": PIXELS,
        "steps": STEPS,
        "provenance": where,
        "rows": {},
    }
    results = records.taken_up(out, results, ["rows"])
    missing = [name for name, way in WAYS.items() if way.measured and name not in results["rows"]]
    if missing and not any(model.iterdir()):
        write_pipeline(model)
    for name in missing:
        found = measured_apart("benchmarks.studies.small_cards", name, str(model))
        results["rows"][name] = {**found, "commit": commit}
        records.write(results, out)
        print(f"{name}: {found}", flush=True)
    return results


def table(results: Mapping[str, Any]) -> str:
    """The results in Markdown, their source at the end."""
    where, rows = results["provenance"], results["rows"]
    lines = ["| | MiB while loading | MiB while inverting and editing |", "|---|---|---|"]
    for name, way in WAYS.items():
        cells = [NEEDS_GPU, NEEDS_GPU]
        if way.measured:
            cells = [f"{rows[name][each] / 2**20:,.0f}" for each in ("loading", "running")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    commits = ", ".join(f"`{each}`" for each in dict.fromkeys(r["commit"] for r in rows.values()))
    lines += [
        "",
        "Peaks of a process's resident set: Python, its libraries and pages of files that are "
        "mapped are in it. Of weights that are cast, the parameters that stay float32 were copied, "
        "for they keep the whole file of the weights mapped. A model of Stable "
        f"Diffusion 1.5's shape, random float32 weights (4.0 GiB); {results['frames']} frames of "
        f"{results['pixels']}x{results['pixels']} pixels at once, {results['steps']} step, `stem` "
        f"and `fusion`. Source: [small-cards.json](benchmarks/results/small-cards.json) "
        f"({where['cpu']}, torch {where['versions']['torch']}, diffusers "
        f"{where['versions']['diffusers']}, commit {commits}).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--point", nargs=2, metavar=("WAY", "MODEL"), help="one way, printed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.point:
            name, model = arguments.point
            print(json.dumps(measure_point(WAYS[name], Path(model), Path(folder))))
        else:
            results = run(arguments.out, Path(folder))
            text = table(results).replace("](benchmarks/results/", "](")
            arguments.out.with_suffix(".md").write_text(f"# What spares memory\n\n{text}")
            print(text)


if __name__ == "__main__":
    main()
