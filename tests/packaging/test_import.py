"""What an import of `stem` needs, and the names that it gives."""

from __future__ import annotations

import subprocess
import sys

import stem

CODE = """
import sys
for name in ("av", "matplotlib", "scipy", "PIL", "torchmetrics", "rich", "typer", "yaml"):
    sys.modules[name] = None  # importing it fails
sys.modules["diffusers"] = sys.modules["transformers"] = None  # a pipeline brings them
import stem

stem.StemConfig, stem.enable, stem.invert, stem.reconstruct, stem.load_pipeline
try:
    stem.read_video
except ModuleNotFoundError as error:
    assert error.name == "av", error
else:
    raise AssertionError("PyAV was there")
"""


def test_importing_needs_no_video_pictures_or_statistics() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there() -> None:
    from stem import compare, read_video

    assert callable(compare)
    assert callable(read_video)
    for name in stem.__all__:
        assert getattr(stem, name).__module__.startswith("stem.")
        assert name in dir(stem)
    assert not hasattr(stem, "absent")
