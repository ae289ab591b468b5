"""A procedural world: short videos of simple scenes, with captions and exact ground truth."""

from .grammar import VOCABULARY, Background, Scene, Thing, caption, changed
from .judge import Verdict, judge
from .render import Clip, render
from .sampling import sample_scene

__all__ = [
    "VOCABULARY",
    "Background",
    "Clip",
    "Scene",
    "Thing",
    "Verdict",
    "caption",
    "changed",
    "judge",
    "render",
    "sample_scene",
]
