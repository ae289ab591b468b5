"""The options that commands which invert have in common, as one argument of each command."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..names import EMBEDDED_MODEL
from ..sources import ModelSource
from .arguments import (
    ALL_METHODS,
    Chunk,
    Config,
    ControlNets,
    Deinterlace,
    Device,
    Dtype,
    Frames,
    Loras,
    Methods,
    Model,
    ModelConfig,
    MotionAdapter,
    MotionWindow,
    Offload,
    OffloadFolder,
    Options,
    Out,
    Park,
    Prompt,
    Seed,
    Size,
    Steps,
    TextualInversions,
    ToneMap,
    Vae,
    Variant,
)
from .control_options import (
    OF_CONTROL,
    ControlEnds,
    Controls,
    ControlScales,
    ControlStarts,
    DepthModel,
)

OF_MOTION = ("motion_adapter", "motion_window")
"""Parameters of motion adapters, which commands lack that take pipelines without."""
OF_PARTS = (*OF_MOTION, "controlnet", *OF_CONTROL)
"""Parameters of a pipeline's further parts, which commands lack that take plain pipelines."""


@dataclass(frozen=True)
class RunOptions:
    """Texts of the options; an option that a command does not have keeps its default."""

    model: Model = EMBEDDED_MODEL
    variant: Variant = None
    model_config: ModelConfig = None
    vae: Vae = None
    lora: Loras = None
    textual_inversion: TextualInversions = None
    motion_adapter: MotionAdapter = None
    motion_window: MotionWindow = None
    controlnet: ControlNets = None
    control: Controls = None
    control_scale: ControlScales = None
    control_start: ControlStarts = None
    control_end: ControlEnds = None
    depth_model: DepthModel = None
    prompt: Prompt = ""
    methods: Methods = ALL_METHODS
    frames: Frames = None
    size: Size = None
    deinterlace: Deinterlace = False
    tone_map: ToneMap = False
    steps: Steps = 50
    seed: Seed = 0
    option: Options = None
    chunk: Chunk = "auto"
    device: Device = None
    dtype: Dtype = None
    offload: Offload = None
    offload_folder: OffloadFolder = None
    park: Park = "auto"
    config: Config = None
    out: Out = Path("out")

    @property
    def offloading(self) -> dict[str, Any]:
        """The arguments of `load_pipeline` that say where weights wait."""
        return {"offload": self.offload, "offload_folder": self.offload_folder}

    def parking(self, folder: Path) -> AbstractContextManager[None]:
        """Chunks wait where the options say for the length of a `with` block.

        Args:
            folder: Folder for their files, made where it is needed.
        """
        if self.park == "auto":
            return contextlib.nullcontext()
        from ..attention.waiting.parked import parking

        folder.mkdir(parents=True, exist_ok=True)
        return parking(self.park, folder)

    def source(self, of: ModelSource) -> ModelSource:
        """The model that the options ask for.

        Args:
            of: Source of what the options do not say.
        """
        given: dict[str, Any] = {
            "variant": self.variant,
            "config": self.model_config,
            "vae": self.vae,
            "loras": tuple(self.lora or ()),
            "textual_inversions": tuple(self.textual_inversion or ()),
            "controlnets": tuple(self.controlnet or ()),
            "motion_adapter": self.motion_adapter,
            "motion_window": self.motion_window,
        }
        return dataclasses.replace(of, **{name: value for name, value in given.items() if value})


DEFAULTS = RunOptions()
"""The default of an argument `run` that stands after others with defaults."""


def takes_run_options(
    without: Collection[str] = (), **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator of a command with an argument `run`, in whose place its options stand.

    Args:
        without: Names of RunOptions that the command does not have, beside those that it declares
            itself.
        defaults: Defaults of the command by option, where they are its own.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        options = inspect.signature(RunOptions, eval_str=True).parameters
        shared = {
            name: option.replace(default=defaults.get(name, option.default))
            for name, option in options.items()
            if name not in without and name not in own
        }

        @functools.wraps(command)
        def call(**values: Any) -> None:
            given = {name: values.pop(name) for name in shared}
            command(run=dataclasses.replace(RunOptions(**defaults), **given), **values)

        parameters = [
            each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in own.values()
            for each in (shared.values() if parameter.name == "run" else (parameter,))
        ]
        # What typer reads, in place of the signature of the command.
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {each.name: each.annotation for each in parameters}
        del call.__wrapped__
        return call

    return decorate
