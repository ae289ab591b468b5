"""Every launch of Triton's in the suite, through Triton's own launcher, without a GPU.

`python -m benchmarks.suite.dry_run` compiles for an H100 what the suite launches there, lets the
launcher pack every argument for a driver that runs nothing (`benchmarks.counting.stand_in`), and
fails where a GPU would refuse a launch, where a kernel is given what it was not compiled for, and
where a repeated call launches something else than the first. The first run takes minutes, because
Triton compiles; it keeps on disk what it compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

import torch
import typer

from ..cases.bench import Survived
from ..counting.launches import absent_gpu
from ..counting.stand_in import ARCH, Packed, driver
from .compiling import Recorded, calls

ADDRESS_BYTES = 8
PARTS = ("correctness", "operators")
"""Parts that launch all that Triton launches in the suite."""


def dry_run(named: Iterable[tuple[str, Callable[[], object]]]) -> tuple[int, list[str]]:
    """Call each twice; the second call goes by what the first prepared.

    Args:
        named: Calls of operators with the Triton backend, by name.

    Returns:
        The number of launches, and what is wrong with any.
    """
    packed, faults = driver().packed, []
    count = 0
    with absent_gpu(ARCH, driver()), torch.no_grad(), Recorded():
        for name, call in named:
            packed.clear()
            with Survived(name) as survived:
                call()
                first = len(packed)
                call()
            count += len(packed)
            if survived.outcome:
                faults.append(f"{name}: {survived.note}")
            elif not first:
                faults.append(f"{name}: nothing is launched")
            elif _told(packed[:first]) != _told(packed[first:]):
                faults.append(f"{name}: a repeated call launches something else than the first")
    return count, faults


def _told(launches: Sequence[Packed]) -> list[tuple[object, ...]]:
    """What launches tell a driver but for addresses, which are those of other memory."""
    return [
        (
            each.kernel.name, each.grid, each.threads, each.shared_bytes,
            [part for part in each.parameters if len(part) < ADDRESS_BYTES],
        )
        for each in launches
    ]  # fmt: skip


def main() -> None:
    """Try out every launch."""
    wrong = []
    for part in PARTS:
        count, faults = dry_run(calls(part, small=False))
        print(f"{part}: {count} launches", *faults, sep="\n", flush=True)
        wrong += faults
    if wrong:
        sys.exit(f"{len(wrong)} calls of operators would fail on a GPU")


if __name__ == "__main__":
    typer.run(main)
