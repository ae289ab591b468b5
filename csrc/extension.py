"""Compiles the extension, for setup.py.

The CPU part is built where a C++ compiler and torch >= 2.10 are, the CUDA part where that torch
has CUDA and nvcc is there (no GPU is needed). What cannot be built is left out, as is all with
STEM_SKIP_EXT=1, and `python -m stem_kernels.info` says why. STEM_REQUIRE_EXT=1 makes an error of a
missing CPU part, and of a CUDA part that fails; STEM_CUDA=1 builds the CUDA part with any torch,
and makes an error of a missing one.
CXX, CUDA_HOME and TORCH_CUDA_ARCH_LIST (as "8.0;9.0a+PTX") mean what they mean elsewhere.

The objects hold torch operators and no Python module, so they serve every Python; they use only
torch's stable ABI, so they serve every torch from 2.10 on.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 10)
FLAGS = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
CPU_FLAGS = [*FLAGS, "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
# Name of the kernels: floats in a register, and what the compiler needs for them.
INSTRUCTIONS: dict[str, tuple[int, list[str]]] = {"baseline": (4, [])}
if platform.machine() == "x86_64":
    wide = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")]
    INSTRUCTIONS |= {"avx2": (8, ["-mavx2", "-mfma"]), "avx512": (16, ["-mavx2", "-mfma", *wide])}
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")


class NotBuiltError(Exception):
    """Why a part of the extension is not built: something is missing."""


class FailedError(NotBuiltError):
    """All was there, and yet it failed."""


class Torch(NamedTuple):
    version: str
    cuda: str | None
    folder: str


class Part(NamedTuple):
    """What makes one object: commands that may run at once, then commands in their order."""

    compilations: list[list[object]]
    links: list[list[object]]
    report: dict[str, str]


@functools.cache
def find_torch() -> Torch:
    """The torch of the environment that the package is installed into.

    pip builds in an environment of its own, but runs it with the same interpreter: without the
    variables that hide them, the packages installed for that one are there.
    """
    ask = "import json, torch as t; print(json.dumps([t.__version__, t.version.cuda, *t.__path__]))"
    hiding = ("PYTHONPATH", "PYTHONNOUSERSITE")
    outside = {name: value for name, value in os.environ.items() if name not in hiding}
    for environment in (dict(os.environ), outside):
        command = [sys.executable, "-c", ask]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return Torch(*json.loads(done.stdout.splitlines()[-1]))
    why = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    raise NotBuiltError(f"torch could not be imported where the package was built ({why})")


def tools() -> tuple[Torch, list[str]]:
    """The torch that the extension is built with; the C++ compiler's command."""
    if os.environ.get("STEM_SKIP_EXT") == "1":
        raise NotBuiltError("it was left out (STEM_SKIP_EXT=1)")
    torch = find_torch()
    if tuple(map(int, torch.version.split(".")[:2])) < OLDEST_TORCH:
        raise NotBuiltError(f"torch was {torch.version}; it needs 2.10 or newer")
    asked = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    for command in map(shlex.split, asked):
        if command and shutil.which(command[0]):
            return torch, command
    raise NotBuiltError(f"there is no C++ compiler ({', '.join(asked)}); install g++, or set CXX")


def run(command: list[object]) -> str:
    """The command's output; its errors are a reason."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(done.stderr)
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise FailedError(
            f"{Path(str(command[0])).name} failed with exit status {done.returncode}: "
            f"{errors[0].strip()[:500] or 'it printed nothing'}"
        )
    return done.stdout


def cpu_part(target: Path, scratch: Path) -> Part:
    torch, cxx = tools()
    includes = ["-I", CSRC / "include", "-isystem", Path(torch.folder, "include")]
    jobs: dict[str, tuple[str, list[str]]] = {"bindings": ("bindings.cpp", [])}
    sources = ("dispatch", "tensors", "em", "attention", "partial", "nearest")
    jobs |= {name: (f"cpu/{name}.cpp", []) for name in sources}
    for name, (lanes, flags) in INSTRUCTIONS.items():
        jobs[name] = ("cpu/kernels.cpp", [f"-DSTEM_ISA={name}", f"-DSTEM_LANES={lanes}", *flags])
    objects = [scratch / f"{name}.o" for name in jobs]
    compilations = [
        [*cxx, *CPU_FLAGS, *flags, *includes, "-c", CSRC / source, "-o", to]
        for (source, flags), to in zip(jobs.values(), objects, strict=True)
    ]
    link = [*cxx, "-shared", *objects, "-L", Path(torch.folder, "lib"), "-ltorch_cpu", "-o", target]
    compiler = run([*cxx, "--version"]).splitlines()[0]
    report = {"compiler": compiler, "flags": shlex.join(CPU_FLAGS), "torch": torch.version}
    return Part(compilations, [link], report)


def cuda_part(target: Path, scratch: Path) -> Part:
    torch, cxx = tools()
    if torch.cuda is None and os.environ.get("STEM_CUDA") != "1":
        raise NotBuiltError(f"torch was {torch.version}, without CUDA; STEM_CUDA=1 builds it too")
    home = Path(torch.folder)
    includes = ["-I", CSRC / "include", "-isystem", home / "include"]
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{toolkit}/bin{os.pathsep}{os.environ['PATH']}")
    if nvcc is None:
        raise NotBuiltError("nvcc is not found; install the CUDA toolkit, or set CUDA_HOME")
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    flags = [*FLAGS, "-DUSE_CUDA", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"]
    flags += ["-ccbin", cxx[0], *gencode(run([nvcc, "--list-gpu-arch"]))]
    objects = [scratch / f"{source.stem}.cu.o" for source in sources]
    compilations = [
        [nvcc, *flags, *includes, "-c", source, "-o", to]
        for source, to in zip(sources, objects, strict=True)
    ]
    libraries = ["-L", home / "lib", "-L", scratch, "-Xlinker", "--no-as-needed", "-ltorch_cpu"]
    links = [[nvcc, "-shared", *flags, *objects, *libraries, "-ltorch_cuda", "-o", target]]
    if not (home / "lib" / "libtorch_cuda.so").exists():
        # A torch without CUDA lacks the library whose name the object must ask for.
        library = scratch / "libtorch_cuda.so"
        named = f"-Wl,-soname,{library.name}"
        links.insert(0, [*cxx, "-shared", "-x", "c++", "/dev/null", named, "-o", library])
    compiler = run([nvcc, "--version"]).splitlines()[-2]
    report = {"compiler": compiler, "flags": shlex.join(flags), "torch": torch.version}
    return Part(compilations, links, report)


def gencode(listed: str) -> list[str]:
    """Flags for the architectures asked for, or for those that this nvcc knows."""
    known = set(re.findall(r"compute_(\d+)", listed))
    wanted = [arch for arch in ARCHITECTURES if arch.rstrip("a") in known]
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", ";".join(wanted) + "+PTX")
    flags = []
    for entry in re.split(r"[;\s]+", asked.strip()):
        arch = entry.removesuffix("+PTX").replace(".", "")
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        if entry.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{arch},code=compute_{arch}"]
    return flags


def build_extension(package: Path) -> None:
    """Put the objects, and the report on them, into the folder of the package.

    Raises:
        SystemExit: what STEM_REQUIRE_EXT=1 or STEM_CUDA=1 asks for could not be built.
    """
    start = time.monotonic()
    missing: dict[str, NotBuiltError] = {}
    parts: dict[str, Part] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, plan in (("cuda", cuda_part), ("cpu", cpu_part)):  # what takes longest goes first
            target = package / f"_ext_{name}.so"
            target.unlink(missing_ok=True)
            try:
                parts[name] = plan(target, Path(scratch))
            except NotBuiltError as error:
                missing[name] = error
        missing |= make(parts)
    report = {
        name: {"reason": str(missing[name])} if name in missing else parts[name].report
        for name in ("cpu", "cuda")
    }
    (package / "_build_info.json").write_text(json.dumps(report, indent=2) + "\n")
    outcomes: dict[str, list[str]] = {}
    for name, found in report.items():
        outcome = f"not built: {found['reason']}" if "reason" in found else "built"
        outcomes.setdefault(outcome, []).append(name)
    said = "; ".join(f"{' and '.join(names)} {outcome}" for outcome, names in outcomes.items())
    print(f"stem_kernels: C++ extension, {time.monotonic() - start:.0f} s: {said}")
    refuse_what_is_required(missing)


def make(parts: dict[str, Part]) -> dict[str, FailedError]:
    """Run the commands of all parts, a compilation on each core. Returns why parts failed."""
    failed = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiling = {
            name: [pool.submit(run, command) for command in part.compilations]
            for name, part in parts.items()
        }
        for name, jobs in compiling.items():
            try:
                for job in jobs:
                    job.result()
                for command in parts[name].links:
                    run(command)
            except FailedError as error:
                for job in jobs:
                    job.cancel()
                failed[name] = error
    return failed


def refuse_what_is_required(missing: dict[str, NotBuiltError]) -> None:
    """Make an error of what is missing and was asked for."""
    asked = {name: os.environ.get(name) == "1" for name in ("STEM_REQUIRE_EXT", "STEM_CUDA")}
    fatal = []
    for part, error in missing.items():
        if asked["STEM_REQUIRE_EXT"] and (part == "cpu" or isinstance(error, FailedError)):
            fatal.append(f"STEM_REQUIRE_EXT=1, but {error}")
        elif asked["STEM_CUDA"] and part == "cuda" and os.environ.get("STEM_SKIP_EXT") != "1":
            fatal.append(f"STEM_CUDA=1, but {error}")
    if fatal:
        raise SystemExit("; ".join(fatal))
