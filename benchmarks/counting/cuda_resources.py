"""What every CUDA kernel takes of a GPU that is not here.

`python -m benchmarks.counting.cuda_resources` compiles csrc/cuda for each architecture with the
nvcc at hand, against the headers of a torch that need not have CUDA, and writes registers, spilled
bytes, shared memory and matrix instructions to benchmarks/results/cuda-resources.md. Fails on a
spill.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .. import records
from . import resource_table
from .resource_table import Resources

CSRC = records.RESULTS.parent.parent / "csrc"
OUT = records.RESULTS / "cuda-resources.md"
SHARED_KIB = {
    "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227,
    "sm_120": 99, "sm_121": 99,
}  # fmt: skip
"""What one block may ask for, by architecture."""
RESERVED = {arch: 0 if arch in ("sm_80", "sm_86", "sm_89") else 1024 for arch in SHARED_KIB}
"""Bytes that the system takes beside that, and that cuobjdump counts to each kernel."""
KERNELS = ("float16", "bfloat16", "float32")
"""The sources with kernels; the others hold no device code."""
FLAGS = ("-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000")
MATRIX_KERNELS = ("attention", "em_fused", "em_responsibilities", "em_products", "nearest_kernel")


def nvcc() -> str | None:
    """The compiler, from CUDA_HOME or the path."""
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=f"{toolkit}/bin{os.pathsep}{os.environ['PATH']}")


def cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton brings."""
    beside = [str(Path(nvcc() or "").parent), os.environ["PATH"]]
    try:
        import triton.backends.nvidia

        beside.append(str(Path(triton.backends.nvidia.__file__).parent / "bin"))
    except ImportError:
        pass
    return shutil.which("cuobjdump", path=os.pathsep.join(beside))


def missing() -> str | None:
    """Why the kernels cannot be compiled and looked at here; None if they can."""
    if nvcc() is None:
        return "nvcc is not found; install the CUDA toolkit, or set CUDA_HOME"
    if cuobjdump() is None:
        return "cuobjdump is not found; install the CUDA toolkit's, or triton"
    if shutil.which("c++filt") is None:
        return "c++filt is not found; install binutils"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return f"torch is {torch.__version__}; the extension needs 2.10 or newer"
    return None


def run(*command: object, text: str | None = None, path: str = "") -> str:
    """The command's output, given `text`, with `path` before the folders for commands."""
    folders = f"{path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [str(part) for part in command],
        input=text, capture_output=True, text=True, check=False, env=os.environ | {"PATH": folders},
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def version() -> str:
    """Of nvcc, as it is written to the table."""
    found = re.search(r"release \S+ V(\S+)", run(nvcc(), "--version"))
    assert found is not None
    return f"nvcc {found[1]}"


def dynamic_shared(scratch: Path, archs: Sequence[str]) -> dict[tuple[str, str, int], int]:
    """The bytes that a launch asks for, by architecture, kernel and number in its template."""
    program = scratch / "shared_memory"
    source = Path(__file__).parent / "cuda_shared_memory.cu"
    run(nvcc(), *FLAGS, "-O0", "-arch=sm_90", "-I", CSRC / "include", source, "-o", program)
    sizes: dict[tuple[str, str, int], int] = {}
    for arch in archs:
        for line in run(program, SHARED_KIB[arch] * 1024).splitlines():
            kernel, number, size = line.split()
            place = (arch, kernel, int(number))
            sizes[place] = max(int(size), sizes.get(place, 0))
    return sizes


def compiled(source: Path, scratch: Path, archs: Sequence[str]) -> Path:
    """The object of one source, for all of these architectures if it has kernels."""
    target = scratch / f"{source.stem}.o"
    archs = archs if source.stem in KERNELS else ["sm_90"]
    codes = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in archs]
    torch_headers = Path(torch.__file__).parent / "include"
    includes = ["-I", CSRC / "include", "-isystem", torch_headers]
    run(nvcc(), *FLAGS, *codes, *includes, "-Xcompiler", "-fPIC", "-c", source, "-o", target)
    return target


def by_kernel(listing: str, arch: str, pattern: str) -> dict[str, str]:
    """What follows each kernel's name in a listing of cuobjdump, for one architecture."""
    sections = re.split(r"\narch = ", run("c++filt", text=listing))
    found: dict[str, str] = {}
    for section in sections[1:]:
        if section.split()[0] == arch:
            names = re.split(pattern, section)[1:]
            found.update(zip(names[::2], names[1::2], strict=True))
    return {
        re.sub(r"^void ", "", re.sub(r"\(stem::.*", "", name)).replace("stem::", ""): text
        for name, text in found.items()
    }


def measure() -> list[Resources]:
    """Compiles everything; all kernels of all architectures."""
    archs = tuple(SHARED_KIB)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sources = sorted((CSRC / "cuda").glob("*.cu"), key=lambda path: path.stem not in KERNELS)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            shared = pool.submit(dynamic_shared, scratch, archs)
            objects = list(pool.map(lambda source: compiled(source, scratch, archs), sources))
        for target in objects:
            if target.stem not in KERNELS:
                usage = run(cuobjdump(), "--dump-resource-usage", target)
                assert "Function" not in usage, f"{target.stem}.cu has kernels: add it to KERNELS"
        with_kernels = [target for target in objects if target.stem in KERNELS]
        return kernels_of(with_kernels, archs, shared.result())


def architectures(library: Path) -> tuple[str, ...]:
    """Those of the table that a library holds code for."""
    listing = run(cuobjdump(), "--list-elf", library)
    return tuple(arch for arch in SHARED_KIB if f".{arch}.cubin" in listing)


def measure_library(library: Path, archs: Sequence[str]) -> list[Resources]:
    """All kernels that a library, built for these architectures, holds of them."""
    with tempfile.TemporaryDirectory() as folder:
        return kernels_of([library], archs, dynamic_shared(Path(folder), archs))


def kernels_of(
    objects: Sequence[Path], archs: Sequence[str], shared: dict[tuple[str, str, int], int]
) -> list[Resources]:
    """The objects' kernels, by name and in the order of `archs`."""
    found: dict[tuple[str, str], Resources] = {}
    for target in objects:
        usage = run(cuobjdump(), "--dump-resource-usage", target)
        # It calls nvdisasm, which lies beside it.
        code = run(cuobjdump(), "-sass", target, path=str(Path(cuobjdump() or "").parent))
        for arch in archs:
            numbers = by_kernel(usage, arch, r"Function (.*):\n")
            assembly = by_kernel(code, arch, r"Function : (.*)\n")
            for kernel, text in numbers.items():
                found[kernel, arch] = resources(kernel, arch, text, assembly[kernel], shared)
    return sorted(found.values(), key=lambda row: (row.kernel, archs.index(row.arch)))


def resources(
    kernel: str, arch: str, usage: str, assembly: str, shared: dict[tuple[str, str, int], int]
) -> Resources:
    registers, stack, static = (
        int(re.search(rf"{name}:(\d+)", usage)[1])  # type: ignore[index]
        for name in ("REG", "STACK", "SHARED")
    )
    name = kernel.split("<")[0]
    number = re.search(r", (\d+)>", kernel)
    dynamic = shared.get((arch, name, int(number[1]) if number else 0), 0)
    own = static - RESERVED[arch] + dynamic
    return Resources(kernel, arch, registers, stack, own, assembly.count("HMMA"))


def sources() -> str:
    """A hash of the kernels' code, whatever its comments and spaces."""
    digest = hashlib.sha256()
    for path in sorted([*CSRC.glob("cuda/*"), *CSRC.glob("include/stem/*.cuh")]):
        code = re.sub(r"//.*", "", path.read_text())
        digest.update(f"{path.name}\n{' '.join(code.split())}\n".encode())
    return digest.hexdigest()[:12]


def heading() -> str:
    """The first line of the table: which compiler, and which sources."""
    return (
        f"{version()}; sources `{sources()}`; written by "
        "`python -m benchmarks.counting.cuda_resources`. Shared memory is that of the largest "
        "launch."
    )


if __name__ == "__main__":
    reason = missing()
    if reason is not None:
        sys.exit(reason)
    found = measure()
    OUT.write_text(resource_table.text(heading(), found))
    print(OUT.read_text())
    spilled = [row for row in found if row.spilled_bytes > 0]
    if spilled:
        sys.exit(f"{len(spilled)} kernels spill registers: {spilled}")
