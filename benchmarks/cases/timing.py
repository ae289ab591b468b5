"""Seconds of a call: device events and a cold L2 on a GPU, the host's clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

MIN_ROUNDS = 5
MAX_ROUNDS = 200
LONG_SECONDS = 1.0  # a call as long as this needs no more warming up, and no cold cache
SHORT_SECONDS = 1e-3  # launching a call as short as this may take the host longer than the device
HIGHEST_HERTZ = 3e9  # no GPU's clock is higher, so that it sleeps long enough


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, the 20th and the 80th percentile of `rounds` calls."""

    median: float
    p20: float
    p80: float
    rounds: int


def time_call(
    work: Callable[[], object], graph: bool = False, *, device: torch.device, budget: float = 0.5
) -> Timing:
    """Time `work`, called over and over for about `budget` seconds, MIN_ROUNDS times or
    more; where it takes LONG_SECONDS or longer three times in all, by the host's clock.

    Before each call on a GPU a buffer of twice its L2 cache is written, which puts the inputs out
    of that cache. Before that the device sleeps where the call is short, until the host has
    launched all of it: what is measured is the device's time alone.

    Args:
        work: Call to time; it launches its kernels on the current stream.
        device: Device that they run on.
        budget: Seconds for all calls.
        graph: Whether a CUDA graph of one call is captured and its replays are timed: launch gaps
            count no more. Ignored on a CPU.
    """
    first = _synchronised(work, device)
    if first >= LONG_SECONDS:
        return summary([first, *(_synchronised(work, device) for _ in range(2))])
    if device.type != "cuda":
        return summary([_synchronised(work, device) for _ in range(_rounds(budget, first))])
    run = _captured(work) if graph else work
    _synchronised(run, device)
    seconds = _synchronised(run, device)
    rounds = _rounds(budget, seconds)
    cycles = int(2 * HIGHEST_HERTZ * seconds) if seconds < SHORT_SECONDS else 0
    flush = torch.empty(
        2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device
    )
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(rounds)
    ]
    for start, end in events:
        if cycles:
            torch.cuda._sleep(cycles)
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return summary([start.elapsed_time(end) / 1000 for start, end in events])


def _synchronised(work: Callable[[], object], device: torch.device) -> float:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _captured(work: Callable[[], object]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _rounds(budget: float, seconds: float) -> int:
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget / max(seconds, 1e-9))))


def summary(taken: Sequence[float]) -> Timing:
    """The timing of calls that took so many seconds each; two or more."""
    fifths = statistics.quantiles(taken, n=5, method="inclusive")
    return Timing(statistics.median(taken), fifths[0], fifths[3], len(taken))
