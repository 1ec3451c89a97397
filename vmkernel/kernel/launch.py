"""The entry: from the front end's spawn to a kernel that serves, in as little time as may be.

QEMU is started first, when everything it needs is at hand; asyncio, pyzmq and the rest are
imported while it comes up.  A failure here does not end the kernel: it is told in the notebook,
as the answer to the first cell.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vmkernel import trace
from vmkernel.errors import VmError
from vmkernel.imports import import_without

if TYPE_CHECKING:
    from vmkernel.host.start import Label, Started
    from vmkernel.settings import Settings

USAGE = """\
usage: python -m vmkernel -f CONNECTION_FILE [--SETTING=VALUE ...]

Started by Jupyter front ends; see `vmkernel --help` for the command.
Settings: as `vmkernel install` writes them into the kernelspec, e.g. --memory=4G."""


def parse_arguments(arguments: list[str]) -> tuple[Path, dict[str, str], list[str]]:
    """The connection file, settings by name, and IPython's options.

    Options of the form ``--Class.trait=value`` and ``--option value`` are IPython's; front ends
    append them to any kernel that they take for IPython.  Those of ``HistoryManager`` are obeyed
    (nbclient wants none kept: ``hist_file=:memory:``), others accepted.  Raises VmError.
    """
    connection_file = ""
    overrides: dict[str, str] = {}
    options: list[str] = []
    value_may_follow = False
    rest = iter(arguments)
    for argument in rest:
        if argument in ("-f", "--connection-file"):
            connection_file = next(rest, "")
        elif argument.startswith("-f="):
            connection_file = argument[3:]
        elif argument.startswith("--") and "." in argument.partition("=")[0]:
            options.append(argument)
        elif argument.startswith("--") and "=" in argument:
            name, _, value = argument[2:].partition("=")
            overrides[name] = value
        elif argument == "--debug":
            overrides["log-level"] = "debug"
        elif argument.startswith("--"):
            options.append(argument)
            value_may_follow = True
            continue
        elif not value_may_follow:
            raise VmError(f"unknown argument {argument!r}", hint=USAGE)
        value_may_follow = False
    if not connection_file:
        raise VmError("no connection file was given", hint=USAGE)
    return Path(connection_file), overrides, options


def begin(settings: Settings, label: Label) -> Started | None:
    """Start QEMU now if that is possible; a failure is left for the orderly way to report."""
    from vmkernel.host.start import begin as begin_vm

    try:
        return begin_vm(settings, label)
    except (VmError, OSError):
        return None


def main(pool: str = "", listeners: Sequence[int] = ()) -> NoReturn:
    """Run the kernel; never returns.

    ``pool`` is the socket of the pool that had none ready, ``listeners`` are sockets that listen on
    the kernel's ports already: both from the launcher (`vmkernel.pool.launcher`).
    """
    trace.begin(os.environ.get(trace.VARIABLE, ""))
    trace.mark("interpreter up")
    import_without("typing_extensions", "msgspec")  # 17 ms, where it happens to be installed
    from vmkernel.host.descriptors import want_descriptors
    from vmkernel.host.memory import MOST_IN_WRAPPER, limit_memory
    from vmkernel.settings import Settings, load_settings_with_sources

    limit_memory(MOST_IN_WRAPPER)
    # Until the event loop has its handler, an interrupt has nothing to interrupt but the start.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    failure: VmError | None = None
    begun: Started | None = None
    try:
        want_descriptors()
        connection_file, overrides, options = parse_arguments(sys.argv[1:])
    except VmError as error:
        sys.exit(error.explain())
    try:
        from vmkernel.host.start import settings_for_recipe

        settings = settings_for_recipe(load_settings_with_sources(overrides))
        trace.mark("settings read")
        begun = begin(settings, label_of(connection_file))
    except VmError as error:
        failure = error
        settings = Settings()
    trace.mark("QEMU started")
    import_without("ssl", "asyncio")  # 12 ms, and 2 MiB for each kernel; nothing here speaks TLS
    import asyncio

    from vmkernel.kernel.serve import serve

    trace.mark("everything imported")
    status = asyncio.run(serve(settings, connection_file, options, begun, failure, pool, listeners))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # nothing is left to tidy: interpreter shutdown would only take time


def label_of(connection_file: Path) -> Label:
    """Whose VM it is: the kernel's id is in the file's name, where Jupyter puts it."""
    from vmkernel.host.start import Label

    kernel_id = connection_file.stem.removeprefix("kernel-")
    from vmkernel.settings import NOTEBOOK_DIRECTORY

    try:
        # One that is on the front end's host only is told of in the notebook
        directory = os.environ.get(NOTEBOOK_DIRECTORY) or os.getcwd()  # noqa: PTH109
    except OSError:  # it was removed
        directory = ""
    return Label(kernel_id, str(connection_file.absolute()), directory=directory)
