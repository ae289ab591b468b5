"""Peak memory of one attention layer over the number of frames, and what holds it.

On a GPU the allocator's own record is replayed: every allocation and release of a forward pass,
with the Python line that asked for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stem_kernels.measure import PeakMemory

from .bench import Examination
from .case import AnyCase, Call, Contender, UnavailableError, finite
from .layers import ALL_FRAME, LayerInputs, layer_case
from .memory_report import KINDS

FRAMES = (8, 16, 32, 64, 128, 256, 512)
LARGEST_ALL_FRAME = 64  # beyond it the attention alone takes seconds; its memory grows as before
LARGEST_CHECKED = 32  # float64 takes four times the memory, and the code is the same beyond
HOLDERS = 4
RECORDED_EVENTS = 100_000


def cases(device: torch.device, dtype: torch.dtype, *, small: bool) -> Iterator[AnyCase]:
    """A layer of SD 1.5's 64x64 tokens, or, if `small`, of 16x16, at every N.

    Answers are checked against float64 up to LARGEST_CHECKED frames; beyond they need be finite.
    """
    side, channels = (16, 64) if small else (64, 320)
    for frames in FRAMES[:2] if small else FRAMES:
        case = layer_case(frames, side, channels, device, dtype, KINDS)
        contenders = dict(case.contenders)
        if frames > LARGEST_CHECKED:
            contenders = {name: replace(each, check=finite) for name, each in contenders.items()}
        if frames > LARGEST_ALL_FRAME:
            contenders[ALL_FRAME] = Contender(too_long)
        yield replace(case, name=f"memory N={frames}", contenders=contenders)


def too_long(inputs: LayerInputs) -> Call:
    """Refuse to measure."""
    raise UnavailableError("not measured: it would take many seconds")


def peak(device: torch.device) -> Examination:
    """The memory of a call above its inputs, and on a GPU what held it."""

    def examine(case: AnyCase, call: Call) -> dict[str, Any]:
        with PeakMemory(device) as memory:
            call()
        if memory.extra_bytes is None:
            raise UnavailableError("this system does not report the peak of the resident set")
        held = recorded_holders(call, device) if device.type == "cuda" else {}
        text = ", ".join(f"{place} {size / 2**20:.0f}" for place, size in held.items())
        return {"extra_bytes": memory.extra_bytes, "holders": text}

    return examine


def recorded_holders(run: Callable[[], object], device: torch.device) -> dict[str, int]:
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
        events: Records with "action" ("alloc", or "free_requested" for a release), "addr", "size"
            in bytes, and "frames", the innermost first, each with "filename" and "line".
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
