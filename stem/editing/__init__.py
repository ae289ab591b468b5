"""Editing a video by a prompt, from its inversion; a module for each method."""

from .checks import METHODS, check_edit, edit_options
from .fatezero_options import FateZeroOptions
from .flowedit import FlowEditOptions, flow_edit, run_flow_edit
from .fusion import FusionOptions
from .job import Edit
from .pasting import edited_parts
from .pnp import PnPOptions
from .run import edit, edit_latents, run_edit
from .sdedit import SDEditOptions
from .tokenflow import TokenFlowOptions
from .zoomed import run_zoomed_edit

__all__ = [
    "METHODS",
    "Edit",
    "FateZeroOptions",
    "FlowEditOptions",
    "FusionOptions",
    "PnPOptions",
    "SDEditOptions",
    "TokenFlowOptions",
    "check_edit",
    "edit",
    "edit_latents",
    "edit_options",
    "edited_parts",
    "flow_edit",
    "run_edit",
    "run_flow_edit",
    "run_zoomed_edit",
]
