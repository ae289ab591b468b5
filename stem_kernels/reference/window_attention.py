"""`window_attention` in plain torch: a row of places after the other, nothing gathered."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from ..shared.grid import Grid, by_frame, by_place, within
from ..shared.outputs import partial_output
from .chunks import CPU_LOGITS_PER_HEAD, GPU_LOGITS, groups


class Rows:
    """Tokens [G, n, d] by rows of places, and the windows of the places of a row.

    A row [(W + 2 a) F, d] has its places one after the other, each with its F tokens, and a = min(
    window, W - 1) places of zeros at both ends: the tokens of a window's row are consecutive.

    Args:
        grid: Frames, height and width.
        window: Number of places to each side, see `shared.grid.within`.
    """

    def __init__(self, grid: Grid, window: int) -> None:
        self.grid = grid
        self.window = window
        self.across = min(window, grid[2] - 1)

    def padded(self, tensor: torch.Tensor) -> torch.Tensor:
        """[G, n, d] -> [G, H, (W + 2 a) F, d]"""
        margins = (0, 0, 0, 0, self.across, self.across)
        return pad(by_place(tensor, self.grid), margins).flatten(2, 3).contiguous()

    def windows(self, padded: torch.Tensor, row: int) -> list[torch.Tensor]:
        """For each row of the windows of the places in `row`, their tokens: views [G, W, d, keys].

        Args:
            padded: What `padded` returned.
            row: Number of a row of places.
        """
        frames, found = self.grid[0], []
        for other, reach in self._seen(row):
            beyond = (self.across - reach) * frames
            inside = padded[:, other, beyond : padded.shape[2] - beyond]
            found.append(inside.unfold(1, (2 * reach + 1) * frames, frames))
        return found

    def keys(self, row: int) -> int:
        """The number of tokens in the window of a place in `row`, with those beyond its ends."""
        return sum((2 * reach + 1) * self.grid[0] for _, reach in self._seen(row))

    def outside(self, row: int, like: torch.Tensor) -> list[torch.Tensor]:
        """[W, 1, keys] each: 0, and -inf for tokens beyond the ends of the row."""
        return [_beyond(self.grid, reach, like) for _, reach in self._seen(row)]

    def _seen(self, row: int) -> list[tuple[int, int]]:
        """The rows of the windows of the places in `row`, and how far they reach in each."""
        height = self.grid[1]
        rows = range(max(0, row - self.window), min(height, row + self.window + 1))
        return [(other, min(within(self.window, other - row), self.across)) for other in rows]

    def parts(self, heads: int, keys: int, device: torch.device) -> Iterator[slice]:
        """Slices of a row's places that keep the logits of `keys` keys small."""
        width, logits = self.grid[2], self.grid[0] * keys
        limit = CPU_LOGITS_PER_HEAD if device.type == "cpu" else GPU_LOGITS // heads
        size = max(1, limit // logits)
        for start in range(0, width, size):
            yield slice(start, min(start + size, width))


def _beyond(grid: Grid, reach: int, like: torch.Tensor) -> torch.Tensor:
    frames, _, width = grid
    place = torch.arange(width, device=like.device).unsqueeze(-1)
    other = place + torch.arange(-reach, reach + 1, device=like.device)
    beyond = ((other < 0) | (other >= width)).repeat_interleave(frames, -1)
    return like.new_zeros(beyond.shape).masked_fill(beyond, float("-inf")).unsqueeze(1)


def window_attention_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query, key [B, h, n, d], value [B, h, n, e].

    Returns the output [B, h, n, e] and the logsumexp [B, h, n], in float32 or float64.
    """
    output, logsumexp = partial_output(query, key, value)
    compute = output.dtype
    with torch.autocast(query.device.type, enabled=False):
        for group in groups(query):
            queries, keys, values = (
                tensor[group].flatten(0, 1).to(compute) for tensor in (query, key, value)
            )
            found = _of_heads(queries, keys, values, grid, window, scale)
            for whole, part in zip((output, logsumexp), found, strict=True):
                whole[group] = part.view_as(whole[group])
    return output, logsumexp


def _of_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of heads [G, n, ...]: [G, n, e] and [G, n].

    With powers of two, of logits scaled for that: exp2 takes a third of exp's time on a CPU.
    """
    rows = Rows(grid, window)
    query = by_place(query * (scale / math.log(2)), grid).contiguous()
    key, value = rows.padded(key), rows.padded(value)
    outputs: list[torch.Tensor] = []
    logsumexps: list[torch.Tensor] = []
    for row in range(grid[1]):
        seen, held = rows.windows(key, row), rows.windows(value, row)
        outside = rows.outside(row, query)
        found = []
        for part in rows.parts(query.shape[0], rows.keys(row), query.device):
            # [G, places, F, keys]
            logits = near_logits(query[:, row, part], seen, outside, part)
            peak = largest(logits)  # finite: a token is in its own window
            weights = logits.sub_(peak).exp2_()
            mass = weights.sum(-1, keepdim=True)
            attended = near_values(weights, held, part) / mass
            found.append((attended, (peak + mass.log2()) * math.log(2)))
        for whole, parts in zip((outputs, logsumexps), zip(*found, strict=True), strict=True):
            whole.append(torch.cat(parts, 1))
    output, logsumexp = (by_frame(torch.stack(whole, 1)) for whole in (outputs, logsumexps))
    return output, logsumexp.squeeze(-1)


def near_logits(
    query: torch.Tensor, seen: list[torch.Tensor], outside: list[torch.Tensor], part: slice
) -> torch.Tensor:
    """Logits [G, places, F, keys] of some places of a row, -inf beyond its ends.

    Args:
        query: Scaled queries [G, places, F, d].
        seen: Windows of the keys.
        outside: Biases of these windows.
        part: Slice of these places.
    """
    return torch.cat(
        [
            (query @ keys[:, part]).add_(bias[part])
            for keys, bias in zip(seen, outside, strict=True)
        ],
        -1,
    )


def largest(logits: torch.Tensor) -> torch.Tensor:
    """[..., 1]: what is taken from logits. Results do not depend on it, so no gradient goes there
    and the logits may be overwritten."""
    with torch.no_grad():
        return logits.amax(-1, keepdim=True)


def near_values(weights: torch.Tensor, held: list[torch.Tensor], part: slice) -> torch.Tensor:
    """Weighted sums [G, places, F, e] of the values of some places' windows.

    Args:
        weights: Weights [G, places, F, keys].
        held: Windows of the values.
        part: Slice of these places.
    """
    shares = weights.split([values.shape[-1] for values in held], -1)
    total = shares[0] @ held[0][:, part].mT
    for share, values in zip(shares[1:], held[1:], strict=True):
        total = total + share @ values[:, part].mT
    return total
