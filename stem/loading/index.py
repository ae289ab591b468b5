"""What a pipeline is made of, as its index says before any weights are downloaded."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

_INDEX = "model_index.json"


def pipeline_index(name: str | Path) -> dict[str, Any]:
    """What model_index.json says: the pipeline's class, and its parts by name.

    Args:
        name: Hub id, or folder in diffusers' format.

    Returns:
        Its content; empty where it cannot be read, because who loads the pipeline says why.
    """
    found: Any = None
    with contextlib.suppress(Exception):  # versions of the hub's client have errors of their own
        found = json.loads(_file(name).read_bytes())
    return found if isinstance(found, dict) else {}


def _file(name: str | Path) -> Path:
    if Path(name).is_dir():
        return Path(name) / _INDEX
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(str(name), _INDEX)
    if not isinstance(found, str):
        # Without a network a download tries for half a minute, and this fails at once.
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(str(name), _INDEX))
        found = huggingface_hub.hf_hub_download(str(name), _INDEX)
    return Path(found)
