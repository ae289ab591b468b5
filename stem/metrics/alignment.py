"""How well frames fit a prompt and one another, in the embeddings of one judge of both."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.functional import cosine_similarity

from .unmeasured import UnmeasuredError


class Embedder(Protocol):
    """An object that embeds frames and texts in one space, such as CLIP.

    Args:
        name: Name of the embedder, which stands beside every figure that depends on it.
    """

    @property
    def name(self) -> str: ...

    def embed_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Embeddings, float32 [N, D], of frames, uint8 [N, H, W, 3]."""
        ...

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Embeddings, float32 [n, D], of n texts."""
        ...


def text_alignment(frames: torch.Tensor, text: torch.Tensor) -> float:
    """CLIP-text: 100 x the mean cosine of a video's frames and its prompt.

    Args:
        frames: Embeddings of the frames, floating point [N, D].
        text: Embedding of the prompt, floating point [D].

    Returns:
        At most 100.

    Source: Hessel et al., EMNLP 2021 (CLIPScore, without its factor and without its clipping).
    """
    return 100 * float(cosine_similarity(frames, text[None], dim=-1).mean())


def clip_score(frames: torch.Tensor, text: torch.Tensor) -> float:
    """100 x the cosine of a frame and a prompt, at least 0; the mean of the frames.

    Args:
        frames: Embeddings of the frames, floating point [N, D].
        text: Embedding of the prompt, floating point [D].

    Returns:
        0 ... 100.

    Source: Hessel et al., EMNLP 2021, as torchmetrics' `CLIPScore`, which clips frame by frame.
    """
    return 100 * float(cosine_similarity(frames, text[None], dim=-1).clamp(min=0).mean())


def temporal_consistency(frames: torch.Tensor) -> float:
    """Tem-Con: the mean cosine of consecutive frames.

    Args:
        frames: Embeddings of the frames, floating point [N, D].

    Returns:
        At most 1.

    Raises:
        UnmeasuredError: fewer than two frames.

    Source: Esser et al., ICCV 2023.
    """
    if frames.shape[0] < 2:
        raise UnmeasuredError("one frame has no next one", "give videos of at least 2 frames")
    return float(cosine_similarity(frames[:-1], frames[1:], dim=-1).mean())


def frame_accuracy(frames: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> float:
    """Frame-Acc: the share of frames that are nearer the target prompt than the source prompt.

    Args:
        frames: Embeddings of the edited frames, floating point [N, D].
        source: Embedding of the source prompt, floating point [D].
        target: Embedding of the target prompt, floating point [D].

    Returns:
        Share, 0 ... 1; a frame that is equally near to both prompts does not count as nearer.

    Raises:
        UnmeasuredError: both prompts have the same embedding.

    Source: Qi et al., FateZero, ICCV 2023.
    """
    if torch.equal(source, target):
        raise UnmeasuredError(
            "the source prompt and the target prompt are the same to it",
            "give prompts that differ in what it sees",
        )
    nearness = [cosine_similarity(frames, text[None], dim=-1) for text in (source, target)]
    return float((nearness[1] > nearness[0]).float().mean())
