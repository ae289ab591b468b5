"""A procedural world: short videos of simple scenes, with captions and exact ground truth."""

from .edits import EDIT_KINDS, WorldEdit, world_edit
from .grammar import VOCABULARY, Background, Scene, Thing, caption, changed
from .judge import Verdict, judge
from .render import Clip, render
from .sampling import sample_scene

__all__ = [
    "EDIT_KINDS",
    "VOCABULARY",
    "Background",
    "Clip",
    "Scene",
    "Thing",
    "Verdict",
    "WorldEdit",
    "caption",
    "changed",
    "judge",
    "render",
    "sample_scene",
    "world_edit",
]
