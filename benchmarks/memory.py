"""Peak memory of one attention layer over the number of frames, and what holds it.

On a GPU the allocator's own record is replayed: every allocation and release of a forward pass,
with the Python line that asked for it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stem.inversion.methods import METHODS, attention_config
from stem_kernels.measure import PeakMemory

from .layers import layer, set_attention

FRAMES = (8, 16, 32, 64, 128, 256, 512)
LARGEST_INFLATED = 128  # beyond it the attention alone takes seconds; its memory grows as before
HOLDERS = 4
RECORDED_EVENTS = 100_000


@dataclass(frozen=True)
class Peak:
    """The peak of one forward pass.

    Args:
        method: of METHODS.
        frames: N.
        extra_bytes: above the input; None where `note` says why.
        holders: bytes at the peak by the line that allocated them, largest first; empty where
            the allocator keeps no record.
        note: why a figure is missing.
    """

    method: str
    frames: int
    extra_bytes: int | None
    holders: dict[str, int]
    note: str = ""


def profile(
    device: torch.device, dtype: torch.dtype, *, small: bool, frames: Iterable[int] = FRAMES
) -> list[Peak]:
    """Every method at every N, on a layer of SD 1.5's 64x64 tokens, or of 16x16 if `small`."""
    side, channels = (16, 64) if small else (64, 320)
    attention = layer(channels, device, dtype)
    peaks = []
    for count in frames:
        tokens = torch.randn(count, side * side, channels, device=device, dtype=dtype)
        for method in METHODS:
            peaks.append(_peak(attention, method, tokens))
            print(_line(peaks[-1]), flush=True)
        del tokens
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return peaks


def _peak(attention: Any, method: str, tokens: torch.Tensor) -> Peak:
    frames = tokens.shape[0]
    if method == "inflated" and tokens.is_cuda and frames > LARGEST_INFLATED:
        return Peak(method, frames, None, {}, "not measured: it would take many seconds")
    module = copy.deepcopy(attention)
    set_attention(module, attention_config(method, {}, frames))

    @torch.no_grad()
    def run() -> None:
        module(tokens)

    try:
        run()  # compiles what is to be compiled
        with PeakMemory(tokens.device) as memory:
            run()
    except (torch.OutOfMemoryError, MemoryError) as problem:
        return Peak(method, frames, None, {}, f"out of memory: {problem}"[:200])
    holders = recorded_holders(run, tokens.device) if tokens.is_cuda else {}
    return Peak(method, frames, memory.extra_bytes, holders)


def recorded_holders(run: Callable[[], None], device: torch.device) -> dict[str, int]:
    """What held the peak of `run` on a GPU; bytes by line of code, largest first."""
    torch.cuda.memory._record_memory_history(max_entries=RECORDED_EVENTS, stacks="python")
    try:
        run()
        torch.cuda.synchronize(device)
        snapshot = torch.cuda.memory._snapshot(device)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    index = torch.cuda.current_device() if device.index is None else device.index
    return holders_at_peak(snapshot["device_traces"][index])


def holders_at_peak(events: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Replay a record of allocations; the largest holders at the moment when most was held.

    Args:
        events: with "action" ("alloc", or "free_requested" for a release), "addr", "size" in
            bytes, and "frames", the innermost first, each with "filename" and "line".
    """
    held: dict[int, tuple[str, int]] = {}
    total = most = 0
    at_peak: list[tuple[str, int]] = []
    for event in events:
        if event["action"] == "alloc":
            held[event["addr"]] = (_place(event["frames"]), event["size"])
            total += event["size"]
            if total > most:
                most, at_peak = total, list(held.values())
        elif event["action"] == "free_requested" and event["addr"] in held:
            total -= held.pop(event["addr"])[1]
    by_place: Counter[str] = Counter()
    for place, size in at_peak:
        by_place[place] += size
    return dict(by_place.most_common(HOLDERS))


def _place(frames: Iterable[Mapping[str, Any]]) -> str:
    """The innermost line outside torch, as package/file.py:line."""
    for frame in frames:
        path = Path(frame["filename"])
        if path.suffix == ".py" and "torch" not in path.parts:
            return f"{path.parent.name}/{path.name}:{frame['line']}"
    return "elsewhere"


def _line(peak: Peak) -> str:
    if peak.extra_bytes is None:
        return f"memory     N={peak.frames:<4} {peak.method:10} {peak.note}"
    extra = f"{peak.extra_bytes / 2**20:.1f} MiB"
    held = ", ".join(f"{place} {size / 2**20:.0f}" for place, size in peak.holders.items())
    return f"memory     N={peak.frames:<4} {peak.method:10} {extra}  {held}"


def table(peaks: list[Peak]) -> str:
    """Markdown: MiB by method and N, then what holds the peak of the longest video."""
    counts = sorted({peak.frames for peak in peaks})
    found = {(peak.method, peak.frames): peak for peak in peaks}
    lines = ["| MiB | " + " | ".join(f"N={count}" for count in counts) + " |"]
    lines.append("|---" * (len(counts) + 1) + "|")
    for method in METHODS:
        cells = []
        for count in counts:
            extra = found[method, count].extra_bytes
            cells.append("not measured" if extra is None else f"{extra / 2**20:.0f}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    for method in METHODS:
        holders = next(
            (peak.holders for peak in reversed(peaks) if peak.method == method and peak.holders), {}
        )
        if holders:
            held = ", ".join(f"`{place}` {size / 2**20:.0f}" for place, size in holders.items())
            lines += ["", f"At its peak on the longest video {method} holds, in MiB: {held}."]
    return "\n".join(lines) + "\n"


def draw(peaks: list[Peak], path: Path) -> None:
    """Peak over N, both in powers of two."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in METHODS:
        known = [
            (peak.frames, peak.extra_bytes / 2**20)
            for peak in peaks
            if peak.method == method and peak.extra_bytes
        ]
        if known:
            axes.plot(*zip(*known, strict=True), "o-", label=method)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(title="One attention layer, above its input", xlabel="frames N", ylabel="peak MiB")
    axes.legend()
    figure.savefig(path, dpi=110)
