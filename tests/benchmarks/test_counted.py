"""What counts kernels from their machine code: the parser, the model, and launches recorded."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks import records
from benchmarks.cases import operators
from benchmarks.counting import counted_report
from benchmarks.counting.counted import CASES, OUT, resident_blocks
from benchmarks.counting.forms import DTYPES, forms
from benchmarks.counting.launches import Launch, launches
from benchmarks.counting.sass import Instruction, narrow, parse, spills
from benchmarks.counting.scoreboard import STAGGER, Step, clocks, occupied, step
from stem_kernels import em_statistics

LISTING = """
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P1 BRA `(.L_x_2) ;
.L_x_0:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0030*/               @P1 LDG.E.U16 R8, desc[UR4][R2.64+0x40] ;
        /*0040*/                   FFMA R9, R4, R5, -R9 ;
        /*0050*/                   MUFU.EX2 R10, R9 ;
        /*0060*/                   STL [R1], R10 ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
        /*0080*/                   STG.E [R2.64], R10 ;
        /*0090*/               @P2 BRA `(.L_x_0) ;
.L_x_2:
        /*00a0*/               @P3 EXIT ;
        /*00b0*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00c0*/                   EXIT ;
.L_x_3:
        /*00d0*/                   BRA `(.L_x_3);
"""


def line(op: str, operands: str, predicate: str = "") -> Instruction:
    return Instruction(0, predicate, op, operands)


def test_the_parser_finds_the_innermost_loop_and_the_end() -> None:
    listing = parse(LISTING)
    (loop,) = (lines for lines in listing.loops() if len(lines) > 1)
    assert [each.op for each in loop] == ["LDG.E.U16", "FFMA", "MUFU.EX2", "STL", "BRA"]
    assert (loop[0].predicate, loop[0].bytes) == ("P1", 2)
    assert spills(loop) == 1
    assert listing.body()[-1].address == 0xC0


def test_wide_moves_are_not_narrow() -> None:
    for op in ("LDG.E", "LDG.E.U8", "LDGSTS.E", "STG.E.U16"):
        assert narrow([line(op, "[R2.64]")] * 4) == 0  # a bias and the like
        assert narrow([line(op, "[R2.64]")] * 5) == 5
    for op in ("LDG.E.64", "STG.E.128", "LDGSTS.E.BYPASS.128", "LDS.U16"):
        assert narrow([line(op, "[R2.64]")] * 5) == 0


def test_what_an_instruction_reads_writes_and_holds() -> None:
    fma = step(line("FFMA", "R9, R4, UR5, -R9", "!P1"))
    assert (fma.pipe, fma.clocks, fma.writes) == ("fp32", 1, ("R9",))
    assert set(fma.reads) == {"P1", "R4", "UR5", "R9"}
    load = step(line("LDG.E.128", "R4, desc[UR4][R2.64]"))
    assert load.writes == ("R4", "R5", "R6", "R7")
    compare = step(line("ISETP.GE.AND", "P0, PT, R3, R4, PT"))
    assert compare.writes == ("P0",)
    store = step(line("STG.E.128", "desc[UR4][R2.64], R24"))
    assert {"R2", "R24", "R27"} <= set(store.reads)
    assert store.writes == ()
    held = step(line("HGMMA.64x32x16.F32", "R72, gdesc[UR16], RZ, !UPT, gsb0"))
    assert (held.clocks, held.ends_group) == (24, True)  # shared memory gives both sides
    fed = step(line("HGMMA.64x128x16.F32", "R72, R40, gdesc[UR16], R72"))
    assert (fed.clocks, fed.ends_group) == (64, False)
    assert {"R40", "R43", "UR16"} <= set(fed.reads)
    assert occupied([fma, load, held]) == {"issue": 3, "fp32": 1, "shared": 16, "tensor": 24}


def operation(
    pipe: str = "", clocks: float = 0, latency: float = 0, reads: str = "", writes: str = ""
) -> Step:
    return Step("OP", pipe, clocks, latency, tuple(reads.split()), tuple(writes.split()))


def test_the_model_issues_one_instruction_a_clock() -> None:
    free = [operation()] * 10
    assert clocks(free, 1, 1) == 10
    assert clocks(free, 1, 4) == 40


def test_the_model_waits_for_operands_and_hides_that_by_other_warps() -> None:
    chain = [
        operation("integer", 1, 20, "R0", "R1"), operation("integer", 1, 20, "R1", "R2")
    ]  # fmt: skip
    assert clocks(chain, 1, 1) == 21
    assert clocks(chain, 1, 2) == 22


def test_the_model_waits_for_a_pipe_that_is_held() -> None:
    assert clocks([operation("exp2", 8)] * 3, 1, 1) == 17
    assert clocks([operation("exp2", 8), operation("fp32", 1)], 1, 2) == 10


def test_products_run_beside_the_rest_until_they_are_waited_for() -> None:
    product = step(line("HGMMA.64x128x16.F32", "R72, R40, gdesc[UR16], R72, gsb0"))
    wait = step(line("WARPGROUP.DEPBAR.LE", "gsb0, 0x0"))
    behind = step(line("WARPGROUP.DEPBAR.LE", "gsb0, 0x1"))
    between = [operation()] * 20
    assert clocks([product, *between, wait], 1, 1) == 64 + 30 + 1
    assert clocks([product, *between], 1, 1) == 21
    assert clocks([product, behind, *between], 1, 1) == 22
    assert clocks([product, product, behind], 1, 1) == 64 + 30 + 1


def test_copies_are_waited_for_by_groups() -> None:
    copy = step(line("LDGSTS.E.BYPASS.128", "[R5], desc[UR4][R2.64]"))
    commit, wait = step(line("LDGDEPBAR", "")), step(line("DEPBAR.LE", "SB0, 0x0"))
    behind = step(line("DEPBAR.LE", "SB0, 0x1"))
    assert clocks([copy, commit, wait], 1, 1) == 601
    assert clocks([copy, commit, behind], 1, 1) == 3


def test_a_barrier_holds_a_block_and_no_other() -> None:
    barrier = step(line("BAR.SYNC.DEFER_BLOCKING", "0x0"))
    slow = [operation("integer", 1, 50, "", "R1"), operation("integer", 1, 1, "R1", "R2")]
    assert clocks([barrier, operation()], 1, 1) == 19
    # The second warp comes to the barrier at clock 53.
    assert clocks([*slow, barrier, operation()], 1, 2) == 53 + 18 + 2
    assert clocks([barrier, operation()], 2, 1) == STAGGER + 19


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [(255, 0, 4, 2), (255, 0, 8, 1), (128, 0, 4, 4), (64, 120_000, 4, 1), (16, 0, 2, 32)],
)
def test_blocks_of_a_multiprocessor(registers: int, shared: int, warps: int, blocks: int) -> None:
    assert resident_blocks(registers, shared, warps) == blocks


def recorded(width: int, *, heads: int = 0) -> Launch:
    """The pass of EM over 4,096 tokens, one head after another or beside one another."""
    shape = (2, 4096, heads, width) if heads else (2, 4096, width)
    features = torch.empty(shape, dtype=torch.float16)
    features = features.transpose(1, 2) if heads else features
    bases = torch.empty(*features.shape[:-2], 256, width, dtype=torch.float16)
    found = launches(90, lambda: em_statistics(features, bases, backend="triton"))
    kernel = "fused_rows" if width == 40 else "fused"
    assert [launch.name for launch in found] == ["directions", kernel, "update"]
    return found[1]


def test_a_launch_is_recorded_as_triton_specialises_it() -> None:
    found = recorded(40)
    assert (found.name, found.arch, found.options["num_warps"]) == ("fused_rows", 90, 4)
    assert {"p_features", "stride_xb", "n"} <= divisible(found)
    assert found.arguments["stride_xn"] == 40
    assert "stride_xn" not in divisible(found)
    assert "stride_xn" in divisible(recorded(64))
    assert found.signature["stride_xd"] == "constexpr"  # of 1
    assert found.arguments["n"] == 4096


def divisible(launch: Launch) -> set[str]:
    """The arguments that Triton knows to be multiples of 16."""
    names = launch.kernel.arg_names
    return {names[place] for (place,), known in launch.attributes.items() if known}


def test_a_digest_is_of_what_is_compiled() -> None:
    found = recorded(40)
    assert found.digest() == recorded(40).digest()
    others = [
        recorded(64), recorded(40, heads=1), dataclasses.replace(found, arch=80),
        dataclasses.replace(found, options={**found.options, "num_warps": 8}),
    ]  # fmt: skip
    assert len({found.digest(), *(other.digest() for other in others)}) == 5


def test_every_case_of_the_suite_has_a_form() -> None:
    names = {form.name for dtype in DTYPES for form in forms(dtype)}
    suite = operators.cases(torch.device("cpu"), torch.float16, small=False)
    assert {case.name for case in suite} <= names
    assert set(CASES) <= names


def test_the_committed_table_is_of_the_committed_figures() -> None:
    results = records.read(OUT)
    assert OUT.with_suffix(".md").read_text() == counted_report.text(results)
    assert set(CASES) < set(results["before"])
