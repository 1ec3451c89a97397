"""The fuzzer's process; `script/fuzz` starts it, in an environment that has atheris.

Arguments are libFuzzer's (https://llvm.org/docs/LibFuzzer.html#options).
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris  # type: ignore[import-not-found] # in the fuzzer's own environment

sys.path[:0] = [str(Path(__file__).parent)]
with atheris.instrument_imports(include=["vmkernel.protocol", "protocol_inputs"]):
    import protocol_inputs

atheris.Setup(sys.argv, protocol_inputs.run)
atheris.Fuzz()
