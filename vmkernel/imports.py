"""Importing less, where a start is to be quick.  Floor 1: only the standard library's sys."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


def import_without(unwanted: str, module: str) -> None:
    """Import a module as if an optional one that it asks for were not there."""
    modules: dict[str, Any] = sys.modules
    if unwanted in modules:
        return
    modules[unwanted] = None  # importing it raises ImportError, see sys.modules
    try:
        import_module(module)
    finally:
        del modules[unwanted]  # who needs it later gets it
