"""The CUDA kernels on a CPU: builds csrc/include/stem with the emulator, and calls it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch

from stem_kernels.shared.cosine import inverse_norms

HERE = Path(__file__).parent
CSRC = HERE.parents[3] / "csrc"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # as driver.cpp numbers them
NAN = float("nan")
OPERATORS = (
    "em_statistics", "soft_em", "basis_attention", "blended_attention", "nearest_token",
    "partial_attention",
)  # fmt: skip
SIZES = (
    "batch", "heads", "n", "bases", "dtype", "shared_limit", "multiprocessors", "chunk_bytes",
    "longest_sum",
)  # fmt: skip
MARGIN = 64  # numbers of a tensor's dtype


class Sizes(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in SIZES)


class Rows(ctypes.Structure):
    _fields_ = (
        ("p", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("stride_b", "stride_h", "stride_n", "width")),
    )


def rows(tensor: torch.Tensor | None) -> Rows:
    """Of [B, h, n, width]."""
    if tensor is None:
        return Rows(None, 0, 0, 0, 0)
    return Rows(tensor.data_ptr(), *tensor.stride()[:3], tensor.shape[3])


class Output:
    """Contiguous memory full of NaN, or of -1, with margins that a kernel must leave alone."""

    def __init__(self, *sizes: int, dtype: torch.dtype = torch.float32) -> None:
        count = torch.Size(sizes).numel()
        self.memory = torch.full((count + 2 * MARGIN,), 1234.0, dtype=dtype)
        self.tensor = self.memory[MARGIN : MARGIN + count].view(sizes)
        self.tensor.fill_(NAN if dtype.is_floating_point else -1)
        self.pointer = ctypes.c_void_p(self.tensor.data_ptr() if count else None)

    def result(self) -> torch.Tensor:
        margins = torch.cat([self.memory[:MARGIN], self.memory[-MARGIN:]])
        assert bool((margins == 1234.0).all()), "wrote outside of the result"
        return self.tensor


class Kernels:
    """The operators of csrc/include/stem, on CPU tensors; built in `folder`.

    Attributes:
        shared_limit: bytes of shared memory that the GPU gives a block.
        multiprocessors: number of them.
        extra_bytes: memory that the last em_statistics, nearest_token or partial_attention asked
            for.
        chunk_bytes: of responsibilities that are held at a time.
        longest_sum: additions that a float32 sum is made of at most.
    """

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("g++")
        assert compiler is not None
        target = folder / "kernels.so"
        sources = [HERE / "emulator.cpp", HERE / "driver.cpp"]
        flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-DSTEM_EMULATOR", "-Wall", "-Wextra"]
        includes = ["-Wno-unknown-pragmas", f"-I{CSRC / 'include'}", f"-I{HERE}"]
        if not target.exists():
            subprocess.run([compiler, *flags, *includes, *sources, "-o", target], check=True)
        self.library = ctypes.CDLL(str(target))
        for name in OPERATORS:
            getattr(self.library, name).restype = ctypes.c_int64
        self.library.last_kernel.restype = ctypes.c_char_p
        self.shared_limit = 227 * 1024
        self.multiprocessors = 132
        self.extra_bytes = 0
        self.chunk_bytes = 1 << 24
        self.longest_sum = 1 << 10

    def _sizes(self, tokens: torch.Tensor, bases: torch.Tensor) -> Sizes:
        numbers = (DTYPES.index(tokens.dtype), self.shared_limit, self.multiprocessors)
        cuts = (self.chunk_bytes, self.longest_sum)
        return Sizes(*tokens.shape[:3], bases.shape[2], *numbers, *cuts)

    def last_kernel(self) -> str:
        found: bytes = self.library.last_kernel()
        return found.decode()

    def em_statistics(
        self,
        features: torch.Tensor,
        bases: torch.Tensor,
        payload: torch.Tensor | None,
        temperature: float,
        normalize: bool = True,
    ) -> tuple[torch.Tensor, ...]:
        outputs = self._outputs(bases, payload)
        extra = self.library.em_statistics(
            *self._inputs(features, bases, payload),
            ctypes.c_float(temperature),
            ctypes.c_bool(normalize),
            *(output.pointer for output in outputs),
        )
        assert extra >= 0
        self.extra_bytes = extra
        return tuple(output.result() for output in outputs)

    def soft_em(
        self,
        features: torch.Tensor,
        bases: torch.Tensor,
        payload: torch.Tensor | None,
        num_iters: int,
        temperature: float,
        normalize: bool,
        keep_empty: bool,
        least_mass: float,
    ) -> tuple[torch.Tensor, ...]:
        outputs = self._outputs(bases, payload)
        extra = self.library.soft_em(
            *self._inputs(features, bases, payload),
            ctypes.c_int64(num_iters),
            ctypes.c_float(temperature),
            ctypes.c_bool(normalize),
            ctypes.c_bool(keep_empty),
            ctypes.c_float(least_mass),
            *(output.pointer for output in outputs),
        )
        assert extra >= 0
        new_bases, mass, payload_bases = (output.result() for output in outputs)
        return new_bases, payload_bases, mass

    def basis_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        correction: torch.Tensor | None = None,
        query_mean: torch.Tensor | None = None,
    ) -> torch.Tensor:
        batch, heads, n, _ = query.shape
        output = Output(batch, n, heads, value.shape[3], dtype=query.dtype)
        extra = self.library.basis_attention(
            ctypes.byref(self._sizes(query, key)),
            *(ctypes.byref(rows(tensor)) for tensor in (query, key, value)),
            ctypes.byref(rows(None if bias is None else bias.unsqueeze(-1))),
            ctypes.byref(rows(correction)),
            ctypes.byref(rows(None if query_mean is None else query_mean.unsqueeze(2))),
            ctypes.c_float(scale),
            output.pointer,
        )
        assert extra >= 0
        return output.result()

    def blended_attention(
        self,
        queries: tuple[torch.Tensor, torch.Tensor],
        keys: tuple[torch.Tensor, torch.Tensor],
        value: torch.Tensor,
        mask: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        batch, heads, n, _ = queries[0].shape
        output = Output(batch, n, heads, value.shape[3], dtype=value.dtype)
        maps = (queries[0], keys[0], queries[1], keys[1], value)
        extra = self.library.blended_attention(
            ctypes.byref(self._sizes(queries[0], value)),
            *(ctypes.byref(rows(tensor)) for tensor in maps),
            ctypes.byref(rows(None if bias is None else bias.unsqueeze(-1))),
            ctypes.c_void_p(mask.data_ptr()),
            ctypes.c_int64(mask.stride(0)),
            ctypes.c_float(scale),
            output.pointer,
        )
        assert extra >= 0
        return output.result()

    def nearest_token(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        output = Output(*query.shape[:3], dtype=torch.int32)
        norms = inverse_norms(keys).contiguous()
        extra = self.library.nearest_token(
            ctypes.byref(self._sizes(query, keys)),
            *(ctypes.byref(rows(tensor)) for tensor in (query, keys)),
            ctypes.c_void_p(norms.data_ptr()),
            output.pointer,
        )
        assert extra >= 0
        self.extra_bytes = extra
        return output.result()

    def partial_attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = Output(*query.shape[:3], value.shape[3]), Output(*query.shape[:3])
        extra = self.library.partial_attention(
            ctypes.byref(self._sizes(query, key)),
            *(ctypes.byref(rows(tensor)) for tensor in (query, key, value)),
            ctypes.c_float(scale),
            *(output.pointer for output in outputs),
        )
        assert extra >= 0
        self.extra_bytes = extra
        return outputs[0].result(), outputs[1].result()

    def _inputs(
        self, features: torch.Tensor, bases: torch.Tensor, payload: torch.Tensor | None
    ) -> tuple[object, ...]:
        assert bases.is_contiguous()
        return (
            ctypes.byref(self._sizes(features, bases)),
            ctypes.byref(rows(features)),
            ctypes.byref(rows(payload)),
            ctypes.c_void_p(bases.data_ptr()),
        )

    def _outputs(self, bases: torch.Tensor, payload: torch.Tensor | None) -> list[Output]:
        lead, width = bases.shape[:3], 0 if payload is None else payload.shape[3]
        return [Output(*bases.shape), Output(*lead), Output(*lead, width)]
