"""Kernels that one self-attention launches, and what launching them costs the CPU; without a GPU.

`python -m benchmarks.counting.launch_counts` counts the kernels of a 64x64 layer of SD 1.x,
Triton's and torch's, on tensors without data, and times the layer with a driver that launches
nothing. It writes benchmarks/results/launches.json and .md; with `--before` the figures are kept
beside later runs'.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from stem.config import StemConfig
from stem_kernels.info import provenance
from stem_kernels.triton.em import wide
from stem_kernels.triton.registration import functions

from .. import records
from ..cases.layers import layer, of_frames, set_attention
from .launches import absent_gpu, recorded

OUT = records.RESULTS / "launches.json"
ARCH = 90
SIDE, CHANNELS = 64, 320
FRAMES = (8, 32)
ITERATIONS = (1, 2, 5)
ALL_TOKENS = "all tokens"
FORMS: dict[str, dict[str, Any]] = {
    ALL_TOKENS: {"sample_per_base": None, "calibration": "none"},
    "22 a base": {"sample_per_base": 22, "calibration": "none"},
    "22 a base, moments": {"sample_per_base": 22, "calibration": "moments"},
}
PROJECTIONS = ("mm", "addmm")
WITHOUT_A_KERNEL = (
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"
)  # fmt: skip
ROUNDS, CALLS = 8, 60


class TorchKernels(TorchDispatchMode):
    """Counts the operators of torch that would launch a kernel on a GPU, each as one.

    Attributes:
        found: Numbers of them by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in functions:
            with self:
                return functions[func](*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_view = any(
            result.alias_info is not None and not result.alias_info.is_write
            for result in func._schema.returns
        )
        answer = func(*args, **(kwargs or {}))
        made = isinstance(answer, torch.Tensor) and answer.numel() > 0
        # Tensor.to is listed as a view, which it is not where it converts.
        is_view = is_view and answer.dtype == args[0].dtype
        if made and not is_view and name not in WITHOUT_A_KERNEL:
            self.found[name] += 1
        return answer


def kernels(config: StemConfig, frames: int, side: int, channels: int) -> Counter[str]:
    """The kernels of one layer in half precision by name; nothing is compiled or computed.

    Args:
        config: Configuration of the layer, with the backend "triton".
        frames: Number of frames of the video.
        side: Height and width of a frame in tokens.
        channels: Number of channels of the layer.
    """
    module = layer(channels, torch.device("meta"), torch.float16)
    set_attention(module, of_frames(config, frames))
    tokens = torch.empty(frames, side * side, channels, dtype=torch.float16, device="meta")
    with torch.no_grad():
        with recorded(ARCH):
            module(tokens)  # the first call also makes what later ones keep
        with recorded(ARCH) as launches, TorchKernels() as of_torch:
            module(tokens)
    return Counter(f"triton {launch.name}" for launch in launches) + of_torch.found


class SilentDriver:
    """Stands for CUDA's: kernels are compiled for sm_90, and launched nowhere."""

    class utils:
        @staticmethod
        def load_binary(*arguments: Any) -> tuple[int, int, int, int, int]:
            return 1, 1, 64, 0, 1024

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448}

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)


class _Projection(torch.nn.Module):
    """A projection that computes nothing."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.new_empty(tokens.shape)


def host_microseconds(config: StemConfig) -> float:
    """Time that the CPU takes for a layer's processor, launching nothing: least median of rounds.

    The projections compute nothing, and diffusers' own module around the processor is left out.

    On tensors so small that what torch itself computes, on the CPU here, takes little of it: 256
    tokens, in two chunks as N = 32 frames have, and 16 bases.
    """
    config = replace(config, num_bases=16, num_frames=4)
    module = layer(CHANNELS, torch.device("cpu"), torch.float16)
    set_attention(module, config)
    module.to_q = module.to_k = module.to_v = module.to_out[0] = _Projection()
    tokens = torch.randn(4, 64, CHANNELS).half()
    chunk = mock.patch.object(wide, "LARGEST_CHUNK_BYTES", 128 * 2 * config.num_bases)
    medians = []
    with torch.no_grad(), absent_gpu(ARCH, SilentDriver()), chunk:
        for _ in range(ROUNDS):
            seconds = []
            for _ in range(CALLS):
                start = time.perf_counter()
                module.processor(module, tokens)
                seconds.append(time.perf_counter() - start)
            medians.append(statistics.median(seconds))
    return 1e6 * min(medians)


def row(form: str, num_iters: int, frames: int) -> dict[str, Any]:
    """What is counted of one layer; host times are of two chunks, as N = 32 has."""
    config = StemConfig(num_iters=num_iters, backend="triton", **FORMS[form])
    found = kernels(config, frames, SIDE, CHANNELS)
    projections = sum(found[name] for name in PROJECTIONS)
    timed = form == ALL_TOKENS and frames == max(FRAMES)
    return {
        "form": form,
        "iterations": num_iters,
        "frames": frames,
        "kernels": found.total() - projections,
        "triton": sum(found[name] for name in found if name.startswith("triton")),
        "projections": projections,
        "host_us": round(host_microseconds(config)) if timed else None,
        "by_name": dict(sorted(found.items())),
    }


def text(results: dict[str, Any]) -> str:
    """The table in Markdown."""
    lines = [
        "Counted with a mocked driver, no GPU: kernels of one 64x64 self-attention of SD 1.5 "
        "(C = 320, 8 heads, half precision, feature space, K = 256, EM from tokens; 4 projections, "
        "7 with moments), for Triton's tiles of sm_90; host time of the same layer "
        "without projections, which launches nothing, on one thread. Written by `python -m "
        "benchmarks.counting.launch_counts`.",
        "",
        "| | | R | N | kernels | of these Triton's | with the projections | host us |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for when in ("before", "now"):
        for row in results.get(when, {"rows": []})["rows"]:
            total, form = row["kernels"] + row["projections"], row.get("form", ALL_TOKENS)
            lines.append(
                f"| {when} | {form} | {row['iterations']} | {row['frames']} | {row['kernels']} "
                f"| {row['triton']} | {total} | {row['host_us'] or ''} |"
            )
    return "\n".join(lines) + "\n"


def main(
    before: Annotated[bool, typer.Option(help="Keep these figures beside later ones.")] = False,
) -> None:
    """Count, time, and write the table."""
    torch.set_num_threads(1)
    rows = [
        row(form, num_iters, frames)
        for form in FORMS
        for frames in FRAMES
        for num_iters in ITERATIONS
    ]
    results = records.read(OUT) if OUT.is_file() else {}
    results["before" if before else "now"] = {"provenance": provenance(), "rows": rows}
    records.write(results, OUT)
    OUT.with_suffix(".md").write_text(text(results))
    print(text(results))


if __name__ == "__main__":
    typer.run(main)
