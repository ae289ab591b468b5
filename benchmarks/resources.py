"""What every Triton kernel takes of a GPU that is not here: `python -m benchmarks.resources`.

Compiles the kernels with the tiles of `stem_kernels/configs` for each compute capability, and
writes registers, spilled bytes, shared memory and matrix instructions to
benchmarks/results/triton-resources.md.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stem_kernels.triton.basis_attention import _basis_attention_kernel
from stem_kernels.triton.blended_attention import _blended_attention_kernel
from stem_kernels.triton.em_fused import LARGEST_BASES, _fused_kernel
from stem_kernels.triton.em_general import _logsumexp_kernel, _sums_kernel
from stem_kernels.triton.em_wide import _products_kernel, _responsibilities_kernel
from stem_kernels.triton.nearest_token import _nearest_token_kernel
from stem_kernels.triton.partial_attention import _partial_attention_kernel
from stem_kernels.triton.resident_attention import LARGEST_PART, _resident_kernel
from stem_kernels.tuning import rows_for, table, tile_for, two_tiles

from . import resource_table
from .resource_table import Resources

OUT = Path(__file__).parent / "results" / "triton-resources.md"
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227}
"""What one block may ask for, by compute capability."""
MATRIX_INSTRUCTIONS = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
FLOAT32 = (
    "p_logsumexp",
    "p_sums",
    "p_value_sums",
    "p_mass",
    "p_bias",
    "p_mask",
    "p_share",
    "p_largest",
)
INT32 = ("p_found",)
HALF_ONLY = ("em_fused", "em_wide", "resident_attention")
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


def compiled(
    kernel: Any, constants: dict[str, Any], options: dict[str, int], dtype: str, arch: int
) -> tuple[int, int, int, int]:
    """Registers, spilled bytes, shared bytes and matrix instructions of a kernel.

    Strides are taken as a launch on contiguous memory would specialise them: 1 along the channels,
    else multiples of 16.
    """
    constants = dict(constants)
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if re.fullmatch(r"stride_.d", name):
            constants[name] = 1
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            kinds = {**dict.fromkeys(FLOAT32, "*fp32"), **dict.fromkeys(INT32, "*i32")}
            signature[name] = kinds.get(name, f"*{dtype}")
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name == "scale":
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name.startswith("stride_") or name in ("n", "K", "tokens_per_split"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert usage is not None, report
    matrix = binary.asm["ptx"].count(MATRIX_INSTRUCTIONS.get(arch, "mma"))
    return int(usage[1]), int(usage[2]), binary.metadata.shared, matrix


def two_tile_case(op: str) -> tuple[int, dict[str, Any]]:
    """A width of the row "OP WIDTH", and the constants that follow from it."""
    width = int(op.split()[1])
    width = 40 if width == 48 else width  # what Stable Diffusion asks of that row
    main, rest = two_tiles(width)
    return width, {
        "D": width, "E": width, "D_MAIN": main, "D_REST": rest, "E_MAIN": main, "E_REST": rest,
        "FULL_K": True, "ALIGNED": True,
    }  # fmt: skip


def cases_of(
    op: str, row: dict[str, int], dtype: str = "fp16"
) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Name, kernel and constants of what one row of a table launches in "fp16" or "fp32"."""
    itemsize = {"fp16": 2, "fp32": 4}[dtype]
    shared = {"PRECISION": "ieee", "UPCAST": False}
    if op.startswith("em_fused"):
        width, both = two_tile_case(op)
        payload = op.endswith("payload")
        name = f"em_fused d={width}" + (" with payload" if payload else "")
        yield name, _fused_kernel, {
            "BLOCK_N": row["block_n"], "BLOCK_K": LARGEST_BASES, "WITH_SUMS": True,
            "WITH_VALUES": payload, "UNIT": 2.0**15, **both, **shared,
        }  # fmt: skip
    elif op == "em_general":
        for width in (320, 1280):
            block_d = tile_for(width, row["block_d"])
            blocks = {
                "BLOCK_N": row["block_n"], "BLOCK_K": row["block_k"], "BLOCK_D": block_d, **shared
            }  # fmt: skip
            yield f"em_general logsumexp d={width}", _logsumexp_kernel, blocks
            blocks = blocks | {"BLOCK_E": block_d, "WITH_MASS": True, "LOG_UNIT": 15.0}
            yield f"em_general sums d={width}", _sums_kernel, blocks
    elif op == "em_wide logits":
        yield "em_wide logits d=320", _responsibilities_kernel, {
            "D": 320, "BLOCK_N": row["block_n"], "BLOCK_K": LARGEST_BASES,
            "BLOCK_D": row["block_d"], "FULL_K": True, "UNIT": 2.0**15, **shared,
        }  # fmt: skip
    elif op == "em_wide products":
        main, rest = two_tiles(row["block_e"])
        yield "em_wide products d=320", _products_kernel, {
            "E": 320, "BLOCK_N": row["block_n"], "BLOCK_K": LARGEST_BASES, "E_MAIN": main,
            "E_REST": rest, "ADD": True, **shared,
        }  # fmt: skip
    elif op.startswith("resident_attention"):
        width, both = two_tile_case(op)
        yield f"resident_attention d={width}", _resident_kernel, {
            "BLOCK_N": row["block_n"], "BLOCK_K": LARGEST_PART, "TWO_PARTS": True,
            "WITH_BIAS": True, **both, **shared,
        }  # fmt: skip
    elif op == "nearest_token":
        yield "nearest_token d=320", _nearest_token_kernel, {
            "BLOCK_N": row["block_n"], "BLOCK_M": row["block_m"],
            "BLOCK_D": tile_for(320, 2 * row["block_d"] // itemsize), **shared,
        }  # fmt: skip
    elif op == "partial_attention":
        for width in (40, 64, 80, 160):
            padded = tile_for(width, 512)
            yield f"{op} d={width}", _partial_attention_kernel, {
                "BLOCK_M": rows_for(itemsize * padded, row["query_bytes"]),
                "BLOCK_N": rows_for(itemsize * padded, row["key_bytes"]),
                "BLOCK_D": padded, "BLOCK_E": padded, **shared,
            }  # fmt: skip
    elif op in ("basis_attention", "blended_attention"):
        both = {"basis": _basis_attention_kernel, "blended": _blended_attention_kernel}
        kernel = both[op.removesuffix("_attention")]
        for width in (40, 64, 80, 160):
            padded = tile_for(width, 512)
            yield f"{op} d={width}", kernel, {
                "BLOCK_N": rows_for(itemsize * padded, row["query_bytes"]),
                "BLOCK_K": rows_for(itemsize * padded, row["basis_bytes"]),
                "BLOCK_D": padded, "BLOCK_E": padded, "WITH_BIAS": True, **shared,
            }  # fmt: skip


def cases(
    arch: int, dtype: str = "fp16"
) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, int]]]:
    """Name, kernel, constants and launch options of all that a GPU runs in "fp16" or "fp32"."""
    for op, row in {**table("default"), **table(f"sm{arch}")}.items():
        if dtype == "fp32" and op.startswith(HALF_ONLY):
            continue
        options = {name: row[name] for name in ("num_warps", "num_stages")}
        for name, kernel, constants in cases_of(op, row, dtype):
            yield name, kernel, constants, options


def measure(arch: int, dtype: str = "fp16") -> list[Resources]:
    """All cases of one compute capability."""
    return [
        Resources(name, f"sm_{arch}", *compiled(kernel, constants, options, dtype, arch))
        for name, kernel, constants, options in cases(arch, dtype)
    ]


def text(found: list[Resources]) -> str:
    """The table in Markdown."""
    return resource_table.text(
        f"Triton {importlib.metadata.version('triton')}, float16, K = {LARGEST_BASES}; written by "
        "`python -m benchmarks.resources`.",
        found,
    )


if __name__ == "__main__":
    found = [row for arch in SHARED_KIB for row in measure(arch)]
    OUT.write_text(text(found))
    print(text(found))
