"""The fuzzer's process; `script/fuzz` starts it, in an environment that has atheris.

Arguments are libFuzzer's (https://llvm.org/docs/LibFuzzer.html#options).
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import atheris  # type: ignore[import-not-found] # in the fuzzer's own environment

sys.path[:0] = [str(Path(__file__).parent)]
with atheris.instrument_imports(
    include=["vmkernel.protocol", "vmkernel.kernel.policy", "vmkernel.text"]
):
    import protocol_inputs

# libFuzzer starts itself again, through a shell, for -merge and -jobs
itself = f"{shlex.quote(sys.executable)} {shlex.quote(__file__)}"
atheris.Setup([itself, *sys.argv[1:]], protocol_inputs.run)
atheris.Fuzz()
