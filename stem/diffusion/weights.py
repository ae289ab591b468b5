"""The plain tensors that a module's weights are made of, wherever they are kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from safetensors import safe_open

Read = Callable[[], Any]
ON_A_DISK = "group, on a disk"
"""What `offloading` says of groups of layers whose weights are in files."""

# Where a tensor is, and where an object is: not what it holds.
_PLACES = re.compile(r"device\([^)]*\)| at 0x[0-9a-f]+")


def state_of(name: str, module: torch.nn.Module) -> dict[str, Read]:
    """A module's state by name, each entry as a function that reads it.

    What accelerate or diffusers' group offloading keep elsewhere, on a disk or in another tensor,
    is read from there.

    Args:
        name: Name of the module, for errors.
        module: Module of a pipeline.

    Raises:
        ValueError: weights are on the meta device, and nothing tells where they are kept.
    """
    by_name, by_tensor = _kept_by_accelerate(module), _kept_by_diffusers(module)
    found: dict[str, Read] = {}
    absent = []
    for key, value in sorted(module.state_dict(keep_vars=True).items()):
        kept = by_name.get(key) or by_tensor.get(id(value))
        if kept is None and isinstance(value, torch.Tensor) and value.is_meta:
            absent.append(key)
        found[key.removeprefix("_orig_mod.")] = kept or partial(_itself, value)
    if absent:
        raise ValueError(
            f"the {name}'s weights are on the meta device ({absent[0]} and others), and nothing "
            "tells where they are kept, so there is nothing to compute with or to hash; load them, "
            "and offload with enable_model_cpu_offload or enable_sequential_cpu_offload"
        )
    return found


def _itself(value: Any) -> Any:
    return value


def plain_tensors(key: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain tensors that one entry of a module's state is made of, by name.

    Tensors of tensors (torchao's), quantised ones and packed parameters (of `quantize_dynamic`) are
    taken apart; a name holds what is no tensor about them.

    Args:
        key: Name of the entry.
        value: Tensor, or what else a module keeps in its state.
    """
    if isinstance(value, torch.Tensor):
        yield from _tensors_of(key, value.detach())
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from plain_tensors(f"{key}.{name}", item)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from plain_tensors(f"{key}.{index}", item)
    elif isinstance(value, torch.ScriptObject):
        yield from plain_tensors(key, value.__getstate__())
    else:
        yield f"{key} {_described(value)}", torch.empty(0)


def _tensors_of(key: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    kind = f"{type(tensor).__name__} {tensor.dtype} {list(tensor.shape)}"
    if hasattr(tensor, "__tensor_flatten__"):
        names, facts = tensor.__tensor_flatten__()
        for name in names:
            yield from plain_tensors(
                f"{key} {kind} {_described(facts)}.{name}", getattr(tensor, name)
            )
    elif not tensor.is_quantized:
        yield key, tensor
    elif tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale, zero = tensor.q_scale(), tensor.q_zero_point()
        yield f"{key} {kind} {scale} {zero}", tensor.int_repr()
    else:
        yield f"{key} {kind} {tensor.q_per_channel_axis()}", tensor.int_repr()
        yield f"{key}.scales", tensor.q_per_channel_scales()
        yield f"{key}.zero_points", tensor.q_per_channel_zero_points()


def _described(value: Any) -> str:
    return _PLACES.sub("", repr(value))


def _kept_by_accelerate(module: torch.nn.Module) -> dict[str, Read]:
    """By name in the module's state: what its hooks have on the CPU or on a disk."""
    found: dict[str, Read] = {}
    for prefix, layer in module.named_modules():
        hook: Any = getattr(layer, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):  # a SequentialHook's
            kept = getattr(one, "weights_map", None)
            if kept is None:
                continue
            inside = {"recurse": one.place_submodules}
            for name, tensor in chain(
                layer.named_parameters(**inside), layer.named_buffers(**inside)
            ):
                if tensor.is_meta:
                    found[f"{prefix}.{name}" if prefix else name] = partial(kept.__getitem__, name)
    return found


def _kept_by_diffusers(module: torch.nn.Module) -> dict[int, Read]:
    """By the tensor's id: what group offloading has on a disk, whose tensors are uninitialised."""
    found: dict[int, Read] = {}
    for group in _groups(module):
        if group._is_offloaded_to_disk:
            for tensor, key in group.tensor_to_key.items():
                found[id(tensor)] = partial(_from_file, group.safetensors_file_path, key)
    return found


def _groups(module: torch.nn.Module) -> Iterator[Any]:
    """The groups of diffusers' group offloading."""
    for layer in module.modules():
        registry = getattr(layer, "_diffusers_hook", None)
        for hook in () if registry is None else registry.hooks.values():
            if hasattr(hook, "group"):
                yield hook.group


def keeps_copies(module: torch.nn.Module) -> bool:
    """Whether group offloading computes with copies of weights, whose dtype stays as it was.

    Args:
        module: Module of a pipeline.
    """
    return any(group.offload_to_disk_path or group.stream is not None for group in _groups(module))


def offloading(pipeline: Any) -> str:
    """How a pipeline's weights are kept away from the device that computes.

    Args:
        pipeline: Pipeline of diffusers.

    Returns:
        "none", "model", "sequential" or "group", the last with ", on a disk" where they are in
        files. Parts that differ are all named.
    """
    found = set()
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            found |= {
                ON_A_DISK if group.offload_to_disk_path else "group" for group in _groups(module)
            }
            found |= set(_ways_of_accelerate(module))
    return "; ".join(sorted(found)) or "none"


def _ways_of_accelerate(module: torch.nn.Module) -> Iterator[str]:
    for layer in module.modules():
        hook: Any = getattr(layer, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):  # a SequentialHook's
            if type(one).__name__ == "CpuOffload":
                yield "model"
            elif getattr(one, "offload", False):
                yield "sequential"


def _from_file(path: str, key: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(key)
    return tensor
