"""STEM self-attention, in feature space and in key space."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from diffusers.models.attention_processor import Attention

from stem_kernels import attention_bias, basis_attention, initial_bases, soft_em, standard_normals
from stem_kernels.ops.soft_em import SoftEM

from ..config import StemConfig
from .exchange import Lockstep
from .processor import (
    RowLayout,
    VideoAttentionProcessor,
    project_keys_and_values,
    project_queries,
)
from .shared_em import shared_em


@dataclass
class StemState:
    """What the layers of one UNet share while STEM is on.

    Args:
        config: Configuration of this UNet.
        bases_shapes: Shapes of one video's bases, a layer each: (K, C) in feature space,
            (h, K, d) in key space.
        bases: Bases that EM last converged to, by layer; kept while `recording` only.
        recording: Whether to keep `bases` after every forward pass.
        replayed: Bases that the layers take in place of an EM; None: they run EM.
    """

    config: StemConfig
    bases_shapes: list[tuple[int, ...]]
    bases: dict[int, SoftEM] = field(default_factory=dict)
    recording: bool = False
    replayed: dict[int, SoftEM] | None = None
    _normals: list[torch.Tensor] = field(default_factory=list)

    def begin(self, sample: torch.Tensor, timestep: torch.Tensor | float) -> None:
        """Before each forward pass of the UNet: draw what the layers need at this timestep."""
        self._normals = []
        if self.replayed is not None or self.config.init != "gaussian":
            return
        if not isinstance(timestep, torch.Tensor):
            timestep = torch.tensor(timestep)
        sizes = [math.prod(shape) for shape in self.bases_shapes]
        drawn = standard_normals(timestep, sizes, seed=self.config.seed).to(sample.device)
        pairs = zip(drawn.split(sizes), self.bases_shapes, strict=True)
        self._normals = [numbers.view(shape) for numbers, shape in pairs]

    @contextlib.contextmanager
    def recorded(self) -> Iterator[dict[int, SoftEM]]:
        """The bases that layers converge to within a `with` block; they are filled in at its end
        and stay in `bases` where `recording` is on."""
        before, self.recording = self.recording, True
        found: dict[int, SoftEM] = {}
        try:
            yield found
            found.update(self.bases)
        finally:
            self.recording = before
            if not before:
                self.bases = {}

    @contextlib.contextmanager
    def replaying(self, bases: dict[int, SoftEM]) -> Iterator[None]:
        """Layers take these bases for the length of a `with` block."""
        before, self.replayed = self.replayed, bases
        try:
            yield
        finally:
            self.replayed = before

    def converge(
        self,
        layer: int,
        features: torch.Tensor,
        payload: torch.Tensor | None,
        exchange: Lockstep | None = None,
    ) -> SoftEM:
        """The bases of one layer for this forward pass.

        Args:
            layer: Index of the layer.
            features: Tokens [videos, (h,) n, D], of the running chunk where there is an exchange.
            payload: Values [videos, (h,) n, E] that ride along, or None.
            exchange: Exchange through which the chunks of a video share their bases; None: the
                tokens are those of whole videos.
        """
        config = self.config
        if self.replayed is not None:
            return self._replay(layer, features)
        normals = self._normals[layer].to(features.device) if self._normals else None
        if exchange is None:
            found = soft_em(
                features,
                initial_bases(features, config.num_bases, init=config.init, normals=normals),
                num_iters=config.num_iters,
                temperature=config.temperature,
                payload=payload,
                empty=config.empty,
                backend=config.backend,
            )
        else:
            found = shared_em(exchange, config, features, payload, normals)
        if self.recording:
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
        name: Name of the attention in the UNet.
        layout: Layout of the rows of a batch.
        layer: Index of the attention among the UNet's self-attentions.
        state: State shared by the layers.
    """

    def __init__(self, name: str, layout: RowLayout, layer: int, state: StemState) -> None:
        super().__init__(name, layout)
        self.layer = layer
        self.state = state

    def attend(self, attn: Attention, tokens: torch.Tensor) -> torch.Tensor:
        config, exchange = self.state.config, self.layout.exchange
        videos = tokens.shape[0]
        if config.space == "feature":
            found = self.state.converge(self.layer, tokens.flatten(1, 2), None, exchange)
            key, value = project_keys_and_values(attn, found.bases.to(tokens.dtype), videos)
            query, mass = project_queries(attn, tokens), found.mass.unsqueeze(1)
        else:
            keys, values = project_keys_and_values(attn, tokens, videos)
            found = self.state.converge(self.layer, keys, values, exchange)
            assert found.payload is not None
            query, mass = project_queries(attn, tokens), found.mass
            key, value = found.bases.to(query.dtype), found.payload.to(query.dtype)
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
