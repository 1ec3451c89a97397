"""A guest kernel without a VM: the relay on inherited sockets.  argv: their numbers, the recipe."""

import contextlib
import ctypes
import json
import os
import signal
import sys

ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: also when a test is given up
sys.path.insert(0, os.getcwd())
ports = [int(number) for number in sys.argv[1].split(",")]
report = os.dup(1)
pipes = {"stdout": os.pipe(), "stderr": os.pipe()}
os.dup2(pipes["stdout"][1], 1)
words = os.dup(2)  # for the test's eyes: what the agent would read
os.dup2(pipes["stderr"][1], 2)
for port in ports:
    os.set_blocking(port, False)

import msgspec  # noqa: E402  (the descriptors come first)

from vmkernel.guest import relay  # noqa: E402

recipe = msgspec.json.decode(sys.argv[2], type=relay.Recipe)
outputs = {name: pipe[0] for name, pipe in pipes.items()}


def on_ready(info: dict) -> None:
    os.write(report, json.dumps(info).encode() + b"\n")


status = relay.Relay(ports, outputs, recipe).run(on_ready, template="fresh" not in sys.argv)
os.set_blocking(pipes["stderr"][0], False)
with contextlib.suppress(BlockingIOError):
    os.write(words, os.read(pipes["stderr"][0], 1 << 16))
relay.end_like(status)
