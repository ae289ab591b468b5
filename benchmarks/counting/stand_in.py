"""Triton's own launcher on a GPU that is not here: every launch is packed, told and judged.

Below the launcher stands a library that answers CUDA's driver calls (stand_in_driver.c), compiled
for it. What a kernel takes is read from its machine code, what it is given from the launch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton.backends.nvidia
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher

ARCH = 90
DEVICE = 1000 + ARCH
"""Triton keeps kernels by a device's number; no other driver here has this one."""
SHARED_BYTES, REGISTERS = 232448, 65536
PARAMETER, THREADS, REGISTER_COUNT = 0x17, 0x10, 0x2F
"""Attributes of a kernel, which cuobjdump calls EIATTR_KPARAM_INFO, _REQNTID and _REGCOUNT."""
WITH_A_LENGTH = 4
LARGEST_GRID = (2**31 - 1, 65535, 65535)
FORMATS = {"i1": "i", "i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}
"""How `struct` packs a number of a signature."""
POINTER = "Q"
SOURCE = Path(__file__).with_name("stand_in_driver.c")
INCLUDE = Path(triton.backends.nvidia.__file__).with_name("include")


class LaunchError(RuntimeError):
    """A launch that a GPU would refuse, or that gives a kernel what it was not compiled for."""


@dataclass(frozen=True)
class Taken:
    """What a kernel takes: bytes of its parameters, registers a thread, threads of a block."""

    name: str
    sizes: tuple[int, ...]
    registers: int
    threads: int


@dataclass(frozen=True)
class Packed:
    """A launch as the driver is given it; `parameters` are the bytes of each."""

    kernel: Taken
    grid: tuple[int, ...]
    threads: int
    shared_bytes: int
    parameters: tuple[bytes, ...]


class _Config(ctypes.Structure):
    """The beginning of CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
    ]


_Loaded = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p)
)
_Launched = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(_Config), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
)


class StandInDriver(CudaDriver):
    """Triton's driver of CUDA on an H100 that is not here; see `driver`.

    Attributes:
        packed: Every launch that was packed.
    """

    def __init__(self) -> None:
        self.packed: list[Packed] = []
        self._kernels: list[Taken] = []
        self._callbacks = (_Loaded(self._loaded), _Launched(self._launched))
        with tempfile.TemporaryDirectory() as folder:
            library = _library(Path(folder))
            library.stand_in_tell(*self._callbacks)
            with knobs.nvidia.scope():
                knobs.nvidia.libcuda_path = folder
                super().__init__()
        # In place of torch.cuda's, which Triton's driver has just taken.
        self.get_current_device = lambda: DEVICE
        self.get_current_stream = lambda device: 0
        self.launcher_cls = functools.partial(_Launcher, self)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)

    def _loaded(self, cubin: int, name: bytes, kernel: Any) -> int:
        self._kernels.append(taken(cubin, name.decode()))
        kernel[0] = len(self._kernels)
        return 0

    def _launched(self, config: Any, kernel: int, parameters: Any) -> int:
        found, given = self._kernels[kernel - 1], config.contents
        parts = (
            ctypes.string_at(parameters[place], size) for place, size in enumerate(found.sizes)
        )
        threads = given.block[0] * given.block[1] * given.block[2]
        packed = Packed(found, tuple(given.grid), threads, given.shared_bytes, tuple(parts))
        self.packed.append(packed)
        return 0


@functools.cache
def driver() -> StandInDriver:
    """The stand-in; a process has one, as Triton keeps compiled kernels together with its launcher.

    Raises:
        RuntimeError: this process has CUDA's own driver, or there is no C compiler.
    """
    return StandInDriver()


def _library(folder: Path) -> ctypes.CDLL:
    """The library, loaded so that whatever asks for CUDA's driver by its name gets it."""
    try:
        ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD)
    except OSError:
        pass
    else:
        raise RuntimeError("CUDA's own driver is loaded in this process; a GPU needs no stand-in")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("there is no C compiler; install gcc, or set CC to one")
    path = folder / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{INCLUDE}"]
    subprocess.run([*command, "-o", str(path), str(SOURCE)], check=True)
    return ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_GLOBAL)


class _Launcher:
    """Triton's launcher of one kernel, with a judge."""

    def __init__(self, driver: StandInDriver, source: Any, metadata: Any) -> None:
        self._driver, self._source = driver, source
        self._launch = CudaLauncher(source, metadata)

    def __call__(self, *given: Any) -> None:
        count = len(self._driver.packed)
        arguments = given[9:]
        if len(arguments) != len(self._source.signature):
            wanted = len(self._source.signature)
            raise LaunchError(f"{len(arguments)} arguments; the kernel has {wanted}")
        self._launch(*given)
        if len(self._driver.packed) != count + 1:
            raise LaunchError(f"a grid of {given[:3]} launches nothing")
        packed = self._driver.packed[-1]
        found = [*_misfits(packed), *_mistaken(self._source, arguments, packed)]
        if found:
            raise LaunchError(f"{packed.kernel.name}: {'; '.join(found)}")


def _misfits(packed: Packed) -> Iterator[str]:
    """Why a GPU would refuse a launch."""
    for axis, (size, most) in enumerate(zip(packed.grid, LARGEST_GRID, strict=True)):
        if not 0 < size <= most:
            yield f"{size} programs along axis {axis} of the grid; it has 1 to {most}"
    if packed.threads != packed.kernel.threads:
        yield f"{packed.threads} threads; it was compiled for {packed.kernel.threads}"
    if packed.shared_bytes > SHARED_BYTES:
        yield f"{packed.shared_bytes} bytes of shared memory; a block has {SHARED_BYTES}"
    if packed.threads * packed.kernel.registers > REGISTERS:
        yield f"{packed.kernel.registers} registers for {packed.threads} threads each"


def _mistaken(source: Any, arguments: Sequence[Any], packed: Packed) -> Iterator[str]:
    """In what the arguments, or what was packed of them, are not what the kernel takes."""
    expected = []
    for place, (name, kind) in enumerate(source.signature.items()):
        argument = arguments[place]
        if kind == "constexpr":
            constant = source.constants[(place,)]
            if constant != argument:
                yield f"{name} is {argument}; it was compiled for {constant}"
            continue
        if kind.startswith("*"):
            argument = argument.data_ptr()
        for attribute, factor in source.attrs.get((place,), []):
            if attribute == "tt.divisibility" and argument % factor:
                yield f"{name} is {argument}; it was compiled for multiples of {factor}"
        try:
            packing = POINTER if kind.startswith("*") else FORMATS[kind]
            expected.append(struct.pack(packing, argument))
        except struct.error:
            yield f"{name} is {argument}, no {kind}"
            return
    expected += [bytes(8), bytes(8)]  # the memory of a grid and of a profiler, which none asks for
    sizes = tuple(map(len, expected))
    if sizes != packed.kernel.sizes:
        yield f"parameters of {sizes} bytes; it takes {packed.kernel.sizes}"
    elif tuple(expected) != packed.parameters:
        yield f"the launcher packed {packed.parameters} of {expected}"


def taken(cubin: int, kernel: str) -> Taken:
    """What a kernel takes, from its machine code.

    Args:
        cubin: Address of an ELF file for NVIDIA's GPUs.
        kernel: Name of the kernel.
    """
    header = struct.Struct("<40xQ10xHHH").unpack(ctypes.string_at(cubin, 64))
    table, size, count, names_place = header
    # Of every section: its name, offset and length.
    section = struct.Struct("<I20xQQ24x")
    sections = [
        section.unpack(ctypes.string_at(cubin + table + size * place, size))
        for place in range(count)
    ]
    _, begin, length = sections[names_place]
    names = ctypes.string_at(cubin + begin, length)
    contents = {
        names[name : names.index(b"\0", name)].decode(): ctypes.string_at(cubin + begin, length)
        for name, begin, length in sections
        if names[name:].startswith(b".nv.info")
    }
    sizes, threads, registers = {}, 0, 0
    for attribute, value in _attributes(contents[f".nv.info.{kernel}"]):
        if attribute == PARAMETER:
            _, ordinal, _, flags = struct.unpack("<IHHI", value)
            sizes[ordinal] = flags >> 18
        elif attribute == THREADS:
            threads, _, _ = struct.unpack("<III", value)
    for attribute, value in _attributes(contents[".nv.info"]):
        if attribute == REGISTER_COUNT:
            registers = max(registers, struct.unpack("<II", value)[1])
    return Taken(kernel, tuple(sizes[place] for place in sorted(sizes)), registers, threads)


def _attributes(section: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes of a section of a cubin and their values."""
    place = 0
    while place < len(section):
        form, attribute, length = struct.unpack_from("<BBH", section, place)
        place += 4
        if form == WITH_A_LENGTH:
            yield attribute, section[place : place + length]
            place += length
