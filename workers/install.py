"""Seeing to it that the packages this process imports are PushPull's own, all from one place."""

import importlib.util
from pathlib import Path

from paramserver.errors import ConfigError

__all__ = ["check_install", "check_torch_pair"]

_PACKAGES = ("cluster", "workers", "paramserver", "models", "launch")


def check_install() -> None:
    """Refuse to run with somebody else's ``models/`` or ``launch/`` in place of ours.

    Raises:
        ConfigError: naming the intruder and where it lies.
    """
    root = Path(__file__).resolve().parent.parent
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        # A folder without __init__.py has a place, but no origin; a module has it the other way round.
        place = spec and (next(iter(spec.submodule_search_locations or ()), None) or spec.origin)
        if not place or Path(place).resolve() != root / name:
            raise ConfigError(
                f"package {name!r} is imported from {place}, not from {root / name}: "
                "take that folder off PYTHONPATH, or uninstall the distribution that owns it"
            )


def check_torch_pair() -> None:
    """Refuse a torchvision that was built for another torch.

    Raises:
        ConfigError: saying what to install.
    """
    try:
        import torch
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"torch and torchvision do not fit together ({error}): install both from the same index in one command, "
            "e.g. pip install --force-reinstall 'torch>=2.11,<2.15' 'torchvision>=0.26,<0.30'"
        ) from error
    del torch, torchvision
