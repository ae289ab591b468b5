"""Points that are measured in processes of their own, which read their own high-water marks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

# Freed blocks of this size and more go back to the system, so that they do not count.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def measured_apart(study: str, *point: str) -> dict[str, Any]:
    """What `python -m STUDY --point ...` prints on its last line, as JSON.

    Args:
        study: Name of a module.
        point: Arguments that name the point.
    """
    done = subprocess.run(
        [sys.executable, "-m", study, "--point", *point],
        env={**os.environ, **ALLOCATOR},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
