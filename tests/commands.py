"""The command line, called in this process."""

from __future__ import annotations

import pytest

from stem import cli


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        raise SystemExit(cli.run(list(arguments)))
    return int(caught.value.code or 0)
