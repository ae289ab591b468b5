"""Names that a command line takes, known without torch; what they stand for says so by its keys."""

from __future__ import annotations

EMBEDDED_MODEL = "embedded"
"""The small trained pipeline that comes with this package, and the ControlNet beside it."""
EMBEDDED_VIDEO_MODEL = "embedded-video"
"""The small trained video transformer that comes with this package."""
RANDOM_MODEL = "random"
"""An untrained pipeline, also with a seed: random:SEED."""
DTYPES = ("float32", "float16", "bfloat16")
OFFLOADS = ("model", "sequential", "group")
"""Ways of keeping weights away from a small accelerator."""
PARKING = ("auto", "cpu", "disk", "never")
"""Places of what the chunks of a video hold while they wait for each other."""
INVERSIONS = "inversions"
"""Folder of inversions, beside what is made of them."""
WINDOWS = "windows"
"""Folder of inversions of windows, likewise."""
INVERSION_METHODS = ("ddim", "st-ddim", "inflated", "stem")
FLOW_METHODS = ("midpoint", "euler")
"""Inversions through a video transformer, by their solver."""
FLOW_SOURCE = "source"
"""In the place of a method: a video's latents alone, for an edit without an inversion."""
BASES = ("estimate", "cached")
"""What a reconstruction takes STEM's bases from."""
EDIT_METHODS = ("pnp", "tokenflow", "sdedit", "fatezero", "fusion")
FLOW_EDIT_METHODS = ("flowedit",)
"""Edits through a video transformer."""
PRESETS = {
    "fatezero": ("style", "attribute", "shape"),
    "fusion": ("colour", "texture", "shape", "style"),
}
"""By edit method the values of its option `preset`, where it has one."""
FLOWS = ("dis", "raft")
"""Names of the models that estimate optical flow."""
CLIP_MODEL = "openai/clip-vit-base-patch32"
"""Hub id of the CLIP model that measures an edit by default."""
BENCHMARK_CLIP_MODEL = "openai/clip-vit-large-patch14"
"""Hub id of the one that measures a benchmark's edits, FiVE's own."""
FORMS = ("defaults", "paper", "released")
"""Configurations that an ablation changes."""
ABLATED = ("K", "R", "sample", "form", "space", "init", "empty", "proportional", "calibration")
"""Options that an ablation changes."""
REPORTED = "stem compare, edit, demo, analyse or ablate"
"""Commands that write what a report is made of."""
