"""What a command that inverts is asked for, checked as far as that needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..names import FLOW_EDIT_METHODS, FLOW_METHODS, INVERSIONS, RANDOM_MODEL
from ..sources import ModelError, ModelSource
from ..storage import check_output
from .app import quieten_libraries, say
from .arguments import chosen_methods, cuts_of, method_options
from .control_options import check_control, read_control
from .ranks import rank_device

if TYPE_CHECKING:
    import torch.distributed as dist

    from ..control import Control
    from ..inversion import InversionFolder
    from ..video import Video, VideoFile
    from ..video.reading import Pictures
    from .run_options import RunOptions

RANDOM_NOTE = (
    "The model's weights are random numbers: the pictures mean nothing, and the figures show the "
    "machinery, not quality. For a real model, point --model at a hub id, a .safetensors "
    "file or a local folder in diffusers' format, e.g. stem compare VIDEO --model "
    "stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt '...'"
)
_LATENT_BYTES = 16  # four channels of float32
_PICTURE_BYTES = 3  # a control picture's pixel


@dataclass(frozen=True)
class Request:
    """Settings of a command that inverts; made by `checked`.

    Args:
        source: Source by which an inversion finds its model again.
        methods: Names of the methods.
        options: Fields of the methods' configurations, by method.
        num_steps: Number of DDIM steps.
        device: Device to load the model onto; None: as `load_pipeline` chooses.
        dtype: Dtype of the weights; None: likewise.
        offloading: Arguments of `load_pipeline` that say where weights wait.
        out: Folder of everything written.
        num_controls: Number of ControlNets that are shown pictures.
    """

    source: ModelSource
    methods: list[str]
    options: dict[str, dict[str, Any]]
    num_steps: int
    device: str | None
    dtype: str | None
    offloading: dict[str, Any]
    out: Path
    num_controls: int = 0

    @classmethod
    def checked(
        cls,
        run: RunOptions,
    ) -> Request:
        """The settings that the options' texts ask for.

        Raises:
            typer.BadParameter, ValueError, OSError: one of them cannot be followed.
        """
        from ..diffusion.schedule import check_steps
        from ..models import known_schedule

        names = chosen_methods(run.methods)
        options = method_options(run.option, names, run.seed)
        source = run.source(
            ModelSource(f"{RANDOM_MODEL}:{run.seed}" if run.model == RANDOM_MODEL else run.model)
        )
        source.check()
        if source.is_video_model:
            raise ModelError(
                f"{source} is a video transformer; through it go stem invert (--methods "
                f"{','.join(FLOW_METHODS)}), stem reconstruct, and stem edit --method "
                f"{','.join(FLOW_EDIT_METHODS)}, but not this"
            )
        check_control(run, source)
        schedule = known_schedule(source.name, source.config)
        if schedule is not None:
            train_steps = schedule.get("num_train_timesteps", 1000)  # diffusers' default
            check_steps(run.steps, train_steps, schedule.get("steps_offset", 0))
        check_run_device(run, rank_device(run.device))
        check_output(run.out / INVERSIONS)
        settings = (run.steps, run.device, run.dtype, run.offloading, run.out)
        return cls(source, names, options, *settings, len(run.control or []))

    @property
    def note(self) -> str:
        """What to say of a model of random numbers; empty for any other."""
        return random_note(self.source)

    @property
    def model(self) -> str | dict[str, Any]:
        """What is written down of the model."""
        return self.source.record()

    def read(self, path: Path, run: RunOptions) -> Video:
        """The frames asked for, cropped to what the model's VAE takes as far as that is known."""
        from ..video import read_video

        clip = read_video(path, **read_options(run), multiple_of=self._factor or 1)
        self.check_space([clip])
        return clip

    def open(self, path: Path, run: RunOptions) -> VideoFile:
        """As `read`, but the frames stay in the file."""
        from ..video import open_video

        clip = open_video(path, **read_options(run), multiple_of=self._factor or 1)
        self.check_space([clip])
        return clip

    def check_space(self, clips: Sequence[Video | VideoFile]) -> None:
        """Raise if latents of all steps and control pictures do not fit on the disk.

        What lies there already is not counted.

        Raises:
            OSError: there is too little space.
        """
        pixels = sum(clip.num_frames * clip.height * clip.width for clip in clips)
        latents = _LATENT_BYTES * pixels // (self._factor or 8) ** 2
        shown = self.num_controls * _PICTURE_BYTES * pixels
        total = len(self.methods) * ((self.num_steps + 1) * latents + shown)
        folder = self.out / INVERSIONS
        there = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        check_output(folder, max(0, total - there))

    def check_size(self, size: int) -> None:
        """Raise if pictures of this width and height do not fit the model's VAE.

        Raises:
            ValueError: with the nearest that does.
        """
        factor = self._factor or 1
        if size % factor:
            nearest = max(factor, round(size / factor) * factor)
            raise ValueError(
                f"size is {size}; this model takes multiples of {factor}, such as {nearest}"
            )

    def load(self) -> Any:
        """The model's pipeline, on this rank's device where there are several."""
        return load(self.source, rank_device(self.device), self.dtype, self.offloading)

    def control(self, pipeline: Any, clip: Video | VideoFile, run: RunOptions) -> list[Control]:
        """What the pipeline's ControlNets are shown of a clip, in the order of --control."""
        from ..diffusion.pipeline import execution_device, vae_factor

        return read_control(run, clip, vae_factor(pipeline), execution_device(pipeline))

    def load_for(self, clip: Pictures, path: Path) -> tuple[Any, Pictures]:
        """The model's pipeline, and the clip as its VAE takes it; prints what was changed in it."""
        from ..diffusion.pipeline import vae_factor
        from ..video import crop_to_multiple

        pipeline = self.load()
        clip = crop_to_multiple(clip, vae_factor(pipeline))
        for note in clip.notes:
            say(f"{path.name}: {note}")
        return pipeline, clip

    def cuts(
        self, pipeline: Any, clip: Video | VideoFile, text: str, group: dist.ProcessGroup | None
    ) -> tuple[int, ...]:
        """The frames of a clip that begin another scene, as --cuts says; prints what is found."""
        from ..diffusion.motion import in_one_call
        from ..distributed import Ranks
        from ..video import find_cuts

        given = cuts_of(text)
        if given is not None:
            return given
        if in_one_call(pipeline):
            return ()
        found: tuple[int, ...] = Ranks(group).from_main(lambda: find_cuts(clip))
        if found:
            say(
                f"other scenes begin with frames {', '.join(map(str, found))}: each has bases of "
                "its own (--cuts none: all share theirs)"
            )
        return found

    @property
    def _factor(self) -> int | None:
        from ..models import known_vae_factor

        return known_vae_factor(self.source.name, self.source.config)


def read_options(run: RunOptions) -> dict[str, Any]:
    """What the options ask of `read_video`."""
    names = ("frames", "size", "deinterlace", "tone_map")
    return {name: getattr(run, name) for name in names}


def check_run_device(run: RunOptions, device: str | None) -> None:
    """Raise where the device is not here, or weights cannot be offloaded from it so.

    Args:
        run: Options of the command.
        device: Name of the device, or None.
    """
    from ..models import check_device

    check_device(device, **run.offloading)


def load(
    source: ModelSource, device: str | None, dtype: str | None, offloading: Mapping[str, Any]
) -> Any:
    """A model's pipeline, loaded without a word of the libraries that load it."""
    from ..models import load_pipeline

    quieten_libraries()
    return load_pipeline(source.name, device=device, dtype=dtype, **offloading, **source.additions)


def source_of(inversion: InversionFolder, model: str | None, run: RunOptions) -> ModelSource:
    """The model that an inversion was made with, but for what the options say.

    Args:
        inversion: Inversion to start from.
        model: Text of --model, or None.
        run: Options of the command.

    Raises:
        ModelError: the inversion does not name its model, or it is no longer there.
    """
    own = inversion.model_source
    if not (model or own.name):
        raise ModelError(f"{inversion.path} does not name its model; pass it with --model")
    source = run.source(own.renamed(model) if model else own)
    try:
        source.check()
    except ModelError as error:
        raise ModelError(f"{inversion.path} was made with {own}, and {error}") from error
    return source


def random_note(source: ModelSource) -> str:
    """What to say of a model of random numbers; empty for any other."""
    return RANDOM_NOTE if source.name.startswith(f"{RANDOM_MODEL}:") else ""
