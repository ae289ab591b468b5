"""Curves over a video's frames, as the points of inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SIDE = 1000
"""Width and height of a curve's own coordinates; the page stretches them to its own."""
_TICKS = 4  # about so many on the axis of the values


@dataclass(frozen=True)
class Curve:
    """Figures over frames.

    Args:
        title: Title, with the unit.
        series: Figure of each frame by label, not finite where there is none.
        colours: Number of each label's colour.
    """

    title: str
    series: Mapping[str, Sequence[float]]
    colours: Mapping[str, int]

    @property
    def ticks(self) -> list[float]:
        """Values on the axis, ascending: round numbers around all that is shown."""
        values = [v for figures in self.series.values() for v in figures if math.isfinite(v)]
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        span = max(high - low, 1e-3 * max(abs(high), 1.0))
        rough = span / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first, last = math.floor(low / step), math.ceil(high / step)
        return [number * step for number in range(first, max(last, first + 1) + 1)]

    @property
    def tick_texts(self) -> list[str]:
        """The ticks as texts, all with as many decimals as their distance needs."""
        step = self.ticks[1] - self.ticks[0]
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        return [f"{tick:.{decimals}f}" for tick in self.ticks]

    def x(self, frame: int) -> float:
        """Where a frame lies, from 0 to SIDE."""
        count = max(len(figures) for figures in self.series.values())
        return SIDE * frame / (count - 1) if count > 1 else SIDE / 2

    def y(self, value: float) -> float:
        """Where a value lies, from SIDE at the lowest tick to 0 at the highest."""
        low, high = self.ticks[0], self.ticks[-1]
        return SIDE * (high - value) / (high - low)

    def paths(self) -> list[tuple[int, str]]:
        """The number of the colour and the path's commands of each line.

        A line is broken where a frame has no figure; a figure between two such is a dot.
        """
        found = []
        for label, figures in self.series.items():
            commands, drawn = [], False
            for frame, value in enumerate(figures):
                if math.isfinite(value):
                    point = f"{self.x(frame):.1f} {self.y(value):.1f}"
                    commands.append(f"L{point}" if drawn else f"M{point}h0")
                drawn = math.isfinite(value)
            found.append((self.colours[label], "".join(commands)))
        return found

    @property
    def spoken(self) -> str:
        """What the curve shows, for who does not see it."""
        ranges = []
        for label, figures in self.series.items():
            values = [value for value in figures if math.isfinite(value)]
            if values:
                ranges.append(f"{label} {min(values):.2f} to {max(values):.2f}")
        return f"{self.title}: {'; '.join(ranges)}"
