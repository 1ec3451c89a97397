"""``%vm``: the notebook asks about its own virtual machine.

Where it stands: registered by ``guest.engine``.  The magic knows no command by itself: it passes
the line to the host, which knows the VM, and prints what comes back.
"""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_magic, magics_class

from vmkernel.guest.network import NO_INDEX, NO_NETWORK

NO_CONNECTION_FILE = """\
The connection file, with the key that lets a front end in, is on the host and kept from the code
that runs here. To connect a console to this kernel, run on the host:

    jupyter console --existing    (the kernel's id, as `%vm` shows it, where there are several)"""

AS_LONG_AS_THE_VM = """\
vmkernel: it can be imported now, until this VM ends; a restart begins a new VM. To keep it, on the
host: vmkernel image build --from RECIPE --add PACKAGE --name NAME (docs/recipes.md)."""

CallHost = Callable[[str, list[str]], dict[str, Any]]
"""call(command, arguments): what the host answers, content of a ``vm_reply``"""


@magics_class
class VmMagics(Magics):
    """The magics of vmkernel."""

    def __init__(self, shell: Any, call_host: CallHost) -> None:
        super().__init__(shell)
        self._call_host = call_host
        self._pip = shell.find_line_magic("pip")

    @line_magic  # type: ignore[untyped-decorator]
    def vm(self, line: str) -> None:
        """Ask about this kernel's virtual machine.

        ``%vm`` or ``%vm info`` shows its recipe, memory, accelerator, age, slot and settings;
        ``%vm put LOCAL [PATH]`` and ``%vm get PATH [LOCAL]`` copy files into it and out of it,
        where the host lets them; ``%vm help`` lists all commands.
        """
        try:
            command, *arguments = shlex.split(line) or ["info"]
        except ValueError as error:
            raise UsageError(f"%vm {line}: {error}") from None
        reply = self._call_host(command, arguments)
        if reply.get("status") != "ok":
            raise UsageError(str(reply.get("evalue", "the host gave no reason")))
        print(reply.get("text", ""))

    @line_magic  # type: ignore[untyped-decorator]
    def pip(self, line: str) -> None:
        """Run pip in this VM: ``%pip install NAME``.

        What it installs lies on the VM's disk, and goes with it.  It needs ``network = packages``.
        """
        self._pip(line)
        importlib.invalidate_caches()
        failed = self.shell.user_ns.get("_exit_code", 0) != 0
        if not failed and line.split()[:1] == ["install"]:
            print(AS_LONG_AS_THE_VM)
        if failed and os.environ.get("PIP_INDEX_URL") == NO_INDEX:
            print(NO_NETWORK, file=sys.stderr)

    @line_magic  # type: ignore[untyped-decorator]
    def connect_info(self, line: str) -> None:
        """Say how to connect another front end: the connection file is kept from this code."""
        print(NO_CONNECTION_FILE)

    @line_magic  # type: ignore[untyped-decorator]
    def qtconsole(self, line: str) -> None:
        """Say how to connect another front end: none can be started in the VM."""
        print(NO_CONNECTION_FILE)
