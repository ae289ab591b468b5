"""The procedural world's exact flow, and its judge in the place of CLIP."""

from __future__ import annotations

import torch
from torch.nn.functional import one_hot

from ..world import Scene, judge, render
from ..world.grammar import COLOURS, SHAPES
from .flow import Flow


def world_flow(scene: Scene, num_frames: int, size: int) -> Flow:
    """The exact flow and occlusion of a scene's video, in both directions.

    Args:
        scene: Scene that was rendered with the same number of frames and size.
        num_frames: Number N of frames, at least 2.
        size: Height and width in pixels.
    """
    there = render(scene, num_frames, size)
    back = render(scene, num_frames, size, span=(1.0, 0.0))  # the same frames in reverse
    return Flow(
        "exact flow of the world",
        there.flow,
        back.flow.flip(0),
        there.occlusion,
        back.occlusion.flip(0),
    )


class WorldJudge:
    """The world's judge of colour and shape, which can replace CLIP; an `Embedder`.

    The embedding of a frame, or of the first object of a caption, is 1 for one of COLOURS and one
    of SHAPES, and 0 elsewhere. The cosine of two embeddings is 1, 1/2 or 0: the share of colour and
    shape that agree. It is 0 for a frame in which the judge finds no object. The judge sees only
    the largest object, so it suits videos of one object. It does not see textures.
    """

    name = "judge of the world, in CLIP's place"

    def embed_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Embeddings, float32 [N, D], of frames, uint8 [N, H, H, 3]."""
        verdicts = [judge(frame) for frame in frames.cpu()]
        return torch.stack(
            [_vector(*((seen.colour, seen.shape) if seen else (None, None))) for seen in verdicts]
        )

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Embeddings, float32 [n, D], of n captions of the world.

        Raises:
            ValueError: a text does not name a colour and a shape of the world.
        """
        return torch.stack([_vector(*_named(text)) for text in texts])


def _vector(colour: str | None, shape: str | None) -> torch.Tensor:
    parts = []
    for word, words in ((colour, COLOURS), (shape, SHAPES)):
        place = torch.tensor(words.index(word) if word else 0)
        parts.append(one_hot(place, len(words)).float() * bool(word))
    return torch.cat(parts)


def _named(text: str) -> tuple[str, str]:
    """The colour and the shape of the first object that a caption names."""
    words = text.split()
    shape = next((word for word in words if word in SHAPES), None)
    before = words[: words.index(shape)] if shape else []
    colour = next((word for word in before if word in COLOURS), None)
    if shape is None or colour is None:
        raise ValueError(
            f"{text!r} names no object of the world; the judge takes captions such as "
            "'a small red ball moves right on a blue background'"
        )
    return colour, shape
