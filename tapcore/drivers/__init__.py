"""The drivers, one module each; importing a module registers what it declares."""

from __future__ import annotations

import importlib
import pkgutil


def load(name: str) -> None:
    """Import the module that is called as the driver is, if there is one, else all: a process that starts with a
    chain of two drivers need not wait for the others."""
    if any(module.name == name for module in pkgutil.iter_modules(__path__)):
        importlib.import_module(f"{__name__}.{name}")
    else:
        load_all()


def load_all() -> None:
    """Import every module of this package."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
