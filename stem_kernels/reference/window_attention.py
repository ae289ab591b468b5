"""`window_attention` in plain torch: a row of places after the other, nothing gathered."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from ..shared.grid import Grid, by_frame, by_place
from ..shared.outputs import partial_output
from .chunks import CPU_LOGITS_PER_HEAD, GPU_LOGITS, groups


class Rows:
    """Tokens [G, n, d] by rows of places, and the windows of the places of a row.

    A row [(W + 2 a) F, d] has its places one after the other, each with its F tokens, and a = min(
    window, W - 1) places of zeros at both ends: the tokens of a window's row are consecutive.

    Args:
        grid: Frames, height and width.
        window: Number of places to each side.
    """

    def __init__(self, grid: Grid, window: int) -> None:
        self.grid = grid
        self.down, self.across = min(window, grid[1] - 1), min(window, grid[2] - 1)
        self.reach = (2 * self.across + 1) * grid[0]

    def padded(self, tensor: torch.Tensor) -> torch.Tensor:
        """[G, n, d] -> [G, H, (W + 2 a) F, d]"""
        margins = (0, 0, 0, 0, self.across, self.across)
        return pad(by_place(tensor, self.grid), margins).flatten(2, 3).contiguous()

    def windows(self, padded: torch.Tensor, row: int) -> list[torch.Tensor]:
        """For each row of the windows of the places in `row`, their tokens: views [G, W, d, reach].

        Args:
            padded: What `padded` returned.
            row: Number of a row of places.
        """
        rows = range(max(0, row - self.down), min(self.grid[1], row + self.down + 1))
        return [padded[:, other].unfold(1, self.reach, self.grid[0]) for other in rows]

    def outside(self, like: torch.Tensor) -> torch.Tensor:
        """[W, 1, reach]: 0, and -inf for tokens beyond the ends of the row."""
        frames, _, width = self.grid
        place = torch.arange(width, device=like.device).unsqueeze(-1)
        other = place + torch.arange(-self.across, self.across + 1, device=like.device)
        beyond = ((other < 0) | (other >= width)).repeat_interleave(frames, -1)
        bias = like.new_zeros(beyond.shape).masked_fill(beyond, float("-inf"))
        return bias.unsqueeze(1)

    def parts(self, heads: int, keys: int, device: torch.device) -> Iterator[slice]:
        """Slices of a row's places that keep the logits of `keys` keys small."""
        width, logits = self.grid[2], self.grid[0] * keys
        limit = CPU_LOGITS_PER_HEAD if device.type == "cpu" else GPU_LOGITS // heads
        size = max(1, limit // logits)
        for start in range(0, width, size):
            yield slice(start, min(start + size, width))


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
    outside = rows.outside(query)
    outputs: list[torch.Tensor] = []
    logsumexps: list[torch.Tensor] = []
    for row in range(grid[1]):
        seen, held = rows.windows(key, row), rows.windows(value, row)
        found = []
        for part in rows.parts(query.shape[0], len(seen) * rows.reach, query.device):
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
    query: torch.Tensor, seen: list[torch.Tensor], outside: torch.Tensor, part: slice
) -> torch.Tensor:
    """Logits [G, places, F, keys] of some places of a row, -inf beyond its ends.

    Args:
        query: Scaled queries [G, places, F, d].
        seen: Windows of the keys.
        outside: Bias of each row of a window.
        part: Slice of these places.
    """
    return torch.cat([(query @ keys[:, part]).add_(outside[part]) for keys in seen], -1)


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
    shares = weights.split(weights.shape[-1] // len(held), -1)
    total = shares[0] @ held[0][:, part].mT
    for share, values in zip(shares[1:], held[1:], strict=True):
        total = total + share @ values[:, part].mT
    return total
