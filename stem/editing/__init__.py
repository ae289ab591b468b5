"""Editing a video by a prompt, from its inversion, or through a video transformer."""

from .checks import METHODS, check_edit, edit_options
from .flowedit import FlowEditOptions, flow_edit, run_flow_edit
from .job import Edit
from .methods.fatezero_options import FateZeroOptions
from .methods.fusion import FusionOptions
from .methods.pnp import PnPOptions
from .methods.sdedit import SDEditOptions
from .methods.tokenflow import TokenFlowOptions
from .pasting import edited_parts
from .run import edit, edit_latents, run_edit
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
