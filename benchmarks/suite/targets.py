"""The targets that this project has set itself, and whether a run of the suite met them.

Each is a ratio within one run on one machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..cases.attention import SDPA
from ..cases.bench import Row
from ..cases.editing import PRODUCTS
from ..cases.em import COMPILED, EAGER, FLASH_KMEANS, NUM_BASES

OURS = "triton"
PARTIAL_PROGRAMS = 264  # of an H100, two for each multiprocessor: each leaves a partial sum
FREE_BYTES = 32 * 2**20
EM = "soft_em d=40"
COMPARED = (
    EM,
    *(f"soft_em d={width}" for width in (320, 640, 1280)),
    *(f"basis attention d={width}" for width in (40, 80, 160)),
    *(f"projected attention d={width}" for width in (40, 80, 160)),
)
"""The CPU's cases in which the C++ extension has a target."""
PROFILED = (EM, "soft_em d=320", "basis attention d=40", "basis attention d=80")
"""Those of them that `make profile` measures for every dtype, by AVX-512 and by AVX2."""


class MissingError(LookupError):
    """A row that a target needs was not measured."""


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Args:
        what: Things compared.
        wanted: Bound in words.
        met: Function that says whether a ratio is within the bound.
        measured: Function that takes the ratio from the rows of a run.
    """

    what: str
    wanted: str
    met: Callable[[float], bool]
    measured: Callable[[Rows], float]


class Rows:
    """The rows of a run by case and contender."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = {(row.case, row.contender): row for row in rows}

    def __getitem__(self, key: tuple[str, str]) -> Row:
        row = self._rows.get(key)
        if row is None or row.seconds is None:
            raise MissingError(f"{key[1]} in {key[0]}")
        return row

    def seconds(self, case: str, contender: str) -> float:
        found = self[case, contender].seconds
        assert found is not None
        return found

    def over_floor(self, case: str, contender: str) -> float:
        floor = self[case, contender].floor_seconds
        if floor is None:
            raise MissingError(f"floor of {contender} in {case}")
        return self.seconds(case, contender) / floor

    def extra_bytes(self, case: str, contender: str) -> int:
        found = self[case, contender].extra_bytes
        if found is None:
            raise MissingError(f"extra memory of {contender} in {case}")
        return found

    def fastest(self, case: str, contenders: Sequence[str]) -> float:
        measured = [
            row.seconds
            for name in contenders
            if (row := self._rows.get((case, name))) is not None and row.seconds is not None
        ]
        if not measured:
            raise MissingError(f"any of {', '.join(contenders)} in {case}")
        return min(measured)


def over_floor(case: str) -> Callable[[Rows], float]:
    return lambda rows: rows.over_floor(case, OURS)


def speedup(case: str, ours: str, *theirs: str) -> Callable[[Rows], float]:
    return lambda rows: rows.fastest(case, theirs) / rows.seconds(case, ours)


def share_of_time(case: str, ours: str, theirs: str) -> Callable[[Rows], float]:
    return lambda rows: rows.seconds(case, ours) / rows.seconds(case, theirs)


def share_of_allowed(case: str) -> Callable[[Rows], float]:
    """The C++ extension's time over what it is allowed: two thirds of the torch backend's, or 1.3
    floors where that is longer, as no kernel is faster than the CPU's products."""

    return lambda rows: min(
        1.5 * rows.seconds(case, "cuda") / rows.seconds(case, "torch"),
        rows.over_floor(case, "cuda") / 1.3,
    )


def share_of_memory(case: str, ours: str, theirs: str) -> Callable[[Rows], float]:
    return lambda rows: rows.extra_bytes(case, ours) / rows.extra_bytes(case, theirs)


def matrix_share(case: str, flops: float, rate: float) -> Callable[[Rows], float]:
    return lambda rows: flops / rows.seconds(case, OURS) / rate


def extra_over_allowed(case: str, tokens_bytes: int, width: int) -> Callable[[Rows], float]:
    """Extra memory over 2 % of X, the partial sums and 32 MiB."""

    def measured(rows: Rows) -> float:
        partial = PARTIAL_PROGRAMS * NUM_BASES * (width + 1) * 4
        return rows.extra_bytes(case, OURS) / (0.02 * tokens_bytes + partial + FREE_BYTES)

    return measured


def at_least(bound: float) -> tuple[str, Callable[[float], bool]]:
    return f">= {bound:g}", lambda value: value >= bound


def at_most(bound: float) -> tuple[str, Callable[[float], bool]]:
    return f"<= {bound:g}", lambda value: value <= bound


def gpu_targets(matrix_rate: float) -> list[Target]:
    """Targets of a GPU; `matrix_rate` in FLOP/s is what it reaches in a large product."""
    key, feature = "em key d=40", "em feature d=320"
    layer, unet = "layer 64x64 N=32", "unet {0}x{0} N=32"
    return [
        Target("EM pass, key form, over its floor", *at_most(2.0), over_floor(key)),
        Target("... times faster than eager", *at_least(10), speedup(key, OURS, EAGER)),
        Target("... than torch.compile", *at_least(5), speedup(key, OURS, COMPILED)),
        Target(
            "EM pass, feature form, share of the measured matrix rate",
            *at_least(0.6),
            matrix_share(feature, 4.0 * 131072 * 320 * NUM_BASES, matrix_rate),
        ),
        Target(
            "EM pass against one iteration of flash-kmeans, d=64, times as fast",
            *at_least(1.0),
            speedup("em key d=64", OURS, FLASH_KMEANS),
        ),
        *(
            Target(
                f"basis attention, d={width}, times faster than the best SDPA",
                *at_least(1.3),
                speedup(f"basis attention d={width}", OURS, *SDPA),
            )
            for width in (40, 64, 80, 160)
        ),
        Target(
            "attention layer, R=5, times faster than per-frame dense",
            *at_least(2),
            speedup(layer, "stem R=5", "per-frame"),
        ),
        Target("... than all-frame dense", *at_least(60), speedup(layer, "stem R=5", "all-frame")),
        Target(
            "extra memory of an EM call, key form, over what is allowed",
            *at_most(1),
            extra_over_allowed(key, 2 * 8 * 131072 * 40, 40),
        ),
        Target(
            "extra memory of an EM call, feature form, over what is allowed",
            *at_most(1),
            extra_over_allowed(feature, 2 * 131072 * 320, 320),
        ),
        *(
            Target(
                f"C++ extension, {case}, share of Triton's time",
                *at_most(1.5),
                share_of_time(case, "cuda", OURS),
            )
            for case in (key, feature, "basis attention d=40", "basis attention d=160")
        ),
        *(
            Target(
                f"UNet step {side}x{side}, N=32, {kind}, share of per-frame dense",
                *at_most(bound),
                share_of_time(unet.format(side), kind, "per-frame"),
            )
            for side, kind, bound in (
                (512, "stem R=5", 0.90),
                (768, "stem R=5", 0.75),
                (1024, "stem R=5", 0.60),
                (512, "stem R=1", 0.85),
                (1024, "stem R=1", 0.52),
            )
        ),
        *(
            Target(
                f"UNet step 512x512, N={frames}, share of all-frame dense",
                *at_most(bound),
                share_of_time(f"unet 512x512 N={frames}", "stem R=5", "all-frame"),
            )
            for frames, bound in ((32, 1 / 7), (120, 1 / 20))
        ),
    ]


def cpu_targets() -> list[Target]:
    """Targets of a CPU."""
    return [
        Target(f"{EM}, times faster than eager", *at_least(5), speedup(EM, "torch", EAGER)),
        Target(
            f"{EM}, extra memory of eager over its own",
            *at_least(10),
            share_of_memory(EM, EAGER, "torch"),
        ),
        *(
            Target(
                f"C++ extension, {case}, over 2/3 of the torch backend's time or 1.3 floors",
                *at_most(1),
                share_of_allowed(case),
            )
            for case in COMPARED
        ),
        *(
            Target(
                f"nearest token, n={tokens}, {backend} backend, share of the products' time",
                *at_most(1.2),
                share_of_time(f"nearest token n={tokens}", backend, PRODUCTS),
            )
            for tokens in (4096, 8192)
            for backend in ("cuda", "torch")
        ),
    ]


def table(rows: Sequence[Row], targets: Sequence[Target]) -> str:
    """Markdown: what, measured, target, met."""
    lines = ["| | measured | target | met |", "|---|---|---|---|"]
    by_name = Rows(rows)
    for target in targets:
        try:
            value = target.measured(by_name)
        except MissingError as missing:
            measured, met = f"not measured: {missing}", ""
        else:
            measured, met = f"{value:.3g}", "yes" if target.met(value) else "**no**"
        lines.append(f"| {target.what} | {measured} | {target.wanted} | {met} |")
    return "\n".join(lines) + "\n"
