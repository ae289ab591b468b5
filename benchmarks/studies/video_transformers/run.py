"""`python -m benchmarks.studies.video_transformers`: a layer's error and CPU time beside SDPA's.

Some five minutes on one core. Writes `results/video-transformers.json` and `.png`, of which
`python -m benchmarks.readme` makes the tables of docs/video-transformers.md.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import interpolate, scaled_dot_product_attention

from stem_kernels import basis_attention
from stem_kernels.info import provenance
from stem_kernels.video import (
    merged_attention,
    placed_attention,
    video_attention,
    video_bases,
    window_attention,
)

from ... import records
from .forms import window_flops

OUT = records.RESULTS / "video-transformers.json"
SIDE, HEADS, DIM = 16, 4, 64
FRAMES = 16
DETAIL = 4
TOKENS_PER_BASE, WINDOW = 64, 2
TIMED_FRAMES = (2, 4, 8, 16, 32)
TIMED_HEADS = 2
ROUNDS = 9

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Grid = tuple[int, int, int]


def moving(speed: float, sharpness: float = 1.0, frames: int = FRAMES) -> Layer:
    """Query, key and value [1, h, n, d] of a smooth map that moves, rotated by frame, row, column.

    The map of features is random at every `DETAIL`-th place and bicubic in between, and each
    frame shows it `speed` places further on; a tenth of the features' variance is noise.

    Args:
        speed: Places that the map moves in a frame, to the right.
        sharpness: Factor of the logits.
        frames: Number of frames.
    """
    generator = torch.Generator().manual_seed(0)
    channels = HEADS * DIM
    beyond = math.ceil(speed * frames / DETAIL) * DETAIL
    coarse = torch.randn(
        1, channels, SIDE // DETAIL, (SIDE + beyond) // DETAIL, generator=generator
    )
    fine = interpolate(coarse, size=(SIDE, SIDE + beyond), mode="bicubic")[0]
    starts = [round(speed * frame) for frame in range(frames)]
    shown = torch.stack([fine[:, :, start : start + SIDE] for start in starts], 1)
    features = shown.flatten(1).mT / shown.std()
    features = features + torch.randn(features.shape, generator=generator) / 3
    weights = torch.randn(3, channels, channels, generator=generator) / channels**0.5
    # A query is like the key of its own features, in part.
    weights[0] = (weights[0] + weights[1]) / 2**0.5
    query, key, value = (features @ weights).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
    query, key = (rotated(part, (frames, SIDE, SIDE)) for part in (query, key))
    return sharpness * query[None], key[None], value[None]


def rotated(tensor: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Tokens [h, n, d] with pairs of channels turned by frame, row and column, as in Wan."""
    place = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).flatten(0, 2)
    pairs = tensor.shape[-1] // 2
    sizes = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    angles = torch.cat(
        [
            place[:, axis, None] / 10_000 ** (torch.arange(size) / size)
            for axis, size in enumerate(sizes)
        ],
        -1,
    )
    turn = torch.polar(torch.ones_like(angles), angles)
    turned = torch.view_as_complex(tensor.unflatten(-1, (-1, 2)).contiguous()) * turn
    return torch.view_as_real(turned).flatten(-2)


def unlike() -> Layer:
    """Standard normal query, key and value."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, HEADS, FRAMES * SIDE**2, DIM, generator=generator)
    return query, key, value


KINDS: dict[str, Callable[[], Layer]] = {
    "a still map": partial(moving, 0.0),
    "half a place a frame": partial(moving, 0.5),
    "two places a frame": partial(moving, 2.0),
    "half a place a frame, logits x 2": partial(moving, 0.5, 2.0),
    "half a place a frame, logits x 4": partial(moving, 0.5, 4.0),
    "half a place a frame, logits x 8": partial(moving, 0.5, 8.0),
    "every key unlike all others": unlike,
}
"""What attention is tried on, by what the tables call it."""


def bases_alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention to the bases of all tokens, without a window."""
    bases = video_bases(key, value, _bases(key, TOKENS_PER_BASE))
    total = torch.nn.functional.one_hot(bases.assignment, bases.key.shape[2]).sum(2)
    return basis_attention(query, bases.key, bases.value, bias=total.float().log())


def window_alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention to the window, without bases."""
    return window_attention(query, key, value, _grid(key)).output


def whole_bases(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The window and bases that keep the mean value of all of their tokens."""
    bases = video_bases(key, value, _bases(key, TOKENS_PER_BASE))
    bias = bases.bias(_grid(key), WINDOW)
    parts = [
        window_attention(query, key, value, _grid(key)),
        placed_attention(query, bases.key, bases.value, bias=bias, matrix=bases.moments),
    ]
    return merged_attention(parts).output


def by_video_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, per_base: int, **options: Any
) -> torch.Tensor:
    """`video_attention` with so many tokens a base."""
    num_bases = _bases(key, per_base)
    return video_attention(query, key, value, _grid(key), num_bases=num_bases, **options)


FORMS: dict[str, Callable[..., torch.Tensor]] = {
    "bases alone": bases_alone,
    "window alone": window_alone,
    "defaults": partial(by_video_attention, per_base=TOKENS_PER_BASE),
    "no moments": partial(by_video_attention, per_base=TOKENS_PER_BASE, correction="none"),
    "own place only": partial(by_video_attention, per_base=TOKENS_PER_BASE, window=0),
    "no EM": partial(by_video_attention, per_base=TOKENS_PER_BASE, num_iters=0),
    "EM on all keys": partial(by_video_attention, per_base=TOKENS_PER_BASE, sample_per_base=None),
    "whole values": whole_bases,
    "128 a base": partial(by_video_attention, per_base=128),
    "16 a base": partial(by_video_attention, per_base=16),
}
"""What is compared, by what the tables call it."""


def flops_share(
    frames: int, *, per_base: int, window: int = WINDOW, num_iters: int = 2, moments: bool = True
) -> float:
    """FLOPs of `video_attention`'s matrix products over those of exact attention, of one head.

    Windows are counted as they are at the edges of the picture, smaller.
    """
    tokens = frames * SIDE**2
    bases = math.ceil(tokens / per_base)
    read = min(tokens, 8 * bases)
    counted = 4 * DIM * tokens**2 * window_flops((frames, SIDE, SIDE), window)
    counted += 4 * DIM * tokens * bases
    counted += 4 * num_iters * read * bases * DIM + 2 * tokens * bases * DIM
    counted += 8 * tokens * DIM**2 if moments else 0
    return counted / (4 * tokens**2 * DIM)


def measure() -> dict[str, Any]:
    """All figures: errors by kind of layer, and CPU seconds by number of tokens."""
    errors: dict[str, dict[str, float]] = {}
    for kind, make in KINDS.items():
        layer = make()
        exact = scaled_dot_product_attention(*layer)
        errors[kind] = {
            form: float((attention(*layer) - exact).norm() / exact.norm())
            for form, attention in FORMS.items()
        }
        print(kind, errors[kind], flush=True)
    seconds: dict[str, dict[str, float]] = {}
    for frames in TIMED_FRAMES:
        tokens = frames * SIDE**2
        found = _seconds(tuple(part[:, :TIMED_HEADS] for part in moving(0.5, frames=frames)))
        share = flops_share(frames, per_base=TOKENS_PER_BASE)
        seconds[str(tokens)] = {**found, "flops": share}
        print(tokens, seconds[str(tokens)], flush=True)
    return {
        "frames": FRAMES,
        "side": SIDE,
        "heads": HEADS,
        "dim": DIM,
        "timed_heads": TIMED_HEADS,
        "provenance": provenance(),
        "errors": errors,
        "seconds": seconds,
    }


def _seconds(layer: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """CPU seconds of one thread, the least of all rounds, both attentions in turn.

    What else the machine does only adds to them.
    """
    compared: dict[str, Callable[..., torch.Tensor]] = {
        "sdpa": scaled_dot_product_attention,
        "video": FORMS["defaults"],
    }
    taken: dict[str, list[float]] = {name: [] for name in compared}
    for _ in range(1 + ROUNDS):
        for name, attention in compared.items():
            begin = time.process_time()
            attention(*layer)
            taken[name].append(time.process_time() - begin)
    return {name: min(times[1:]) for name, times in taken.items()}


def crossover(seconds: dict[str, dict[str, float]]) -> float | None:
    """Number of tokens at which both take as long, between two that were measured; None: none."""
    rows = [(int(tokens), row["video"] / row["sdpa"]) for tokens, row in seconds.items()]
    for (fewer, above), (more, below) in itertools.pairwise(rows):
        if above > 1 >= below:
            part = math.log(above) / math.log(above / below)
            return fewer * (more / fewer) ** part
    return None


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the CPU time over the number of tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    tokens = [int(count) for count in results["seconds"]]
    for name, label in (("sdpa", "SDPA"), ("video", "window, bases and moments")):
        times = [1000 * row[name] / results["timed_heads"] for row in results["seconds"].values()]
        axes.plot(tokens, times, marker="o", label=label)
    meeting = crossover(results["seconds"])
    if meeting is not None:
        axes.axvline(meeting, color="grey", linestyle=":", label=f"{meeting:.0f} tokens")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens",
        ylabel="milliseconds of CPU time a head",
        xticks=tokens,
        xticklabels=[str(count) for count in tokens],
    )
    axes.tick_params(axis="x", which="minor", labelbottom=False)  # they overlap the others
    axes.legend()
    figure.savefig(path)


def table(results: dict[str, Any]) -> str:
    """The Markdown of the errors and of the times."""
    where, path = results["provenance"], f"benchmarks/results/{OUT.name}"
    meeting = crossover(results["seconds"])
    lines = [
        f"Source: [{path}]({path}) ({where['cpu']}, {where['threads']} thread, "
        f"torch {where['versions']['torch']}, commit `{where['commit']}`). One layer of "
        f"{results['heads']} heads of {results['dim']} channels, {results['frames']} frames of "
        f"{results['side']}x{results['side']} tokens, float32. Query, key and value are "
        f"projections of a map that is random at every {DETAIL}th place, bicubic in between, and "
        "moves, with a tenth of noise; no trained model. Everything at its default but for what "
        "the column names. Times are the least of some rounds.",
        "",
        f"| off SDPA | {' | '.join(FORMS)} |",
        "|---" * (1 + len(FORMS)) + "|",
    ]
    for kind, row in results["errors"].items():
        lines.append(f"| {kind} | {' | '.join(_percent(row[form]) for form in FORMS)} |")
    lines += [
        "",
        "| tokens | SDPA, ms a head | defaults, ms a head | of SDPA's | of its FLOPs |",
        "|---|---|---|---|---|",
    ]
    for tokens, row in results["seconds"].items():
        times = [1000 * row[name] / results["timed_heads"] for name in ("sdpa", "video")]
        lines.append(
            f"| {tokens} | {times[0]:.1f} | {times[1]:.1f} | {row['video'] / row['sdpa']:.2f} | "
            f"{_percent(row['flops'])} |"
        )
    if meeting is not None:
        lines += ["", f"Both take equally long at some {round(meeting, -2):.0f} tokens."]
    return "\n".join(lines) + "\n"


def _grid(tokens: torch.Tensor) -> Grid:
    return tokens.shape[2] // SIDE**2, SIDE, SIDE


def _bases(tokens: torch.Tensor, per_base: int) -> int:
    return math.ceil(tokens.shape[2] / per_base)


def _percent(error: float) -> str:
    return f"{100 * error:.2g} %"


def main() -> None:
    """Measure on one thread, and write the results and the plot."""
    torch.set_num_threads(1)
    results = measure()
    records.write(results, OUT)
    plot(results, OUT.with_suffix(".png"))
