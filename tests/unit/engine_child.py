"""A guest kernel without a VM: the engine on two inherited sockets, whose numbers argv has."""

import json
import os
import sys

sys.path.insert(0, os.getcwd())
port, control = map(int, sys.argv[1:])
report = os.dup(1)
pipes = {"stdout": os.pipe(), "stderr": os.pipe()}
os.dup2(pipes["stdout"][1], 1)
os.dup2(pipes["stderr"][1], 2)
os.set_blocking(port, False)
os.set_blocking(control, False)

from vmkernel.guest.engine import Engine  # noqa: E402  (the descriptors come first)

engine = Engine(port, control, {name: pipe[0] for name, pipe in pipes.items()})
engine.run(lambda info: os.write(report, json.dumps(info).encode() + b"\n"), warm_up=False)
