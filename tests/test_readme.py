"""The README says what was measured, and its code runs."""

from __future__ import annotations

import re

from benchmarks.readme import README, updated


def test_measurements_are_those_of_the_results_file() -> None:
    text = README.read_text()
    assert updated(text) == text


def test_the_drop_in_lines_run() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[:1]
    exec(code, {})
