"""What ``--download`` fetches, and nothing else does: torchvision's weights by name, CIFAR-10, Pascal VOC 2012."""

import fcntl
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.datasets import CIFAR10, VOCDetection
from torchvision.models import get_weight

from paramserver.errors import ConfigError

__all__ = ["download_data", "download_weights", "locate_weights", "name_or_path"]

_NAME = re.compile(r"\w+_Weights\.\w+")
_SILENCE_S = 60.0
"""For so long a server may send nothing."""
_UNFINISHED = ".download-"


class _Named(NamedTuple):
    url: str
    path: Path
    """Where ``torch.hub`` keeps it."""


def name_or_path(weights: str) -> str:
    """A ``--weights`` that means the same in every folder: torchvision's name, or an absolute path."""
    return weights if _is_name(weights) else str(Path(weights).expanduser().resolve())


def _is_name(weights: str) -> bool:
    return _NAME.fullmatch(weights) is not None and not Path(weights).exists()


def locate_weights(weights: str) -> Path:
    """The file of a ``--weights``.

    Raises:
        ConfigError: if torchvision has no weights of that name, or they are not on this machine.
    """
    named = _named(weights)
    if named is None:
        return Path(weights).expanduser()
    if not named.path.is_file():
        raise ConfigError(
            f"--weights {weights}: {named.path} is not there yet: say --download (a --dry-run never does), or put "
            f"{named.url} there"
        )
    return named.path


def download_weights(weights: str) -> list[str]:
    """Fetch what ``--weights`` names, unless it is there already or a file; the hash in its name is compared.

    Returns:
        what the user should know.

    Raises:
        ConfigError: if there are no such weights, or they cannot be fetched.
    """
    named = _named(weights)
    if named is None or named.path.is_file():
        return []
    digest = torch.hub.HASH_REGEX.search(named.path.name)
    with _fetching(f"--weights {weights}", f"put {named.url} at {named.path}"), _alone_in(named.path.parent):
        if named.path.is_file():
            return []
        torch.hub.download_url_to_file(named.url, str(named.path), digest[1] if digest else None, sys.stderr.isatty())
    return [f"{named.url} was downloaded to {named.path}"]


def _named(weights: str) -> _Named | None:
    if not _is_name(weights):
        return None
    try:
        url = get_weight(weights).url
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"--weights {weights}: torchvision has none of that name; it has ResNet18_Weights.IMAGENET1K_V1, for "
            "example, and each network's page in its documentation lists its own"
        ) from error
    return _Named(url, Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2])


def download_data(data: str) -> list[str]:
    """Fetch ``cifar10:PATH`` or ``voc:PATH`` whose folder is missing or empty; torchvision compares a checksum.

    Returns:
        what the user should know.

    Raises:
        ConfigError: if it cannot be fetched.
    """
    kind, _, rest = data.partition(":")
    path = Path(os.path.expanduser(rest))  # pathlib's raises where there is no such user
    if kind not in ("cifar10", "voc") or not rest or (path.exists() and not path.is_dir()):
        return []  # if anything is wrong with it, the task says so
    own = f"{_UNFINISHED}{platform.node()}-"
    with _fetching(f"--data {data}", f"unpack it in {path}"), _alone_in(path):
        for torn in path.glob(f"{own}*"):  # of a process of this node that was killed, or it would have the lock
            shutil.rmtree(torn)
        if any(not found.name.startswith(_UNFINISHED) for found in path.iterdir()):
            return []
        with tempfile.TemporaryDirectory(prefix=own, dir=path) as unfinished:
            if kind == "cifar10":
                CIFAR10(unfinished, download=True)
                whole = Path(CIFAR10.base_folder)
            else:
                VOCDetection(unfinished, year="2012", download=True)
                whole = Path("VOCdevkit")
            if not (path / whole).exists():  # another node, which shares the disk, has been quicker
                os.rename(Path(unfinished) / whole, path / whole)
    return [f"{kind} was downloaded to {path / whole}"]


@contextmanager
def _fetching(what: str, remedy: str) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE_S)
    try:
        yield
    except (OSError, HTTPException, RuntimeError) as error:
        raise ConfigError(f"{what} cannot be downloaded ({type(error).__name__}: {error}): {remedy}") from error
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Make the folder and keep other processes out of the block, such as the ranks of this node; unmake it if it fails.

    Whoever waits need not do so for ever: the one inside waits for no byte longer than ``_SILENCE_S``, and its lock
    goes with it.
    """
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not folder.is_dir() or not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise FileNotFoundError(f"{folder} was unmade by whoever could not fetch it either")
        yield
    except BaseException:
        for part in made:
            with suppress(OSError):  # somebody else has put something there
                part.rmdir()
        raise
    finally:
        os.close(descriptor)
