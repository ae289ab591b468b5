"""Hashes of what shapes a pipeline's latents."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from ..attention.handle import unet_of

_SAMPLED_PER_TENSOR = 1024


def fingerprint(pipeline: Any) -> dict[str, str]:
    """Hashes of what shapes a pipeline's latents: its configurations, and its weights.

    The weights' hash reads up to 1,024 numbers of each tensor of each component, so that other
    weights of the same shape are told apart in a second. LoRA layers count with their scales and
    with which of them are active, and so does FreeU.
    """
    modules = {
        name: component
        for name, component in sorted(pipeline.components.items())
        if isinstance(component, torch.nn.Module)
    }
    configs = {
        name: {key: value for key, value in dict(config).items() if not key.startswith("_")}
        for name, config in (
            ("unet", unet_of(pipeline).config),
            ("vae", pipeline.vae.config),
            ("scheduler", pipeline.scheduler.config),
        )
    }
    text = json.dumps(configs, sort_keys=True, default=str)
    weights = hashlib.sha256()
    for name, module in modules.items():
        for key, tensor in sorted(module.state_dict().items()):
            flat = tensor.detach().flatten()
            sampled = flat[:: max(1, flat.numel() // _SAMPLED_PER_TENSOR)]
            weights.update(f"{name}.{key.removeprefix('_orig_mod.')}".encode())
            weights.update(sampled.double().cpu().numpy().tobytes())
        weights.update(repr(_switches(module)).encode())
    return {
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "weights_sha256": weights.hexdigest(),
    }


def _switches(module: torch.nn.Module) -> list[tuple[Any, ...]]:
    """What changes a module's output beside its weights: LoRA's state, and FreeU's factors."""
    found: list[tuple[Any, ...]] = []
    layer: Any
    for layer in module.modules():
        if hasattr(layer, "scaling") and hasattr(layer, "active_adapters"):
            scales = sorted(layer.scaling.items())
            found.append((scales, list(layer.active_adapters), bool(layer.disable_adapters)))
        freeu = tuple(getattr(layer, name, None) for name in ("s1", "s2", "b1", "b2"))
        if any(isinstance(factor, float) for factor in freeu):
            found.append(freeu)
    return found
