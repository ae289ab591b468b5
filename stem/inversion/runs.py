"""What runs that start from an inversion share: its checks, and the way they go on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

import torch

from ..diffusion.checks import check_pipeline
from ..diffusion.control import controlnets_of
from ..diffusion.environment import warn_of_differences
from ..diffusion.fingerprint import fingerprint, fingerprint_of
from ..names import FLOW_METHODS, FLOW_SOURCE, INVERSION_METHODS
from ..storage import check_output, tensor_bytes
from .folder import InversionError, InversionFolder, Progress
from .records import versions

logger = logging.getLogger("stem")


def check_startable(inversion: InversionFolder, methods: Sequence[str] = INVERSION_METHODS) -> None:
    """Raise where nothing can start from an inversion, as far as that needs no pipeline.

    Args:
        inversion: Inversion.
        methods: Methods of the inversions that the run can start from.

    Raises:
        InversionError: of another method, incomplete, or damaged where a run begins.
    """
    method = inversion.settings["method"]
    if method == FLOW_SOURCE and method not in methods:
        raise InversionError(
            f"{inversion.path} holds no inversion, only the source of an edit without one",
            f"invert the video, by {', '.join(FLOW_METHODS)} (stem invert --methods)",
        )
    if method not in methods:
        raise InversionError(f"{inversion.path} was made by {method}, {_other_way(method)}")
    if not inversion.complete:
        raise InversionError(
            f"{inversion.path} has {inversion.steps_done} of {len(inversion.timesteps)} steps",
            "run the inversion again, it goes on where it stopped",
        )
    start_of(inversion)


def _other_way(method: str) -> str:
    """What kind of model a method goes through, and what takes its inversions."""
    if method in INVERSION_METHODS:
        return "through a UNet; edit it by another method than flowedit (stem edit --method)"
    return (
        "through a video transformer; reconstruct it with stem.inversion.reconstruct_video (stem "
        "reconstruct), and edit it with stem.editing.flow_edit (stem edit --method flowedit)"
    )


def start_of(inversion: InversionFolder) -> torch.Tensor:
    """The latents that runs start from: the noisiest, or the video's own where there are no steps.

    Args:
        inversion: Inversion, or the source of an edit without one.
    """
    return inversion.latents(-1) if inversion.timesteps else inversion.x0()


def check_same_pipeline(pipeline: Any, inversion: InversionFolder) -> None:
    """Raise where a pipeline is not the one that an inversion was made with.

    Raises:
        InversionError: another dtype, configuration or weights.
    """
    check_pipeline(pipeline)
    check_same_weights(pipeline, pipeline.unet.dtype, inversion)
    _check_same_controlnets(pipeline, inversion)


def check_same_weights(pipeline: Any, dtype: torch.dtype, inversion: InversionFolder) -> None:
    """Raise where a model is not the one that an inversion was made with.

    Args:
        pipeline: Pipeline, or a video model.
        dtype: Dtype that it computes in.
        inversion: Inversion.

    Raises:
        InversionError: another dtype, configuration or weights.
    """
    settings = inversion.settings
    own = str(dtype).removeprefix("torch.")
    if own != settings["dtype"]:
        raise InversionError(
            f"{inversion.path} was made in {settings['dtype']}, and this pipeline is in {own}",
            f"load it with dtype={settings['dtype']!r} (--dtype)",
        )
    found = fingerprint(pipeline)
    if {name: settings["model"].get(name) for name in found} != found:
        raise InversionError(
            f"{inversion.path} was made with the model {inversion.model_source}, whose "
            "configuration or weights (LoRA, VAE and embeddings included) differ from this "
            "pipeline's",
            "load that one",
        )


def _check_same_controlnets(pipeline: Any, inversion: InversionFolder) -> None:
    records, nets = inversion.settings.get("control", []), controlnets_of(pipeline)
    named = inversion.model_source.controlnets or ("?",) * len(records)
    if len(records) != len(nets):
        what = f"with {len(records)} ControlNets" if records else "without a ControlNet"
        raise InversionError(
            f"{inversion.path} was made {what}, and this pipeline has {len(nets) or 'none'}",
            "load it with those of the inversion, controlnets=[...] (--controlnet)"
            if records
            else "pass a pipeline without one",
        )
    for number, (record, net) in enumerate(zip(records, nets, strict=True)):
        found = fingerprint_of("controlnet", net)
        if {name: record[name] for name in found} != found:
            raise InversionError(
                f"{inversion.path} was made with the ControlNet {named[number]!r} (number "
                f"{number + 1}), whose configuration or weights differ from this pipeline's",
                "load that one",
            )


def run_name(inversion: InversionFolder, prefix: str, shaped_by: Any) -> str:
    """The name of a run in the inversion's folder: a hash of what shapes it, versions included.

    Args:
        inversion: Inversion to start from.
        prefix: Prefix of the name, which says what kind of run it is.
        shaped_by: Settings of the run, as JSON types.
    """
    # Those of this process: the inversion may have been made by others.
    digest = hashlib.sha256(json.dumps([shaped_by, versions()]).encode())
    digest.update(tensor_bytes(start_of(inversion).contiguous()))
    return f"{prefix}{digest.hexdigest()[:12]}"


def earlier_run(
    inversion: InversionFolder, run: str, what: str, environment: dict[str, str]
) -> Progress | None:
    """How far an earlier run of this name came; None where there is none that can be used.

    Args:
        inversion: Inversion that it started from.
        run: Name of the run.
        what: Word for the run, for the log.
        environment: Environment of this process.

    Raises:
        OSError: the run could not be kept in the folder.
    """
    check_output(inversion.path, 8 * start_of(inversion).numel())  # the old file and the new
    try:
        found = inversion.progress(run)
    except InversionError as error:
        logger.warning("%s; the %s starts afresh", error.problem, what)
        return None
    if found is None:
        return None
    if found.steps_done == inversion.settings["num_steps"]:
        logger.info("%s: this %s is complete; it is reused", inversion.path, what)
    else:
        logger.info("%s: %s goes on after step %d", inversion.path, what, found.steps_done)
        warn_of_differences(inversion.path, dict(found.environment), environment)
    return found
