"""What runs that start from an inversion share: its checks, and the way they go on."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

from ..diffusion.checks import check_pipeline
from ..diffusion.control import controlnets_of
from ..diffusion.environment import warn_of_differences
from ..diffusion.fingerprint import fingerprint, fingerprint_of
from ..sources import ModelSource
from ..storage import check_output, tensor_bytes
from .folder import InversionError, InversionFolder, Progress

logger = logging.getLogger("stem")


def check_startable(inversion: InversionFolder) -> None:
    """Raise where nothing can start from an inversion, as far as that needs no pipeline.

    Raises:
        InversionError: incomplete, or damaged where a run begins.
    """
    if not inversion.complete:
        raise InversionError(
            f"{inversion.path} has {inversion.steps_done} of {len(inversion.timesteps)} steps",
            "run the inversion again, it goes on where it stopped",
        )
    inversion.latents(-1)


def check_same_pipeline(pipeline: Any, inversion: InversionFolder) -> None:
    """Raise where a pipeline is not the one that an inversion was made with.

    Raises:
        InversionError: another dtype, configuration or weights.
    """
    check_pipeline(pipeline)
    settings = inversion.settings
    dtype = str(pipeline.unet.dtype).removeprefix("torch.")
    if dtype != settings["dtype"]:
        raise InversionError(
            f"{inversion.path} was made in {settings['dtype']}, and this pipeline is in {dtype}",
            f"load it with dtype={settings['dtype']!r} (--dtype)",
        )
    recorded = dict(settings["model"])
    found = fingerprint(pipeline)
    if {name: recorded.pop(name, None) for name in found} != found:
        raise InversionError(
            f"{inversion.path} was made with the model {ModelSource.of(recorded)}, whose "
            "configuration or weights (LoRA, VAE and embeddings included) differ from this "
            "pipeline's",
            "load that one",
        )
    _check_same_controlnets(pipeline, inversion)


def _check_same_controlnets(pipeline: Any, inversion: InversionFolder) -> None:
    records, nets = inversion.settings.get("control", []), controlnets_of(pipeline)
    of_model = ModelSource.of(
        {k: v for k, v in inversion.settings["model"].items() if not k.endswith("_sha256")}
    )
    named = of_model.controlnets or ("?",) * len(records)
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
    """The name of a run in the inversion's folder: a hash of what shapes it.

    Args:
        inversion: Inversion to start from.
        prefix: Prefix of the name, which says what kind of run it is.
        shaped_by: Settings of the run, as JSON types.
    """
    digest = hashlib.sha256(json.dumps(shaped_by).encode())
    digest.update(tensor_bytes(inversion.latents(-1).contiguous()))
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
    check_output(inversion.path, 8 * inversion.latents(-1).numel())  # the old file and the new
    try:
        found = inversion.progress(run)
    except InversionError as error:
        logger.warning("%s; the %s starts afresh", error.problem, what)
        return None
    if found is None:
        return None
    if found.steps_done == len(inversion.timesteps):
        logger.info("%s: this %s is complete; it is reused", inversion.path, what)
    else:
        logger.info("%s: %s goes on after step %d", inversion.path, what, found.steps_done)
        warn_of_differences(inversion.path, dict(found.environment), environment)
    return found
