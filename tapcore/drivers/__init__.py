"""The drivers, one module each; importing a module registers what it declares."""

from __future__ import annotations

import importlib
import pkgutil


def load_all() -> None:
    """Import every module of this package."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
