"""An inversion on disk: its settings, and the latents of every timestep as they come.

    <method>-<hash of the settings>/
        settings.json               everything that shaped the latents
        x0.safetensors              the VAE's latents of the video; all there is where there are no
                                    steps, as for an edit without an inversion
        control.safetensors         the pictures that ControlNets are shown, where there are some
        steps/000-t0001.safetensors latents after step 0, at timestep 1
        bases/000-t0001.safetensors the bases of that step, where kept
        reconstruction-<hash>.safetensors  how far a reconstruction has come
        edit-<hash>.safetensors     how far an edit has come

The folder's name proves the settings. Every other file holds a hash of its content, the name of
the inversion that it belongs to and what its bits depend on beside the settings; all of it is
checked on reading.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..sources import ModelSource
from ..storage import DamagedFileError, load_tensors, save_tensors, write_atomically

if TYPE_CHECKING:
    import torch

    from ..attention.layers.hooks import LayerBases
    from ..control import Control

SETTINGS = "settings.json"
X0 = "x0"
CONTROL = "control"
RUN_PREFIXES = ("reconstruction-", "edit-")
_STATE = "state."
_AGAIN = "run the same inversion again, it mends what is damaged or missing"


class InversionError(ValueError):
    """A folder that holds no usable inversion.

    Args:
        problem: Description of what is wrong.
        advice: Description of what to do about it.
    """

    def __init__(self, problem: str, advice: str = "") -> None:
        super().__init__(f"{problem}; {advice}" if advice else problem)
        self.problem = problem


class MissingFileError(InversionError):
    """A file of an inversion that is not there."""


@dataclass(frozen=True)
class Progress:
    """How far a run that starts from an inversion has come.

    Args:
        steps_done: Number of steps done.
        latents: Latents [N, c, h, w] after them, float32.
        environment: Environment that the bits depend on, see `numeric_environment`.
        state: Tensors that the run needs beside the latents to go on, by name.
    """

    steps_done: int
    latents: torch.Tensor
    environment: Mapping[str, str]
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class InversionFolder:
    """The folder of one inversion.

    Args:
        path: Path of the folder.
        settings: Settings that shaped the latents, as JSON types.
        timesteps: Timesteps, ascending, one per step.
    """

    path: Path
    settings: dict[str, Any]
    timesteps: tuple[int, ...]

    @classmethod
    def prepare(
        cls, root: Path, settings: dict[str, Any], timesteps: tuple[int, ...]
    ) -> tuple[InversionFolder, str]:
        """The folder of these settings below `root`; it is made if it does not exist.

        Returns:
            The folder, and a text on what was wrong with the settings in it; "" if nothing was.
        """
        folder = cls(
            root / f"{settings['method']}-{_digest(settings, timesteps)}", settings, timesteps
        )
        (folder.path / "steps").mkdir(parents=True, exist_ok=True)
        (folder.path / "bases").mkdir(exist_ok=True)
        wrong = ""
        file = folder.path / SETTINGS
        if file.exists():
            try:
                cls.open(folder.path)
                return folder, wrong
            except InversionError as error:
                wrong = str(error)
        document = {"settings": settings, "timesteps": list(timesteps)}
        write_atomically(file, json.dumps(document, indent=2, sort_keys=True).encode())
        return folder, wrong

    @classmethod
    def path_of(cls, root: Path, settings: Mapping[str, Any], timesteps: tuple[int, ...]) -> Path:
        """The path below `root` of the inversion of these settings."""
        return root / f"{settings['method']}-{_digest(settings, timesteps)}"

    @classmethod
    def open(cls, path: str | Path) -> InversionFolder:
        """Open an inversion that was written earlier.

        Raises:
            InversionError: there is no inversion, or its settings differ from those that it was
                made with.
        """
        path = Path(path)
        file = path / SETTINGS
        if not file.is_file():
            raise InversionError(
                f"{path} holds no {SETTINGS}; name a folder that `stem invert` wrote, such as "
                "out/inversions/stem-0123456789ab"
            )
        try:
            document = json.loads(file.read_bytes())
            settings, timesteps = document["settings"], tuple(document["timesteps"])
            name = cls.path_of(path, settings, timesteps).name
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"[:200]
            raise InversionError(f"{file} is damaged ({reason})", _AGAIN) from error
        if name != path.resolve().name:
            raise InversionError(
                f"{file} was edited or its folder renamed: these settings belong into {name}",
                f"undo that, or {_AGAIN}",
            )
        return cls(path, settings, timesteps)

    @classmethod
    def find(cls, root: str | Path) -> list[Path]:
        """The folders at or below `root` that hold an inversion's settings, sorted."""
        return sorted(file.parent for file in Path(root).rglob(SETTINGS))

    @property
    def model_source(self) -> ModelSource:
        """The model that the inversion was made with, as it was named; the name may be empty."""
        recorded = self.settings["model"].items()
        return ModelSource.of({k: v for k, v in recorded if not k.endswith("_sha256")})

    @property
    def complete(self) -> bool:
        """Whether every file that the settings ask for exists. Their contents are checked on
        reading, and by `verify`."""
        whole = all(file.is_file() for file in (self._file(X0), *self._control_files()))
        return whole and self.steps_done == len(self.timesteps)

    @property
    def steps_done(self) -> int:
        """The number of steps, counted from the first, whose files exist."""
        for step in range(len(self.timesteps)):
            if not all(file.is_file() for file in self._step_files(step)):
                return step
        return len(self.timesteps)

    def verify(self, *, to_come: bool = True) -> list[str]:
        """A line for each file that is damaged or missing; empty if all files are whole.

        Args:
            to_come: Whether files that an unfinished run has yet to write are missing, too.
        """
        given = self.x0_problems() + self.control_problems()
        steps = [self.step_problems(step) for step in range(len(self.timesteps))]
        if not to_come:
            # Whatever precedes a file that was written has been written once.
            while steps and steps[-1] and not any(map(_there, steps[-1])):
                steps.pop()
            if not steps and not self.complete:
                given = list(filter(_there, given))
        found = [*given, *(error for problems in steps for error in problems)]
        for prefix in RUN_PREFIXES:
            found += self._problems(sorted(self.path.glob(f"{prefix}*.safetensors")))
        return [error.problem for error in found]

    def x0_problems(self) -> list[InversionError]:
        """The errors in the file of the video's own latents: one or none."""
        return self._problems([self._file(X0)])

    def control_problems(self) -> list[InversionError]:
        """The errors in the file of the control pictures: one or none."""
        return self._problems(self._control_files())

    def step_problems(self, step: int) -> list[InversionError]:
        """The errors in the files of one step: at most one for each file."""
        return self._problems(self._step_files(step))

    def _problems(self, files: list[Path]) -> list[InversionError]:
        found = []
        for file in files:
            try:
                self._load(file)
            except InversionError as error:
                found.append(error)
        return found

    def save_x0(self, latents: torch.Tensor, environment: Mapping[str, str]) -> None:
        """Keep the video's own latents.

        Args:
            latents: Latents [N, c, h, w], float32.
            environment: Environment that the bits depend on, see `numeric_environment`.
        """
        self._save(self._file(X0), {"latents": latents}, environment)

    def x0(self) -> torch.Tensor:
        """The video's own latents, float32 [N, c, h, w]."""
        return self._latents(self._file(X0))

    def save_control(
        self, pictures: Sequence[torch.Tensor], environment: Mapping[str, str]
    ) -> None:
        """Keep what each ControlNet is shown, uint8 [N, H, W, 3] (see `save_x0`)."""
        tensors = {str(number): each for number, each in enumerate(pictures)}
        self._save(self._file(CONTROL), tensors, environment)

    def control(self) -> tuple[Control, ...]:
        """What the ControlNets of the pipeline were shown, one by one; empty where it had none."""
        records = self.settings.get("control", [])
        if not records:
            return ()
        from ..control import Control

        tensors, _ = self._load(self._file(CONTROL))
        return tuple(
            Control.of(record, tensors[str(number)]) for number, record in enumerate(records)
        )

    def save_latents(
        self, step: int, latents: torch.Tensor, environment: Mapping[str, str]
    ) -> None:
        """Keep the latents after `step`; they are at `timesteps[step]` (see `save_x0`)."""
        self._save(self._step_file("steps", step), {"latents": latents}, environment)

    def latents(self, step: int) -> torch.Tensor:
        """The latents after `step` (-1: the last), float32 [N, c, h, w]."""
        return self._latents(self._step_file("steps", step % len(self.timesteps)))

    def environment(self, step: int) -> dict[str, str]:
        """The environment that the bits of a step depended on, see `numeric_environment`."""
        _, metadata = self._load(self._step_file("steps", step))
        found: dict[str, str] = json.loads(metadata["environment"])
        return found

    def save_bases(
        self, step: int, bases: dict[int, LayerBases], environment: Mapping[str, str]
    ) -> None:
        """Keep the bases of every layer at `step` (see `save_x0`)."""
        tensors = {
            f"{layer}.{name}": tensor
            for layer, found in bases.items()
            for name, tensor in found.tensors().items()
        }
        self._save(self._step_file("bases", step), tensors, environment)

    def bases(self, step: int) -> dict[int, LayerBases]:
        """The bases of every layer at `step`."""
        from ..attention.layers.hooks import LayerBases

        by_layer: dict[int, dict[str, torch.Tensor]] = {}
        tensors, _ = self._load(self._step_file("bases", step))
        for key, tensor in tensors.items():
            layer, name = key.split(".")
            by_layer.setdefault(int(layer), {})[name] = tensor
        return {layer: LayerBases.of_tensors(parts) for layer, parts in by_layer.items()}

    def save_progress(self, name: str, progress: Progress) -> None:
        """Keep the progress of a run that starts from this inversion.

        Args:
            name: Name of the run, unique among those of different settings.
            progress: Progress to keep.
        """
        import torch

        tensors = {"latents": progress.latents, "steps_done": torch.tensor(progress.steps_done)}
        state = {f"{_STATE}{name}": tensor for name, tensor in progress.state.items()}
        self._save(self._file(name), {**tensors, **state}, progress.environment)

    def progress(self, name: str) -> Progress | None:
        """The progress of an earlier run; None if there is no such run.

        Raises:
            InversionError: the file of the progress is damaged.
        """
        file = self._file(name)
        if not file.is_file():
            return None
        tensors, metadata = self._load(file)
        return Progress(
            int(tensors["steps_done"]),
            tensors["latents"],
            json.loads(metadata["environment"]),
            {
                key.removeprefix(_STATE): tensor
                for key, tensor in tensors.items()
                if key.startswith(_STATE)
            },
        )

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def _step_file(self, kind: str, step: int) -> Path:
        return self._file(f"{kind}/{step:03d}-t{self.timesteps[step]:04d}")

    def _control_files(self) -> list[Path]:
        return [self._file(CONTROL)] if self.settings.get("control") else []

    def _step_files(self, step: int) -> list[Path]:
        kinds = ("steps", "bases") if self.settings["keep_bases"] else ("steps",)
        return [self._step_file(kind, step) for kind in kinds]

    def _latents(self, file: Path) -> torch.Tensor:
        tensors, _ = self._load(file)
        return tensors["latents"]

    def _save(
        self, file: Path, tensors: Mapping[str, torch.Tensor], environment: Mapping[str, str]
    ) -> None:
        # A file of another inversion or step is whole too; its name inside tells it apart.
        metadata = {"name": self._inner_name(file), "environment": json.dumps(dict(environment))}
        save_tensors(file, tensors, metadata)

    def _load(self, file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        try:
            tensors, metadata = load_tensors(file)
        except FileNotFoundError as error:
            raise MissingFileError(f"{file} is missing", _AGAIN) from error
        except DamagedFileError as error:
            raise InversionError(str(error), _AGAIN) from error
        except OSError as error:
            raise InversionError(f"{file} cannot be read ({error.strerror})", _AGAIN) from error
        if metadata["name"] != self._inner_name(file):
            raise InversionError(
                f"{file} is another file, {metadata['name']}, under this name", _AGAIN
            )
        return tensors, metadata

    def _inner_name(self, file: Path) -> str:
        digest = _digest(self.settings, self.timesteps)
        return f"{digest}/{file.relative_to(self.path).with_suffix('')}"


def _there(error: InversionError) -> bool:
    return not isinstance(error, MissingFileError)


def _digest(settings: Mapping[str, Any], timesteps: tuple[int, ...]) -> str:
    text = json.dumps({"settings": settings, "timesteps": timesteps}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
