"""STEM self-attention, in feature space and in key space."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from stem_kernels import basis_attention, initial_bases, standard_normals
from stem_kernels.ops.calibration import CALIBRATIONS, Calibration
from stem_kernels.ops.soft_em import EARLY_STRIDE, AttendedBases, SoftEM, attended_bases

from ...config import StemConfig
from .calibrated import calibration_of, moments_of
from .exchange import Lockstep
from .frames import all_frame_operands
from .hooks import Hooks, LayerBases, Operands, Seen
from .processor import VideoAttentionProcessor, attend_densely
from .projections import attend_in_one, project_keys_and_values, project_queries
from .rows import RowLayout
from .shared_em import of_spread_tokens, shared_em

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

logger = logging.getLogger("stem")


@dataclass
class Start:
    """What a layer's EM starts from in this forward pass.

    Args:
        normals: Standard normals in the shape of the bases; None: it starts from tokens.
    """

    normals: torch.Tensor | None = None


@dataclass
class StemState:
    """What the layers of one UNet share while STEM is on.

    Args:
        config: Configuration of this UNet.
        bases_shapes: Shapes of one video's bases, a layer each: (K, C) in feature space,
            (h, K, d) in key space.
        hooks: Hooks that give the layers bases, or see those that EM found.

    Attributes:
        starts: What each layer's EM starts from in this forward pass.
    """

    config: StemConfig
    bases_shapes: list[tuple[int, ...]]
    hooks: Hooks
    starts: list[Start] = field(init=False)

    def __post_init__(self) -> None:
        self.starts = [Start() for _ in self.bases_shapes]

    def begin(self, sample: torch.Tensor, timestep: torch.Tensor | float) -> None:
        """Before each forward pass of the UNet: draw what the layers need at this timestep."""
        for start in self.starts:
            start.normals = None
        if self.hooks.having("bases") or self.config.init != "gaussian":
            return
        if not isinstance(timestep, torch.Tensor):
            timestep = torch.tensor(timestep)
        sizes = [math.prod(shape) for shape in self.bases_shapes]
        drawn = standard_normals(timestep, sizes, seed=self.config.seed).to(sample.device)
        parts = drawn.split(sizes)
        for start, numbers, shape in zip(self.starts, parts, self.bases_shapes, strict=True):
            start.normals = numbers.view(shape)

    def given(self, layer: int) -> LayerBases | None:
        """The bases that a hook gives a layer, or None."""
        for hook in self.hooks.having("bases"):
            given = hook.bases(layer)
            if given is not None:
                self._check_given(layer, given)
                return given
        return None

    def _check_given(self, layer: int, given: LayerBases) -> None:
        shape, space = tuple(given.bases.shape[1:]), self.config.space
        expected = self.bases_shapes[layer]
        if shape != expected or (space == "key" and given.payload is None):
            raise ValueError(
                f"the replayed bases of layer {layer} are {list(shape)}, and in {space} space the "
                f"layer takes {list(expected)}; replay them with the num_bases and space that they "
                "were recorded with"
            )

    def calibrate(
        self, layer: int, tokens: torch.Tensor, find: Callable[[], Calibration]
    ) -> Calibration:
        """What a layer's bases are calibrated to: what came with given ones, or as found.

        Args:
            layer: Index of the layer.
            tokens: Input [videos, frames, S, C] of the layer.
            find: Function that calibrates.
        """
        given = self.given(layer)
        if given is None:
            found = find()
            for hook in self.hooks.having("calibrated"):
                hook.calibrated(layer, found)
            return found
        if given.calibration is None:
            raise ValueError(
                f"calibration is {self.config.calibration!r}, and the replayed bases of layer "
                f"{layer} hold none; record them with it, or take calibration='none'"
            )
        return given.calibration.each(lambda part: _placed(part, tokens, tokens.shape[0]))

    def converge(
        self,
        layer: int,
        features: torch.Tensor,
        payload: torch.Tensor | None,
        start: Start,
        exchange: Lockstep | None = None,
        *,
        sampled: bool = False,
    ) -> AttendedBases:
        """The bases of one layer for this forward pass.

        Args:
            layer: Index of the layer.
            features: Tokens [videos, (h,) n, D], of the running chunk where there is an exchange.
            payload: Values [videos, (h,) n, E], averaged by the same weights, or None.
            start: What the layer's EM starts from.
            exchange: Exchange through which the chunks of a video share their bases; None: the
                tokens are those of whole videos.
            sampled: Whether the tokens are a sample of those.
        """
        config = self.config
        given = self.given(layer)
        if given is not None:
            videos = features.shape[0]
            bases, mass = (_placed(part, features, videos) for part in (given.bases, given.mass))
            riding = None if given.payload is None else _placed(given.payload, features, videos)
            return self.attended(SoftEM(bases, riding, mass), features.dtype)
        normals = start.normals
        if normals is not None:
            normals = normals.to(features.device)
        if exchange is None:
            initial: torch.Tensor | int = config.num_bases
            if config.init != "tokens":
                initial = initial_bases(
                    features, config.num_bases, init=config.init, normals=normals
                )
            found = attended_bases(
                features,
                initial,
                num_iters=config.num_iters,
                temperature=config.temperature,
                payload=payload,
                empty=config.empty,
                proportional=config.proportional,
                early_stride=EARLY_STRIDE if sampled else 1,
                backend=config.backend,
            )
        else:
            shared = shared_em(exchange, config, features, payload, normals)
            found = self.attended(shared, features.dtype)
        for hook in self.hooks.having("converged"):
            hook.converged(layer, found.found)
        return found

    def attended(self, found: SoftEM, dtype: torch.dtype) -> AttendedBases:
        """What attention in `dtype` takes of these bases."""
        config = self.config
        return AttendedBases.of(found, dtype, empty=config.empty, proportional=config.proportional)


def _placed(recorded: torch.Tensor, like: torch.Tensor, videos: int) -> torch.Tensor:
    """What was recorded, on the device of `like`, for as many videos."""
    if recorded.shape[0] not in (1, videos):
        raise ValueError(
            f"the replayed bases are of {recorded.shape[0]} videos, and this batch holds "
            f"{videos}; replay them on a batch like the recorded one"
        )
    return recorded.to(like.device).expand(videos, *recorded.shape[1:])


class _Found(NamedTuple):
    """What attention takes of a layer's bases.

    Args:
        key: Keys [videos, h, K, d].
        value: Values [videos, h, K, d].
        bias: Bias [videos, 1 or h, K] of the logits, or None.
        calibration: Calibration by the moments of the tokens that EM read, or None.
        projected: Keys and values [videos, h, n, d] of these tokens in key space, else None.
    """

    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    calibration: Calibration | None
    projected: tuple[torch.Tensor, torch.Tensor] | None


class StemProcessor(VideoAttentionProcessor):
    """STEM in one self-attention: EM over all tokens of a video, then attention to its bases.

    Args:
        name: Name of the attention in the UNet.
        layout: Layout of the rows of a batch.
        layer: Index of the attention among the UNet's self-attentions.
        state: State shared by the layers.
    """

    def __init__(self, name: str, layout: RowLayout, layer: int, state: StemState) -> None:
        super().__init__(name, layout, state.hooks)
        self.layer = layer
        self.state = state
        self.start = state.starts[layer]

    def operands(self, attn: Attention, tokens: torch.Tensor) -> Operands:
        if self._is_dense(tokens):
            return all_frame_operands(attn, tokens, self.layout.exchange)
        return self._seen(attn, tokens).by(project_queries(attn, tokens).unsqueeze(1))

    def unwatched(self, attn: Attention, tokens: torch.Tensor) -> torch.Tensor:
        if self._is_dense(tokens):
            return super().unwatched(attn, tokens)
        seen = self._seen(attn, tokens)
        output = attend_in_one(attn, tokens, seen, self.state.config.backend)
        return self.in_parts(attn, tokens, seen) if output is None else output

    def _num_tokens(self, tokens: torch.Tensor) -> int:
        """The number of tokens of the whole video."""
        exchange = self.layout.exchange
        return tokens.shape[2] * (tokens.shape[1] if exchange is None else exchange.num_frames)

    def _is_dense(self, tokens: torch.Tensor) -> bool:
        total = self._num_tokens(tokens)
        if total > self.state.config.dense_below:
            return False
        if not torch.compiler.is_compiling():
            _log_dense_once(self.name, total)
        return True

    def _seen(self, attn: Attention, tokens: torch.Tensor) -> Seen:
        """What all tokens of a video attend to."""
        config, exchange = self.state.config, self.layout.exchange
        total, features = self._num_tokens(tokens), tokens.flatten(1, 2)
        count = config.sampled(total)
        by_chunk = exchange is None or config.sample_per_base is None
        of_all = None
        if self.state.given(self.layer) is not None or (count == total and by_chunk):
            found = self._attended_bases(attn, features, exchange)
            of_all = found.projected
        else:  # chunks bring all tokens of a short video, too, and so meet but once
            found = of_spread_tokens(
                features,
                count,
                exchange,
                lambda some: self._attended_bases(attn, some, None, sampled=count < total),
            )
        key, value, bias, calibration, _ = found
        if config.calibration in CALIBRATIONS:
            calibration = self.state.calibrate(
                self.layer,
                tokens,
                lambda: calibration_of(attn, tokens, of_all, found[:3], config, exchange),
            )
        correction = mean = None
        if calibration is not None:
            correction, mean = calibration.correction, calibration.query_mean
            value = value if calibration.value is None else calibration.value
        bias, correction, mean = (
            None if part is None else part.unsqueeze(1) for part in (bias, correction, mean)
        )
        value = value.to(key.dtype)
        return Seen(key.unsqueeze(1), value.unsqueeze(1), bias, correction, mean)

    def _attended_bases(
        self,
        attn: Attention,
        features: torch.Tensor,
        exchange: Lockstep | None,
        *,
        sampled: bool = False,
    ) -> _Found:
        """What attention takes of the bases that EM finds in tokens.

        Args:
            attn: Attention module, for its projections.
            features: Tokens [videos, n, C] that EM reads, of the running chunk where there is an
                exchange.
            exchange: Exchange in which the chunks meet; None: the tokens are all that EM reads.
            sampled: Whether they are a sample of the video's.
        """
        config, videos = self.state.config, features.shape[0]
        projected = None
        if config.space == "feature":
            bases = self._converged(features, None, exchange, sampled)
            key, value = project_keys_and_values(attn, bases.bases, videos)
            bias = None if bases.bias is None else bases.bias.unsqueeze(1)
        else:
            projected = project_keys_and_values(attn, features, videos)
            bases = self._converged(*projected, exchange, sampled)
            assert bases.payload is not None
            key, value, bias = bases.bases, bases.payload, bases.bias
        calibration = None
        if config.calibration == "moments":
            calibration = self.state.calibrate(
                self.layer,
                features,
                lambda: moments_of(
                    attn,
                    features,
                    bases.found,
                    (key, value),
                    config,
                    exchange,
                    videos > 1 and self.state.hooks.joint_bases,
                ),
            )
        return _Found(key, value, bias, calibration, projected)

    def _converged(
        self,
        features: torch.Tensor,
        payload: torch.Tensor | None,
        exchange: Lockstep | None,
        sampled: bool,
    ) -> AttendedBases:
        """The bases of every video of the batch."""
        state = self.state
        if features.shape[0] == 1 or not state.hooks.joint_bases:
            return state.converge(
                self.layer, features, payload, self.start, exchange, sampled=sampled
            )
        carried = [*features[1:], *([] if payload is None else payload)]
        joint = state.converge(
            self.layer,
            features[:1],
            torch.cat(carried, dim=-1).unsqueeze(0),
            self.start,
            exchange,
            sampled=sampled,
        ).found
        assert joint.payload is not None
        videos, width = features.shape[0], features.shape[-1]
        others, of_payload = joint.payload[0].split(
            [(videos - 1) * width, joint.payload.shape[-1] - (videos - 1) * width], dim=-1
        )
        bases = torch.stack([joint.bases[0], *others.split(width, dim=-1)])
        found = None
        if payload is not None:
            found = torch.stack(of_payload.split(payload.shape[-1], dim=-1))
        of_all = SoftEM(bases, found, joint.mass.expand(videos, *joint.mass.shape[1:]))
        return state.attended(of_all, features.dtype)

    def attend(self, operands: Operands) -> torch.Tensor:
        if operands.key.shape[-2] > self.state.config.num_bases:  # tokens, see `dense_below`
            return attend_densely(operands)
        bias, correction, mean = (
            None if part is None else part.flatten(0, 1)
            for part in (operands.bias, operands.correction, operands.query_mean)
        )
        attended = basis_attention(
            *(part.flatten(0, 1) for part in (operands.query, operands.key, operands.value)),
            bias=bias,
            correction=correction,
            query_mean=mean,
            backend=self.state.config.backend,
        )
        return attended.unflatten(0, operands.query.shape[:2])


@functools.cache
def _log_dense_once(name: str, num_tokens: int) -> None:
    logger.info("%s attends to all %d tokens of the video, without bases", name, num_tokens)


def bases_shape(attn: Attention, config: StemConfig) -> tuple[int, ...]:
    """The shape of one video's bases in this attention."""
    if config.space == "feature":
        return config.num_bases, attn.query_dim
    return attn.heads, config.num_bases, attn.inner_kv_dim // attn.heads
