"""Where two prompts tell the UNet different things, pooled on bases of the whole video."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate, normalize

from stem_kernels import basis_attention, em_statistics, em_update
from stem_kernels.ops.soft_em import SoftEM
from stem_kernels.shared.spread import spread_tokens

from ...attention import Hook, Hooks
from ...attention.families import self_attentions, unet_of
from ...attention.layers.exchange import Tensors, in_order
from ...attention.layers.hooks import Site
from ...attention.waiting.parked import current_parking
from ...config import StemConfig
from ...diffusion.loop import NonFiniteError
from ...distributed import Ranks
from ..job import Job, steps_of
from ..regions.masks import halvings, layer_size

_MOST_LEVELS = 6  # more add passes of the UNet and hardly change the mean
_FRAMES = 8  # frames whose tokens are in hand at once


class TokenRecording(Hook):
    """Keeps the source's normalised tokens of some self-attentions.

    Args:
        names: Names of the self-attentions.
        num_frames: Number N of frames.
        ranks: Ranks that share the frames.
    """

    joint_bases = True

    def __init__(self, names: tuple[str, ...], num_frames: int, ranks: Ranks) -> None:
        self._names = names
        self._num_frames = num_frames
        self._ranks = ranks
        self._own: set[int] = set()
        self._kept: dict[str, torch.Tensor] = {}

    def after(self, site: Site, tokens: torch.Tensor, output: torch.Tensor) -> None:
        if site.name not in self._names:
            return
        if site.name not in self._kept:
            shape = (self._num_frames, *tokens.shape[2:])
            self._kept[site.name] = current_parking().empty(tokens, shape)
        kept = self._kept[site.name]
        kept[list(site.frames)] = tokens[0].to(kept.device)
        self._own.update(site.frames)

    def taken(self) -> dict[str, torch.Tensor]:
        """The tokens [N, S, C] of each layer; they are kept no longer."""
        found, self._kept = self._kept, {}
        for tokens in found.values():
            self._ranks.fill(tokens, self._own)
        return found


def difference_map(job: Job, hooks: Hooks, low: float, high: float) -> torch.Tensor:
    """How much the prompts differ at each cell, the same for the same thing in every frame.

    At levels j of the source, low T < j <= high T, D_j is the mean over channels of
    |prediction(target) - prediction(source)|; P_j = Z mu_j, where mu_j are the means of D_j on
    the bases of a layer and Z the layer's responsibilities, averaged over the layers and divided
    by its mean. Their sum is divided by its 99 % quantile.

    Args:
        job: Job.
        hooks: Hooks of the attention that is on. The tokens of the layers to pool with are held
            for all frames while a level is looked at, in a file where chunks park so.
        low: Share of the levels above which they count.
        high: Share of the levels up to which they count.

    Returns:
        float32 [N, h, w]; zeros where the prompts make no difference beyond rounding.

    Raises:
        NonFiniteError: predictions that are not finite.
    """
    recording = TokenRecording(finest_layers(job), job.num_frames, job.ranks)
    with hooks.added("tokens", recording):
        summed = _summed_over_levels(job, recording, low, high)
    if summed is None:
        return torch.zeros_like(job.level(0)[:, 0])
    return summed / quantile(summed, 0.99)


def _summed_over_levels(
    job: Job, recording: TokenRecording, low: float, high: float
) -> torch.Tensor | None:
    total = job.num_steps
    levels = list(range(steps_of(low, total) + 1, steps_of(high, total) + 1))
    levels = levels[:: -(-len(levels) // _MOST_LEVELS)] if levels else [max(1, total // 2)]
    dtype = job.pipeline.unet.dtype
    floor = max(1e-5, 2 * torch.finfo(dtype).eps)
    summed: torch.Tensor | None = None
    for level in levels:
        source = job.level(level)
        expected, wanted = job.predict(
            [source, source], job.timestep(level), job.source, job.target
        )
        difference = mean_difference(expected, wanted)
        if not bool(difference.isfinite().all()):
            raise NonFiniteError(
                f"difference of the prompts at timestep {int(job.timestep(level))}: the "
                "predictions are not finite. In half precision some models overflow; invert and "
                "edit in float32"
            )
        by_layer = recording.taken()
        size = current_parking().by_frames(
            lambda expected: expected.abs().mean((1, 2, 3)), expected
        )
        if float(difference.mean()) <= floor * float(size.mean()):
            continue
        pooled = torch.cat(
            [
                pooled_on_bases(
                    difference[scene.start : scene.stop],
                    {name: tokens[scene.start : scene.stop] for name, tokens in by_layer.items()},
                    job.attention,
                    job.ranks,
                )
                for scene in job.scenes
            ]
        )
        pooled = pooled / pooled.mean()
        summed = pooled if summed is None else summed + pooled
    return summed


def mean_difference(expected: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The mean over channels of |wanted - expected|, both [N, c, h, w]: float32 [N, h, w]."""
    return current_parking().by_frames(
        lambda expected, wanted: (wanted - expected).abs_().mean(1), expected, wanted
    )


def pooled_on_bases(
    values: torch.Tensor,
    tokens_by_layer: Mapping[str, torch.Tensor],
    attention: object,
    ranks: Ranks,
) -> torch.Tensor:
    """Values of cells, each replaced by the mean of its bases, averaged over layers.

    Args:
        values: Values [N, h, w], float32.
        tokens_by_layer: Normalised tokens [N, S, C] of each layer; its cells are the values', or
            coarser.
        attention: Attention of the inversion; a StemConfig says how EM is run, others leave it at
            the defaults.
        ranks: Ranks that share the layers.

    Returns:
        float32 [N, h, w].
    """
    config = attention if isinstance(attention, StemConfig) else StemConfig()
    height, width = values.shape[1:]
    by_layer = values.new_empty((len(tokens_by_layer), *values.shape))
    own = range(ranks.number, len(tokens_by_layer), ranks.size)
    layers = list(tokens_by_layer.values())
    for layer in own:
        tokens = layers[layer]
        size = layer_size(tokens.shape[1], height, width)
        coarse = adaptive_avg_pool2d(values.unsqueeze(1), size).flatten(2)
        found = _em_by_parts(tokens, coarse.flatten(1).unsqueeze(-1), config)
        assert found.payload is not None
        key, means = normalize(found.bases, dim=-1), found.payload
        # Attention to the bases as tau sees it is the responsibilities, times the means.
        parts = [
            basis_attention(
                part.reshape(1, 1, -1, part.shape[-1]),
                key.unsqueeze(1),
                means.unsqueeze(1),
                scale=1 / config.temperature,
                bias=_absent(found.mass),
                backend=config.backend,
            ).reshape(part.shape[0], 1, *size)
            for part in _parts(tokens, values.device)
        ]
        fine = interpolate(torch.cat(parts), size=(height, width), mode="nearest")
        by_layer[layer] = fine.squeeze(1)
    ranks.fill(by_layer, own)
    return by_layer.mean(0)


def _em_by_parts(tokens: torch.Tensor, payload: torch.Tensor, config: StemConfig) -> SoftEM:
    """`soft_em` of tokens [N, S, C] with values [N, S, 1], some frames in hand."""
    frames, size, _ = tokens.shape
    chosen = spread_tokens(frames * size, config.num_bases, tokens.device)
    bases = tokens[chosen // size, chosen % size].float().unsqueeze(0).to(payload.device)
    found = SoftEM(bases, None, bases[..., 0])
    for iteration in range(config.num_iters):
        last = iteration == config.num_iters - 1
        summed: Tensors = ()
        for part, values in zip(
            _parts(tokens, payload.device), payload.split(_FRAMES), strict=True
        ):
            statistics = em_statistics(
                part.flatten(0, 1).unsqueeze(0),
                found.bases,
                temperature=config.temperature,
                payload=values.flatten(0, 1).unsqueeze(0) if last else None,
                backend=config.backend,
            )
            here = tuple(tensor for tensor in statistics if tensor is not None)
            summed = in_order([summed, here]) if summed else here
        sums, mass, *of_payload = summed
        found = em_update(
            sums,
            mass,
            found.bases,
            num_tokens=frames * size,
            payload_sums=of_payload[0] if of_payload else None,
            backend=config.backend,
        )
    return found


def _parts(tokens: torch.Tensor, device: torch.device) -> Iterator[torch.Tensor]:
    """Tokens [some, S, C] of a few frames after another in float32, on a device."""
    for (part,) in current_parking().parts(_FRAMES, tokens):
        yield part.to(device, torch.float32)


def finest_layers(job: Job) -> tuple[str, ...]:
    """The first self-attention of the encoder and of the decoder on the finest grid that both
    have, by name."""
    unet = unet_of(job.pipeline)
    levels = {name: halvings(unet, name) for name in self_attentions(unet)}
    down = {name: level for name, level in levels.items() if name.startswith("down_blocks.")}
    up = {name: level for name, level in levels.items() if name.startswith("up_blocks.")}
    common = set(down.values()) & set(up.values())
    if not common:
        raise ValueError(
            "the encoder and the decoder of this UNet have no self-attentions on a common grid; "
            "edit without masks (mask=False)"
        )
    finest = min(level for level in common if level is not None)
    return tuple(
        next(name for name, level in side.items() if level == finest) for side in (down, up)
    )


def _absent(mass: torch.Tensor) -> torch.Tensor:
    """A bias [1, 1, K] that keeps bases without mass out."""
    return torch.where(mass > 0, 0.0, float("-inf")).unsqueeze(1)


def quantile(values: torch.Tensor, share: float) -> torch.Tensor:
    """The smallest number that is at least as large as this share of all; of any number of them."""
    flat = values.flatten()
    return flat.kthvalue(max(1, round(share * flat.numel()))).values
