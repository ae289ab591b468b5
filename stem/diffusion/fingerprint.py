"""Hashes of what shapes a pipeline's latents."""

from __future__ import annotations

import hashlib
import json
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import torch

from ..storage import tensor_bytes
from .motion import window_of
from .weights import plain_tensors, state_of

_THREADS = 4  # hashing releases the interpreter's lock
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_STATE_OF_CALLS = ("truncation", "padding")
_OF_THE_LOADING = ("architectures", "dtype", "torch_dtype", "transformers_version")
# Hashed by themselves, and copied into the UNet.
_APART = ("controlnet", "adapter", "motion_adapter")
# By component: the state in which its weights were hashed, and the hash.
_hashed: weakref.WeakKeyDictionary[torch.nn.Module, tuple[str, str]] = weakref.WeakKeyDictionary()


def fingerprint(pipeline: Any) -> dict[str, str]:
    """Hashes of what shapes a pipeline's latents: its configurations, and its weights.

    All bytes of all tensors of every component count, LoRA layers with their scales and with which
    of them are active, FreeU and FreeNoise's windows; so do the components' configurations, and the
    tokenizers. A component's bytes are read once; they are read again when a tensor was replaced or
    written to since (torch's version counter, and the sums of every tensor's rows for writes
    through `.data`, which the counter does not see). Weights that are offloaded to a disk are read
    from there, and hash as they would in memory. ControlNets and T2I-Adapters have hashes of their
    own, see `fingerprint_of`. A motion adapter counts as the UNet's layers that were made of it.

    Args:
        pipeline: Stable Diffusion 1.x, 2.x or XL pipeline.

    Raises:
        ValueError: weights are on the meta device, and nothing tells where they are kept.
    """
    parts = {
        name: component
        for name, component in sorted(pipeline.components.items())
        if component is not None and name not in _APART
    }
    return _fingerprint(parts)


def fingerprint_of(name: str, module: torch.nn.Module) -> dict[str, str]:
    """Hashes of one component's configuration and weights, as `fingerprint` makes them.

    Args:
        name: Name of the component, for errors.
        module: Component, such as a ControlNet.

    Raises:
        ValueError: as `fingerprint`.
    """
    return _fingerprint({name: module})


def _fingerprint(parts: dict[str, Any]) -> dict[str, str]:
    configs = {name: _configuration(component) for name, component in parts.items()}
    text = json.dumps(configs, sort_keys=True, default=str)
    weights = hashlib.sha256()
    for name, component in parts.items():
        if isinstance(component, torch.nn.Module):
            weights.update(
                f"{name} {_weights_hash(name, component)} {_switches(component)}".encode()
            )
    return {
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "weights_sha256": weights.hexdigest(),
    }


def _configuration(component: Any) -> dict[str, Any] | str:
    """What a component was made with, beside its weights."""
    backend = getattr(component, "backend_tokenizer", None)
    if backend is not None:
        described = json.loads(backend.to_str())
        # What calls leave behind is not the tokenizer's.
        return {key: value for key, value in described.items() if key not in _STATE_OF_CALLS}
    if hasattr(component, "get_vocab"):
        return {"vocabulary": component.get_vocab(), "class": type(component).__name__}
    config = getattr(getattr(component, "_orig_mod", component), "config", None)
    if config is None:
        return type(component).__name__
    found = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {
        key: value
        for key, value in found.items()
        if not key.startswith("_") and key not in _OF_THE_LOADING
    }


def _weights_hash(name: str, module: torch.nn.Module) -> str:
    entries = state_of(name, module)
    state = hashlib.sha256()
    for entry, read in entries.items():
        for key, tensor in plain_tensors(entry, read()):
            version = -1 if tensor.is_inference() else tensor._version
            state.update(f"{key} {tensor.data_ptr()} {version} {tensor.shape}".encode())
            state.update(tensor_bytes(_row_sums(tensor).cpu()))
    known = _hashed.get(module)
    if known is not None and known[0] == state.hexdigest():
        return known[1]

    def digests(entry: str) -> list[str]:
        parts = plain_tensors(entry, entries[entry]())
        return [f"{key} {_tensor_hash(tensor)}" for key, tensor in parts]

    total = hashlib.sha256()
    with ThreadPoolExecutor(_THREADS) as threads:
        for digest in chain.from_iterable(threads.map(digests, entries)):
            total.update(digest.encode())
    _hashed[module] = (state.hexdigest(), total.hexdigest())
    return total.hexdigest()


def _row_sums(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of every row, added up as integers: int64 [rows]."""
    first = tensor.shape[0] if tensor.ndim > 1 and tensor.numel() else 1
    rows = tensor.reshape(first, -1).contiguous()
    return rows.view(_WORDS[tensor.element_size()]).sum(-1, dtype=torch.int64)


def _tensor_hash(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor_bytes(tensor.cpu().contiguous()))
    return digest.hexdigest()


def _switches(module: torch.nn.Module) -> list[tuple[Any, ...]]:
    """What changes a module's output beside its weights: LoRA's state, FreeU's factors, and the
    windows of motion modules."""
    window = window_of(module)
    found: list[tuple[Any, ...]] = [] if window is None else [tuple(window)]
    layer: Any
    for layer in module.modules():
        if hasattr(layer, "scaling") and hasattr(layer, "active_adapters"):
            scales = sorted(layer.scaling.items())
            found.append((scales, list(layer.active_adapters), bool(layer.disable_adapters)))
        freeu = tuple(getattr(layer, name, None) for name in ("s1", "s2", "b1", "b2"))
        if any(isinstance(factor, float) for factor in freeu):
            found.append(freeu)
    return found
