"""Compiles the extension, for setup.py.

The CPU part is built where a C++ compiler and torch >= 2.10 are, the CUDA part where that torch
has CUDA and nvcc is there (no GPU is needed). What cannot be built is left out, as is all with
STEM_SKIP_EXT=1, and `python -m stem_kernels.info` says why. STEM_REQUIRE_EXT=1 makes an error of a
missing CPU part, and of a CUDA part that fails; STEM_CUDA=1 builds the CUDA part with any torch,
and makes an error of a missing one.
CXX, CUDA_HOME and TORCH_CUDA_ARCH_LIST (as "8.0;9.0+PTX" or "Ampere;Hopper") mean what they mean
elsewhere; architectures before 8.0 are left out, and the letter of "9.0a", as no kernel needs it.

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
    narrow = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTIONS |= {"avx2": (8, narrow), "avx512": (16, [*narrow, *wide])}
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
OLDEST_ARCHITECTURE = 80
# As torch.utils.cpp_extension reads them in TORCH_CUDA_ARCH_LIST.
NAMED_ARCHITECTURES = {
    "kepler+tesla": "3.7", "kepler": "3.5+PTX", "maxwell+tegra": "5.3", "maxwell": "5.0;5.2+PTX",
    "pascal": "6.0;6.1+PTX", "volta+tegra": "7.2", "volta": "7.0+PTX", "turing": "7.5+PTX",
    "ampere+tegra": "8.7", "ampere": "8.0;8.6+PTX", "ada": "8.9+PTX", "hopper": "9.0+PTX",
    "blackwell+tegra": "11.0", "blackwell": "10.0;10.3;12.0;12.1+PTX",
}  # fmt: skip


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
    sources = (
        "dispatch", "tensors", "em", "attention", "projected", "partial", "window", "nearest",
    )  # fmt: skip
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
    compiler = run([nvcc, "--version"]).splitlines()[-2]
    refuse_another_cuda(compiler, torch)
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    wanted = architectures(run([nvcc, "--list-gpu-arch"]))
    flags = [*FLAGS, "-DUSE_CUDA", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"]
    flags += [*host_compiler(cxx), *gencode(wanted)]
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
    report = {
        "compiler": compiler,
        "flags": shlex.join(flags),
        "torch": torch.version,
        "architectures": " ".join(capability(*each) for each in wanted.items()),
    }
    return Part(compilations, links, report)


def refuse_another_cuda(compiler: str, torch: Torch) -> None:
    """The objects hold the compiler's CUDA runtime, which the driver that suffices for torch's may
    be too old for."""
    release = re.search(r"release (\d+)\.", compiler)
    if torch.cuda is None or release is None:
        return
    found, own = release[1], torch.cuda.split(".")[0]
    if found != own:
        raise NotBuiltError(
            f"nvcc is of CUDA {found} and torch {torch.version} of CUDA {torch.cuda}; install the "
            f"toolkit of CUDA {own}, and set CUDA_HOME to it"
        )


def host_compiler(cxx: list[str]) -> list[str]:
    """nvcc's flags for the C++ compiler, without what launches it, as ccache does."""
    while len(cxx) > 1 and shutil.which(cxx[1]):
        cxx = cxx[1:]
    return ["-ccbin", cxx[0], *(part for flag in cxx[1:] for part in ("-Xcompiler", flag))]


def architectures(listed: str) -> dict[int, bool]:
    """Those asked for, such as 90, and whether PTX of each is kept, which newer GPUs can run.

    Without TORCH_CUDA_ARCH_LIST, or where it is empty, those that this nvcc knows, with PTX of the
    oldest and of the newest.

    Args:
        listed: What `nvcc --list-gpu-arch` prints.

    Raises:
        NotBuiltError: an entry is none, or all are too old.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    entries = [entry for entry in re.split(r"[;,\s]+", asked) if entry]
    if not entries:
        known = set(re.findall(r"compute_(\d+)", listed))
        own = [int(arch) for arch in ARCHITECTURES if arch in known]
        return {arch: arch in (OLDEST_ARCHITECTURE, own[-1]) for arch in own}
    found: dict[int, bool] = {}
    old = []
    for entry in entries:
        for part in NAMED_ARCHITECTURES.get(entry.lower(), entry).split(";"):
            arch = re.fullmatch(r"(\d+)\.?(\d)[af]?(\+PTX)?", part)
            if arch is None:
                names = ", ".join(name.title() for name in NAMED_ARCHITECTURES)
                raise NotBuiltError(
                    f"TORCH_CUDA_ARCH_LIST has {entry!r}; its entries are such as 8.0, 9.0+PTX, "
                    f"or {names}"
                )
            number = int(arch[1] + arch[2])
            if number < OLDEST_ARCHITECTURE:
                old.append(part)
            else:
                found[number] = found.get(number, False) or arch[3] is not None
    if not found:
        raise NotBuiltError(f"TORCH_CUDA_ARCH_LIST is {asked!r}; the kernels need 8.0 or newer")
    if old:
        print(
            f"stem_kernels: {', '.join(old)} of TORCH_CUDA_ARCH_LIST left out: the kernels need "
            "8.0 or newer"
        )
    return found


def capability(arch: int, ptx: bool) -> str:
    """An architecture as TORCH_CUDA_ARCH_LIST has it, such as "9.0+PTX"."""
    major, minor = divmod(arch, 10)
    return f"{major}.{minor}{'+PTX' if ptx else ''}"


def gencode(wanted: dict[int, bool]) -> list[str]:
    """nvcc's flags for these architectures."""
    codes = [f"arch=compute_{arch},code=sm_{arch}" for arch in wanted]
    codes += [f"arch=compute_{arch},code=compute_{arch}" for arch, ptx in wanted.items() if ptx]
    return [part for code in codes for part in ("-gencode", code)]


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
