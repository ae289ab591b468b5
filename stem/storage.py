"""Files that are whole or absent: written under another name, hashed, and checked on reading."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("stem")

# Older versions' name no machine.
_PARTIAL = re.compile(r"\..+\.(\d+)(?:@([0-9a-f]+))?\.part(?:ial)?")
_DAY = 24 * 3600
_METADATA = "stem"
_DIGEST = "sha256"


class DamagedFileError(ValueError):
    """A file whose content is not what was written."""


def partial_name(path: Path) -> Path:
    """The name under which `path` is written until it is complete; it holds the process's id and
    `host_id`."""
    return path.with_name(f".{path.name}.{os.getpid()}@{host_id()}.part")


def host_id() -> str:
    """Six digits of a hash of this machine's name, which as it is would leave long names of files
    no room."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


class UnwrittenError(OSError):
    """A file that could not be written; the message names it and what to do."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to; at the end of the `with` block that file takes the place of `path`.

    The content is on the disk before the name is: neither a kill nor a loss of power leaves half a
    file. After an exception nothing of it is left.

    Raises:
        UnwrittenError: it cannot be written; that of another file, from inside the block, is left
            as it is.
    """
    partial = partial_name(path)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if not isinstance(error, OSError) or isinstance(error, UnwrittenError):
            raise
        message = f"{path} cannot be written: {_cause(error)}"
        raise UnwrittenError(error.errno, message) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all (see `replacing`)."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{reason}; free some space and run the same command again, it goes on from here"
    return f"{reason}; check the folder and its permissions"


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors in safetensors' format, with a hash of all content in the file's metadata.

    Args:
        path: File to write.
        tensors: Tensors by name, on any device.
        metadata: Texts to keep beside them.
    """
    from safetensors.torch import save  # here, as torch below: folders are listed without it

    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = _content_hash(held, metadata)
    # One text: safetensors writes several in an order that changes from run to run.
    inner = json.dumps({**metadata, _DIGEST: digest}, sort_keys=True)
    write_atomically(path, save(held, {_METADATA: inner}))


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file that `save_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is not what was written.
    """
    from safetensors.torch import load

    # Read whole: a mapped file that is cut short later would end the process.
    data = path.read_bytes()
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise DamagedFileError(f"{path} is damaged ({error}; {len(data)} bytes)") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    try:
        metadata: dict[str, str] = json.loads(header["__metadata__"][_METADATA])
        digest = metadata.pop(_DIGEST)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(
            f"{path} has no checksum that can be read; it is damaged, or another version's"
        ) from error
    if digest != _content_hash(tensors, metadata):
        raise DamagedFileError(f"{path} is damaged: its content does not match its checksum")
    return tensors, metadata


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a .safetensors file's tensors by name, from its header alone.

    Args:
        path: Path of a file that is there.

    Raises:
        DamagedFileError: it is no .safetensors file, or it is cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 0 < length <= size - 8 else b""
    try:
        header: dict[str, dict[str, Any]] = json.loads(text)
        header.pop("__metadata__", None)
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedFileError(f"{str(path)!r} is damaged, or no .safetensors file") from error
    if end != size:
        raise DamagedFileError(
            f"{str(path)!r} is damaged: it has {size} bytes, and should have {end}"
        )
    return shapes


def _content_hash(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def tensor_hash(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's values, as hexadecimal digits."""
    return hashlib.sha256(tensor_bytes(tensor.cpu().contiguous())).hexdigest()


def check_output(path: Path, needed_bytes: int = 0) -> None:
    """Raise before any work if `path`, a file or a folder to come, could not be written.

    Args:
        path: File or folder that is to be written.
        needed_bytes: Number of bytes that will be written there.

    Raises:
        OSError: its folder is no folder or refuses files, its name is too long, or the disk has
            too little space.
    """
    folder = path
    while not folder.is_dir():
        if folder.exists() and folder != path:
            raise NotADirectoryError(
                errno.ENOTDIR, f"{path} cannot be written: {folder} is a file, not a folder"
            )
        folder = folder.absolute().parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written: {_cause(error)}") from error
    if folder != path:
        longest = os.pathconf(folder, "PC_NAME_MAX")
        if len(os.fsencode(partial_name(path).name)) > longest:
            raise OSError(
                errno.ENAMETOOLONG,
                f"{path} cannot be written: its name is too long; while it is written it is "
                f"{partial_name(path).name}, and its disk takes {longest} bytes",
            )
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{path} needs {needed_bytes:,} bytes, and {free:,} are free on its disk; free some "
            "space, or name a folder on another disk",
        )


def check_output_file(path: Path, needed_bytes: int = 0) -> None:
    """As `check_output`, of what is to be a file.

    Args:
        path: File that is to be written.
        needed_bytes: Number of bytes that will be written there.

    Raises:
        OSError: as for `check_output`, or it is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    check_output(path, needed_bytes)


def remove_stale(folder: Path) -> list[tuple[Path, int]]:
    """Remove what killed processes left half written below `folder`.

    Returns:
        The files removed and their sizes in bytes. Files of processes that still run stay, and
        so do those of other machines that changed within the last day.
    """
    removed = []
    for path in sorted(folder.rglob("*.part*")):
        match = _PARTIAL.fullmatch(path.name)
        if match is None:
            continue
        with contextlib.suppress(FileNotFoundError):  # its process may complete it now
            stat = path.stat()
            if match[2] in (None, host_id()):
                at_work = _runs(int(match[1]))
            else:
                at_work = time.time() - stat.st_mtime <= _DAY
            if at_work:
                continue
            path.unlink()
            logger.info("%s: removed what a killed run left half written", path)
            removed.append((path, stat.st_size))
    return removed


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as another user
        return True
    return True
