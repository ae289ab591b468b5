"""STEM self-attention, in feature space and in key space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers.models.attention_processor import Attention

from stem_kernels import attention_bias, basis_attention, initial_bases, soft_em, standard_normals
from stem_kernels.ops.soft_em import SoftEM

from ..config import StemConfig
from .processor import VideoAttentionProcessor, project_keys_and_values


@dataclass
class StemState:
    """What the layers of one UNet share while STEM is on.

    Args:
        config: of this UNet.
        bases_shapes: per layer, the shape of one video's bases: (K, C) in feature space,
            (h, K, d) in key space.
        bases: per layer, what EM last converged to; kept for warm starts and recording only.
        recording: keep `bases` after every forward pass.
        replayed: where set, layers take these in place of an EM.
    """

    config: StemConfig
    bases_shapes: list[tuple[int, ...]]
    bases: dict[int, SoftEM] = field(default_factory=dict)
    recording: bool = False
    replayed: dict[int, SoftEM] | None = None
    _normals: list[torch.Tensor] = field(default_factory=list)
    _last_timestep: float | None = None
    _last_rows: int = 0
    _direction: int = 0

    def begin(self, sample: torch.Tensor, timestep: torch.Tensor | float) -> None:
        """Before each forward pass of the UNet: draw what the layers need at this timestep."""
        self._normals = []
        if self.replayed is not None or self.config.init == "tokens":
            return
        if not isinstance(timestep, torch.Tensor):
            timestep = torch.tensor(timestep)
        if self.config.init == "previous":
            self._forget_bases_of_another_run(sample, timestep)
            return
        sizes = [math.prod(shape) for shape in self.bases_shapes]
        drawn = standard_normals(timestep, sizes, seed=self.config.seed).to(sample.device)
        pairs = zip(drawn.split(sizes), self.bases_shapes, strict=True)
        self._normals = [numbers.view(shape) for numbers, shape in pairs]

    @torch.compiler.disable
    def _forget_bases_of_another_run(self, sample: torch.Tensor, timestep: torch.Tensor) -> None:
        # The timesteps of one run go one way, on batches of one size. Anything else is a new run,
        # and bases from the end of the last one would make it depend on that run.
        now = float(timestep.flatten()[0])
        last, rows = self._last_timestep, self._last_rows
        direction = 0 if last is None else (now > last) - (now < last)
        if last is not None and (direction in (0, -self._direction) or rows != sample.shape[0]):
            self.reset()
            direction = 0
        self._direction = direction or self._direction
        self._last_timestep, self._last_rows = now, sample.shape[0]

    def reset(self) -> None:
        """Forget the bases of earlier forward passes; the next one starts a run."""
        self.bases = {}
        self._last_timestep = None
        self._direction = 0

    def resume(self, bases: dict[int, SoftEM], timesteps: Sequence[int], rows: int) -> None:
        """Take up a warm-started run again after passes at `timesteps` on batches of `rows`."""
        self.bases = bases
        self._last_rows = rows
        self._last_timestep = float(timesteps[-1])
        self._direction = 0 if len(timesteps) < 2 else (1 if timesteps[-1] > timesteps[0] else -1)

    def converge(self, layer: int, features: torch.Tensor, payload: torch.Tensor | None) -> SoftEM:
        """The bases of one layer for this forward pass. features [videos, (h,) n, D]."""
        config = self.config
        if self.replayed is not None:
            return self._replay(layer, features)
        start = initial_bases(
            features,
            config.num_bases,
            init=config.init,
            normals=self._normals[layer].to(features.device) if self._normals else None,
        )
        found = soft_em(
            features,
            start,
            num_iters=config.num_iters,
            temperature=config.temperature,
            payload=payload,
            empty=config.empty,
            backend=config.backend,
        )
        if self.recording or config.init == "previous":
            payload = None if found.payload is None else found.payload.detach()
            self.bases[layer] = SoftEM(found.bases.detach(), payload, found.mass.detach())
        return found

    def _replay(self, layer: int, features: torch.Tensor) -> SoftEM:
        assert self.replayed is not None
        if layer not in self.replayed:
            raise ValueError(
                f"the replayed bases hold layers {sorted(self.replayed)}, not layer {layer}; "
                "they belong to another UNet"
            )
        found = self.replayed[layer]
        if found.bases.shape[0] not in (1, features.shape[0]):
            raise ValueError(
                f"the replayed bases are of {found.bases.shape[0]} videos, and this batch holds "
                f"{features.shape[0]}; replay them on a batch like the recorded one"
            )
        device, videos = features.device, features.shape[0]

        def here(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device).expand(videos, *tensor.shape[1:])

        payload = None if found.payload is None else here(found.payload)
        return SoftEM(here(found.bases), payload, here(found.mass))


class StemProcessor(VideoAttentionProcessor):
    """STEM in one self-attention: EM over all tokens of a video, then attention to its bases.

    Args:
        name: the attention's name in the UNet.
        layer: its index there.
        state: shared by the layers.
    """

    def __init__(self, name: str, layer: int, state: StemState) -> None:
        super().__init__(name, state.config.num_frames)
        self.layer = layer
        self.state = state

    def attend(self, attn: Attention, tokens: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        config = self.state.config
        videos = tokens.shape[0]
        if config.space == "feature":
            found = self.state.converge(self.layer, tokens.flatten(1, 2), None)
            key, value = project_keys_and_values(attn, found.bases.to(tokens.dtype), videos)
            mass = found.mass.unsqueeze(1)
        else:
            keys, values = project_keys_and_values(attn, tokens, videos)
            found = self.state.converge(self.layer, keys, values)
            assert found.payload is not None
            key, value = found.bases.to(query.dtype), found.payload.to(query.dtype)
            mass = found.mass
        return basis_attention(
            query,
            key,
            value,
            bias=attention_bias(mass, empty=config.empty, proportional=config.proportional),
            backend=config.backend,
        )


def bases_shape(attn: Attention, config: StemConfig) -> tuple[int, ...]:
    """The shape of one video's bases in this attention."""
    if config.space == "feature":
        return config.num_bases, attn.query_dim
    return attn.heads, config.num_bases, attn.inner_kv_dim // attn.heads
