"""FateZero as it was published: the source's maps of every step, stored before the edit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from ...attention import Hook
from ...attention.layers.hooks import Attend, Operands, Site
from ...storage import partial_name
from .map_fusion import MapFusion


class SourceStore(Hook):
    """Records what a fusion takes from the source, and stands in for the source's rows then.

    Rows are [source] while it records, and [unconditional | conditional] or [conditional] after.
    Kept are text maps, and queries and keys, of which self-attention maps are made: for T steps
    and n tokens of N frames that is still O(T N n), on the CPU.

    Args:
        fusion: Fusion to serve; its attributes say what each step takes.
        folder: Folder to keep steps in, a file each; None: in memory.
        rank: Number of this rank among those that share the frames.

    Attributes:
        filled: Whether anything was recorded.
    """

    def __init__(self, fusion: MapFusion, folder: Path | None, rank: int = 0) -> None:
        self.fusion = fusion
        self.filled = False
        self._folder = folder
        self._rank = rank
        self._recording = False
        self._steps: dict[int, dict[str, torch.Tensor]] = {}
        self._current: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def recording(self, step: int) -> Iterator[None]:
        """Keep what goes through the UNet in a `with` block as the source of a step."""
        self._current, self._recording, self.filled = {}, True, True
        try:
            yield
        finally:
            self._recording = False
        if self._folder is None:
            self._steps[step] = self._current
        else:
            # Chunks of inflated attention share their keys, which safetensors refuses.
            torch.save(self._current, self._file(self._folder, step))
        self._current = {}

    def turn_to(self, step: int) -> None:
        """Give back what was kept of a step, and forget it."""
        if self._folder is None:
            self._current = self._steps.pop(step)
        else:
            file = self._file(self._folder, step)
            self._current = torch.load(file, weights_only=True)
            file.unlink()

    def clear(self) -> None:
        """Forget all that was kept."""
        self._steps, self._current, self.filled = {}, {}, False
        if self._folder is not None:
            for file in self._folder.glob(self._file(Path(), "*").name):
                file.unlink()

    def text_maps(self, site: Site, maps: torch.Tensor) -> torch.Tensor:
        if not self.fusion.takes_text_maps:
            return maps
        if self._recording:
            self._keep(site, maps=maps)
            return maps
        source = self._kept(site, "maps", maps)
        return self.fusion.text_maps(site, torch.cat([source, maps]))[1:]

    def operands(self, site: Site, operands: Operands) -> Operands:
        if not self.fusion.self_on:
            return operands
        if self._recording:
            self._keep(site, query=operands.query, key=operands.key)
            return operands
        return self.fusion.operands(site, self._with_source(site, operands)).of(slice(1, None))

    def attend(self, site: Site, operands: Operands, attend: Attend) -> torch.Tensor:
        if self._recording or not self.fusion.self_on or self.fusion.mask is None:
            return attend(operands)
        return self.fusion.attend(site, self._with_source(site, operands), attend)[1:]

    def _with_source(self, site: Site, operands: Operands) -> Operands:
        operands.refuse_calibrated(self)
        # Nobody looks at what the source attends to; any values will do.
        return Operands(
            torch.cat([self._kept(site, "query", operands.query), operands.query]),
            torch.cat([self._kept(site, "key", operands.key), operands.key]),
            torch.cat([operands.value[:1], operands.value]),
        )

    def _keep(self, site: Site, **tensors: torch.Tensor) -> None:
        for name, tensor in tensors.items():
            self._current[_key(site, name)] = tensor.cpu().contiguous()

    def _kept(self, site: Site, name: str, like: torch.Tensor) -> torch.Tensor:
        found = self._current.get(_key(site, name))
        if found is None:
            raise RuntimeError(
                f"{site.name}: the source's maps were stored in chunks of other frames, before "
                "memory ran out; take store='recompute', or invert with a smaller chunk"
            )
        return found.to(like.device)

    def _file(self, folder: Path, step: int | str) -> Path:
        # What a killed run leaves is then removed with other half written files.
        return partial_name(folder / f"source-{self._rank}-{step}")


def _key(site: Site, name: str) -> str:
    return f"{site.name} {name} {site.frames[0]} {len(site.frames)}"
