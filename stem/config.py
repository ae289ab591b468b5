"""What an attention mechanism can be told; frozen, and checked when made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from stem_kernels.backends import BACKENDS
from stem_kernels.ops.calibration import CALIBRATIONS as FITTED
from stem_kernels.ops.initialization import INITIALIZATIONS
from stem_kernels.ops.soft_em import EMPTY_POLICIES
from stem_kernels.ops.video_attention import CORRECTIONS

SPACES = ("feature", "key")
CALIBRATIONS = ("none", "moments", *FITTED)
MAX_BASES = 16_384
"""Bases of more than a layer's tokens gain nothing, and their logits take memory."""
NAMED_FRAMES = ("first", "mid", "last")
_PUBLISHED: dict[str, Any] = {
    "num_bases": 256,
    "num_iters": 5,
    "temperature": 0.01,
    "init": "gaussian",
    "proportional": False,
    "sample_per_base": None,
    "calibration": "none",
    "dense_below": 0,
}


@dataclass(frozen=True)
class StemConfig:
    """STEM self-attention: all tokens of a video through `num_bases` EM bases.

    Args:
        num_bases: Number K of bases, at least 1.
        num_iters: Number R of EM iterations, at least 1.
        temperature: Temperature tau > 0 of the responsibilities.
        space: Space in which responsibilities are computed. "feature": the layer's input; keys and
            values are projections of the bases (the paper). "key": the keys of each head; the
            values are averaged by the same weights (the released code).
        sample_per_base: Number of tokens that EM reads for each base, at least 1. In all it reads
            `num_bases` times this number, spread evenly over the whole video, so that EM costs the
            same at any length; iterations before the last read every second of them. None: EM reads
            all tokens.
        init: Start of EM, "gaussian" or "tokens", see `stem_kernels.initial_bases`.
        empty: Policy for empty bases, "zero", "mask" or "reseed", see `stem_kernels.soft_em`.
        proportional: Whether the weight of a base is in proportion to its mass, see
            `stem_kernels.attention_bias`.
        calibration: Form of the correction that brings attention to the bases nearer to attention
            over all frames. "none": no correction. "moments": the covariance of keys and values
            that bases leave out; it costs next to nothing. "linear" or "joint": a correction that
            is fitted to the exact attention of a few tokens. See `stem_kernels.ops.calibration`.
        num_queries: Number of the tokens that "linear" and "joint" are fitted to, at least 1,
            spread over the video.
        key_share: Share of the video's tokens, 0 < share <= 1, to which these tokens attend
            exactly.
        dense_below: Number of tokens of a whole video up to which a layer attends to all of them,
            exactly and without bases; 0: no layer does.
        num_frames: Number of consecutive rows of a batch that are one video with bases of its own.
            None: every row is a video, if the pipeline that was enabled says that a batch holds one
            image, or its two guidance branches; any other batch is then an error.
        chunk: Number of frames that go through the UNet at once; None: all of a video. Chunks of
            one video share their bases; `num_frames` must be given.
        cuts: Numbers of the frames that begin another scene, ascending, from 1 on. Every scene
            has bases of its own, as a video by itself would; `num_frames` must be given.
        fit_frames: Number of a scene's frames, spread evenly, on which its bases are found; every
            frame of the scene attends to them. None: all frames.
        seed: Seed of the Gaussian initial bases, used with the layer and the timestep.
        backend: Backend of the operators, "auto", "triton", "cuda" or "torch".

    Raises:
        ValueError: a value is out of range; the message names the values that are allowed.
    """

    # From benchmarks/results/quality.md. These defaults leave the self-attentions 1.2 % off
    # attention over all frames, the paper's values 19.8 %, attention per frame 12.6 %.
    # - Tokens to start from, and bases that weigh as much as their mass, make the difference:
    #   either alone takes the paper's 19.8 % to 3.1 % and 6.3 %.
    # - 2 iterations: with 8 tokens a base a third to fifth gain 0.1 points. With 128 tokens a
    #   base, as 8 frames of 64x64 have, the second gains 2.2 and the next three 1.4.
    # - 256 bases: 128 leave 2.2 % for a tenth less time, 512 leave 0.6 % for a third more.
    # - "reseed" finds nothing to do where bases start as tokens; key space is as near.
    # All of these with EM on all tokens and no correction. From benchmarks/results/calibration.md,
    # with 128 tokens a base: 22 tokens a base and moments have 0.56 of the error of that, in 0.65
    # to 0.8 of a layer's time; 32 tokens a base have 0.54 of it, the sample without moments 1.02.
    # Reconstruction does not tell them apart, but for "zero", which loses on natural clips.
    num_bases: int = 256
    num_iters: int = 2
    temperature: float = 0.01
    space: str = "feature"
    sample_per_base: int | None = 22
    init: str = "tokens"
    empty: str = "mask"
    proportional: bool = True
    calibration: str = "moments"
    num_queries: int = 256
    key_share: float = 1.0
    dense_below: int = 0
    num_frames: int | None = None
    chunk: int | None = None
    cuts: tuple[int, ...] = ()
    fit_frames: int | None = None
    seed: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        _check_count("num_bases", self.num_bases)
        if self.num_bases > MAX_BASES:
            raise ValueError(f"num_bases is {self.num_bases}; it must be at most {MAX_BASES}")
        _check_count("num_iters", self.num_iters)
        number = isinstance(self.temperature, (int, float)) and self.temperature is not True
        if not number or not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature!r}; it must be positive and finite")
        _check_choice("space", self.space, SPACES)
        if self.sample_per_base is not None:
            _check_count("sample_per_base", self.sample_per_base)
        share = self.key_share
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"key_share is {share!r}; it must be above 0 and at most 1")
        _check_choice("init", self.init, INITIALIZATIONS)
        _check_choice("empty", self.empty, EMPTY_POLICIES)
        _check_choice("backend", self.backend, ("auto", *BACKENDS))
        _check_choice("calibration", self.calibration, CALIBRATIONS)
        _check_count("num_queries", self.num_queries)
        _check_whole("dense_below", self.dense_below)
        _check_frames(self)
        if self.fit_frames is not None:
            _check_count("fit_frames", self.fit_frames)
            if self.num_frames is None:
                raise ValueError(f"fit_frames is {self.fit_frames}; it needs num_frames, too")
            if self.dense_below:
                raise ValueError(
                    f"fit_frames is {self.fit_frames} and dense_below {self.dense_below}; with "
                    "fit_frames it must be 0, because frames that come later attend to bases alone"
                )
        if not isinstance(self.proportional, bool):
            raise ValueError(f"proportional is {self.proportional!r}; it must be True or False")
        if type(self.seed) is not int or not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed!r}; it must be a whole number of 64 bits")

    def sampled(self, num_tokens: int) -> int:
        """The number of a video's tokens that EM reads."""
        if self.sample_per_base is None:
            return num_tokens
        return min(num_tokens, self.num_bases * self.sample_per_base)

    @classmethod
    def paper(cls, **changes: Any) -> StemConfig:
        """The paper's form: feature space, 256 bases, 5 iterations, Gaussian start.

        The paper does not say what happens to a base without mass; here it is masked.
        """
        return cls(**{**_PUBLISHED, "space": "feature", "empty": "mask", **changes})

    @classmethod
    def released(cls, **changes: Any) -> StemConfig:
        """The authors' released code: `paper` in key space, where empty bases become zero."""
        return cls(**{**_PUBLISHED, "space": "key", "empty": "zero", **changes})


@dataclass(frozen=True)
class SparseCausalConfig:
    """FateZero's sparse-causal attention: each frame attends to a few frames.

    Args:
        frames: Frames whose keys and values a frame sees: offsets from its own index (clamped
            to the video) or "first", "mid", "last". Default: the previous and the first.
        min_channels: Least number of channels; narrower layers keep per-frame attention.
        num_frames: Number of rows that are one video, as in `StemConfig`.
        chunk: Number of frames that go through the UNet at once, as in `StemConfig`.
        cuts: Numbers of the frames that begin another scene; frames attend within their scene.

    Raises:
        ValueError: a value is out of range; the message names the values that are allowed.
    """

    frames: tuple[int | str, ...] = (-1, "first")
    min_channels: int = 0
    num_frames: int | None = None
    chunk: int | None = None
    cuts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.frames, (int, str)):
            object.__setattr__(self, "frames", (self.frames,))
        object.__setattr__(self, "frames", tuple(self.frames))
        if not self.frames:
            raise ValueError("frames is empty; name at least one frame to attend to")
        for frame in self.frames:
            named = isinstance(frame, str) and frame in NAMED_FRAMES
            if not named and (isinstance(frame, bool) or not isinstance(frame, int)):
                raise ValueError(
                    f"frames holds {frame!r}; it takes whole offsets such as -1, and "
                    f"{', '.join(NAMED_FRAMES)}"
                )
        _check_whole("min_channels", self.min_channels)
        _check_frames(self)

    @classmethod
    def mid(cls, **changes: Any) -> SparseCausalConfig:
        """The middle frame only, in layers of at least 640 channels."""
        return cls(**{"frames": ("mid",), "min_channels": 640, **changes})


@dataclass(frozen=True)
class InflatedConfig:
    """All-frame attention: every token attends to every token of the video.

    Args:
        num_frames: Number of rows that are one video, as in `StemConfig`.
        chunk: Number of frames that go through the UNet at once, as in `StemConfig`; the keys and
            values of all frames are held for one layer at a time.
        cuts: Numbers of the frames that begin another scene; frames attend within their scene.

    Raises:
        ValueError: a value is out of range; the message names the values that are allowed.
    """

    num_frames: int | None = None
    chunk: int | None = None
    cuts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_frames(self)


@dataclass(frozen=True)
class PerFrameConfig:
    """The UNet's own attention, each frame by itself.

    Args:
        num_frames: Number of rows that are one video, as in `StemConfig`.
        chunk: Number of frames that go through the UNet at once, as in `StemConfig`.
        cuts: Numbers of the frames that begin another scene; frames attend within their scene.

    Raises:
        ValueError: a value is out of range; the message names the values that are allowed.
    """

    num_frames: int | None = None
    chunk: int | None = None
    cuts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_frames(self)


@dataclass(frozen=True)
class VideoConfig:
    """Self-attention of a video transformer: a window exactly, bases for the rest.

    See `stem_kernels.video.video_attention` for the attention itself. A layer keeps the model's own
    attention ("dense") where an option here says so.

    Args:
        window: Number of places around a token's own that it attends to exactly, in all frames; at
            least 0. The window is round, see `stem_kernels.video.window_attention`.
        tokens_per_base: Number of the video's tokens for each base, at least 1. With 1 every token
            is a base, and the result is that of exact attention.
        correction: Correction of the bases' part, "moments" or "none".
        num_iters: Number of EM's iterations, at least 0; with 0 bases are the groups around keys
            that are spread over the video.
        sample_per_base: Number of keys that EM reads for each base; None: EM reads all keys.
        dense_below: Number of a video's tokens up to which all layers are dense; 0: none is.
        dense_blocks: Numbers of the blocks that stay dense, counted from 0, or from the last one
            with -1, -2, ...
        dense_heads: Number of heads of each other layer that take exact attention: in each call
            those whose output is furthest off it, by 64 of the queries. Each costs its share of
            exact attention's time.
        start: Noise level above which all layers are dense, 0 <= end < start <= 1: the timestep
            over 1,000, as flow matching has it, 1 for pure noise. Where `start` or `end` is not
            the default, the host reads each call's timestep and waits for it.
        end: Noise level below which all layers are dense.
        backend: Backend of EM and of the assignment to bases, "auto", "triton", "cuda" or "torch".

    Raises:
        ValueError: a value is out of range; the message names the values that are allowed.
    """

    window: int = 2
    tokens_per_base: int = 64
    correction: str = "moments"
    num_iters: int = 2
    sample_per_base: int | None = 8
    dense_below: int = 0
    dense_blocks: tuple[int, ...] = ()
    dense_heads: int = 0
    start: float = 1.0
    end: float = 0.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("window", "num_iters", "dense_below", "dense_heads"):
            _check_whole(name, getattr(self, name))
        _check_count("tokens_per_base", self.tokens_per_base)
        if self.sample_per_base is not None:
            _check_count("sample_per_base", self.sample_per_base)
        _check_choice("correction", self.correction, CORRECTIONS)
        _check_choice("backend", self.backend, ("auto", *BACKENDS))
        blocks = self.dense_blocks
        if isinstance(blocks, int) or not all(type(block) is int for block in blocks):
            raise ValueError(
                f"dense_blocks is {blocks!r}; it must hold whole numbers, such as (0, 1, -1)"
            )
        object.__setattr__(self, "dense_blocks", tuple(blocks))
        levels = self.start, self.end
        numbers = all(isinstance(level, (int, float)) for level in levels)
        if not numbers or not 0 <= self.end < self.start <= 1:
            raise ValueError(
                f"start is {self.start!r} and end {self.end!r}; noise falls from start to end, and "
                "they must be 0 <= end < start <= 1"
            )

    @property
    def always(self) -> bool:
        """Whether layers do the same at all noise levels."""
        return self.start == 1 and self.end == 0


AttentionConfig = StemConfig | SparseCausalConfig | InflatedConfig | PerFrameConfig


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")


def _check_whole(name: str, value: int) -> None:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 0")


def _check_frames(config: AttentionConfig) -> None:
    for name in ("num_frames", "chunk"):
        value = getattr(config, name)
        if value is not None:
            _check_count(name, value)
    if config.chunk is not None and config.num_frames is None:
        raise ValueError(f"chunk is {config.chunk}; it needs num_frames, the frames of one video")
    cuts = config.cuts
    if isinstance(cuts, (int, str)) or not all(type(cut) is int for cut in cuts):
        raise ValueError(
            f"cuts is {cuts!r}; it must hold the numbers of frames, such as (120, 300)"
        )
    object.__setattr__(config, "cuts", tuple(cuts))
    if cuts and config.num_frames is None:
        raise ValueError(f"cuts is {cuts!r}; it needs num_frames, the frames of one video")
    edges = (0, *cuts, config.num_frames or 1)
    if any(start >= end for start, end in pairwise(edges)):
        raise ValueError(
            f"cuts is {cuts!r} for a video of {config.num_frames} frames; each must be the number "
            "of a frame that begins another scene, ascending, from 1 to the last frame's"
        )


def scenes_of(num_frames: int, cuts: Sequence[int]) -> list[range]:
    """The frames of each scene of a video.

    Args:
        num_frames: Number of frames of the video.
        cuts: Numbers of the frames that begin another scene, ascending.
    """
    return [range(start, end) for start, end in pairwise((0, *cuts, num_frames))]


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
