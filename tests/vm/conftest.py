"""The Jupyter client, for those tests of VMs that look from a notebook."""

from __future__ import annotations

import sys
from pathlib import Path

# --import-mode=importlib makes no directory importable.
sys.path.insert(0, str(Path(__file__).parent.parent / "jupyter"))
