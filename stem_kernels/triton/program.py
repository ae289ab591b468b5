"""Launches that are prepared once for a layout of tensors, and then only repeated.

Triton looks at every argument of every launch, and what comes before a launch (tiles, grids,
strides) is worked out in Python: some 45 us each, about what a kernel takes. All of it follows from
shapes, strides, dtypes, the device and where memory is aligned. So an operator builds a `Program`
for a `Layout` of its tensors, keeps it (`@programs`), and a call allocates memory and launches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar, overload

import torch

from ..shared import forms
from . import on_device_of
from .precision import tf32_asked_for

LARGEST_CACHE = 256  # programs of one kind
LARGEST_GRID = 2**31 - 1
"""Programs of a launch. Triton's launcher counts them in 32 bits, and launches nothing, without a
word, where that number overflows to one below 1."""
ALIGNMENT = 16  # bytes, which Triton compiles kernels for

Built = TypeVar("Built")
_caches: list[Any] = []


class Layout(NamedTuple):
    """What a kernel is compiled for of a tensor: all but its address."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    aligned: bool = True

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        """The layout of a tensor."""
        aligned = tensor.data_ptr() % ALIGNMENT == 0
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device, aligned)

    @classmethod
    def of_any(cls, tensor: torch.Tensor | None) -> Layout | None:
        """The layout of a tensor, or None."""
        return None if tensor is None else cls.of(tensor)

    @classmethod
    def contiguous(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Layout:
        """The layout of memory of its own."""
        strides, size = [], 1
        for length in reversed(shape):
            strides.append(size)
            size *= length
        return cls(tuple(shape), tuple(reversed(strides)), dtype, device)

    def expanded(self, *shape: int) -> Layout:
        """This layout seen as `shape`, sizes of 1 repeated."""
        strides = (
            0 if own != wanted else stride
            for own, wanted, stride in zip(self.shape, shape, self.strides, strict=True)
        )
        return self._replace(shape=shape, strides=tuple(strides))

    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @overload
    def stride(self) -> tuple[int, ...]: ...
    @overload
    def stride(self, axis: int) -> int: ...
    def stride(self, axis: int | None = None) -> tuple[int, ...] | int:
        """All strides, or that of one axis, in elements."""
        return self.strides if axis is None else self.strides[axis]

    def element_size(self) -> int:
        """The bytes of an element."""
        return self.dtype.itemsize


class Buffer(NamedTuple):
    """A tensor of a program: an input, or memory that each call allocates."""

    place: int
    layout: Layout

    def with_heads(self) -> Buffer:
        """This tensor [..., n, D] as [B, h, n, D]; one of three axes has a batch of 1."""
        shape, strides = self.layout.shape, self.layout.strides
        axes = 4 - len(shape)
        layout = self.layout._replace(shape=(1,) * axes + shape, strides=(0,) * axes + strides)
        return Buffer(self.place, layout)


def programs(build: Callable[..., Built]) -> Callable[..., Built]:
    """Decorates a function that builds programs: what it built is kept by its arguments."""

    @functools.lru_cache(LARGEST_CACHE)
    def kept(tf32: bool, *arguments: Any) -> Built:
        return build(*arguments)

    @functools.wraps(build)
    def of(*arguments: Any) -> Built:
        # The first argument is a layout; TF32 is a way to multiply float32.
        return kept(arguments[0].dtype == torch.float32 and tf32_asked_for(), *arguments)

    _caches.append(kept)
    return of


def forget_programs() -> None:
    """Build programs anew from now on, as after a change of the tables of tiles."""
    for kept in _caches:
        kept.cache_clear()


class Program:
    """Launches in order, on inputs of given layouts and on memory that each call allocates.

    Args:
        device: Device of all of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._launches: list[_Launch] = []
        self._allocated: dict[tuple[str, Layout], Buffer] = {}
        self._sizes: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._parts: list[tuple[int, int, int]] = []
        self._num_inputs = 0
        self._settled = False

    def input(self, layout: Layout) -> Buffer:
        """The next tensor that calls are given; all are named before any memory is."""
        self._num_inputs += 1
        return Buffer(self._num_inputs - 1, layout)

    def memory(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Buffer:
        """Memory for each call, uninitialised; one name and one size are the same memory."""
        layout = Layout.contiguous(shape, dtype, self._device)
        key = (name, layout)
        if key not in self._allocated:
            self._allocated[key] = Buffer(self._num_inputs + len(self._sizes), layout)
            self._sizes.append((layout.shape, dtype))
        return self._allocated[key]

    def part(self, whole: Buffer, first: int, count: int) -> Buffer:
        """`count` of a tensor's first axis, from `first` on, in the tensor's own memory."""
        self._parts.append((whole.place, first, count))
        layout = whole.layout._replace(shape=(count, *whole.layout.shape[1:]))
        # Counted from the end, because memory may yet be added.
        return Buffer(-len(self._parts), layout)

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        buffers: Sequence[Buffer],
        numbers: Sequence[float],
        **constants: Any,
    ) -> None:
        """Add a launch.

        Args:
            kernel: Kernel, whose arguments are pointers, then numbers, then constexprs.
            grid: Numbers of programs along one to three axes.
            buffers: Buffers that the pointers point at.
            numbers: Numbers.
            constants: Constexprs, and the options num_warps and num_stages.

        Raises:
            ValueError: the grid has more than LARGEST_GRID programs.
        """
        if math.prod(grid) > LARGEST_GRID:
            raise ValueError(
                f"{kernel.__name__} would take {math.prod(grid)} programs, and a launch has "
                f'{LARGEST_GRID} at most; take fewer tokens or heads in a call, or backend="torch"'
            )
        # Errors are bounded for products that are added without a rounding between; what Triton
        # does without being asked differs between its versions.
        constants = {**constants, "enable_fp_fusion": True}
        form = (self._device, *_form(kernel, buffers, numbers, constants))
        self._launches.append(_Launch(kernel, grid, buffers, numbers, constants, form))

    def __call__(self, *inputs: torch.Tensor | None) -> list[torch.Tensor]:
        """Launch everything on these inputs, None for absent ones; gives all buffers' tensors."""
        if not self._settled:
            self._settled = all([forms.enter(launch.form) for launch in self._launches])
        tensors = [tensor for tensor in inputs if tensor is not None]
        like = tensors[0]
        tensors += [like.new_empty(size, dtype=dtype) for size, dtype in self._sizes]
        parts = reversed(self._parts)
        tensors += [tensors[place][first : first + count] for place, first, count in parts]
        with on_device_of(like):
            for launch in self._launches:
                launch(tensors)
        return tensors


class _Launch:
    """One launch; the first call compiles, if Triton has not, and later ones skip its checks."""

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        buffers: Sequence[Buffer],
        numbers: Sequence[float],
        constants: dict[str, Any],
        form: tuple[object, ...],
    ) -> None:
        self.form = form
        self._kernel, self._numbers, self._constants = kernel, tuple(numbers), constants
        self._grid = (*grid, 1, 1)[:3]
        self._chosen = itemgetter(*(buffer.place for buffer in buffers))
        of_kernel = [constants[name] for name in kernel.arg_names if name in constants]
        self._arguments = (*self._numbers, *of_kernel)
        self._run: Callable[..., object] | None = None

    def __call__(self, tensors: Sequence[torch.Tensor]) -> None:
        if self._run is not None:
            self._run(*self._chosen(tensors), *self._arguments)
            return
        compiled = self._kernel[self._grid](
            *self._chosen(tensors), *self._numbers, **self._constants
        )
        # None where nothing was compiled: in the interpreter, or for one of Triton's own hooks.
        if compiled is not None:
            self._run = compiled[self._grid]


def _form(
    kernel: Any,
    buffers: Sequence[Buffer],
    numbers: Sequence[float],
    constants: Mapping[str, Any],
) -> tuple[object, ...]:
    """What Triton compiles a kernel for: types, alignment, constants, and what it sees of numbers.

    Of a whole number that is whether it is 1, a multiple of 16, and beyond 32 bits.
    """
    pointers = tuple((buffer.layout.dtype, buffer.layout.aligned) for buffer in buffers)
    seen = tuple(
        isinstance(number, float) or (number == 1, number % ALIGNMENT == 0, number >= 2**31)
        for number in numbers
    )
    return (kernel.__name__, "triton", pointers, seen, tuple(sorted(constants.items())))
