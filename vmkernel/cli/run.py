"""``vmkernel run``: a script in a VM of its own, gone afterwards whatever happens. Floor 5.

Exit code and streams are the code's own; `cli.foreground` has what ends a run early. What takes
the time is the VM, so nothing is imported here before it is needed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmkernel.cli.options import (
    Transfer,
    VmOptions,
    code_options,
    seconds,
    transfer_in,
    transfer_out,
    vm_options,
)

if TYPE_CHECKING:
    from vmkernel.cli.foreground import Foreground
    from vmkernel.cli.script import Plan, Source
    from vmkernel.host.handle import VmHandle


@click.command(
    # What follows the file is the script's, whatever it looks like
    context_settings={"allow_interspersed_args": False},
    options_metavar="[OPTIONS]",
)
@code_options
@click.option(
    "--timeout",
    type=seconds,
    metavar="SECONDS",
    help="How long the code may run; then its VM is destroyed (exit code 124).",
)
@click.option(
    "--in",
    "inward",
    multiple=True,
    metavar="LOCAL[:GUEST]",
    help="A file or directory for the code, in its working directory. Repeatable.",
)
@click.option(
    "--out",
    "outward",
    multiple=True,
    metavar="GUEST[:LOCAL]",
    help="A file or directory to bring back afterwards. Repeatable.",
)
@click.option("--quiet", "-q", is_flag=True, help="Do not tell what is being waited for.")
@vm_options
@click.argument("file", required=False, type=click.Path())
@click.argument("arguments", nargs=-1, metavar="[ARGUMENT]...", type=click.UNPROCESSED)
def run(
    code: str | None,
    as_json: bool,
    timeout: float | None,
    inward: tuple[str, ...],
    outward: tuple[str, ...],
    quiet: bool,
    vm: VmOptions,
    file: str | None,
    arguments: tuple[str, ...],
) -> None:
    """Run FILE (`-`: standard input), or CODE, in a microVM that is destroyed afterwards.

    Exit code and streams are the code's own. 124: it took longer than --timeout; 125: vmkernel
    itself failed; 128 + N: ended by signal N. Options for vmkernel come before FILE.
    """
    from vmkernel import trace
    from vmkernel.imports import import_without

    trace.begin(os.environ.get(trace.VARIABLE, ""))
    trace.mark("command: options read")
    # 20 ms: nothing here speaks TLS, and a hash of a few words needs no OpenSSL
    import_without("ssl", "asyncio")
    import_without("_hashlib", "hashlib")
    import_without("typing_extensions", "msgspec")
    from vmkernel.cli.foreground import Foreground, exit_codes

    if code is not None and file is not None:
        arguments, file = (file, *arguments), None
    if code is None and file is None:
        raise click.UsageError("name a FILE ('-' is standard input), or give the code with -c")
    job = _Run(
        Foreground(),
        vm,
        timeout=timeout,
        files=([transfer_in(text) for text in inward], [transfer_out(text) for text in outward]),
        quiet=quiet,
        as_json=as_json,
    )
    with exit_codes(job.account.print if as_json else None):
        from vmkernel.cli.script import read_source

        source = read_source(file, code, arguments)  # may wait for a person, whom Ctrl-C then ends
        exit_code = job.foreground.run(lambda: job.work(source))
        trace.mark("command: VM gone")
        if as_json:
            job.account.print(exit_code)
        os._exit(exit_code)  # all is written and tidy; an interpreter's end takes 20 ms


class _Run:
    """One run, and what is known of it."""

    def __init__(
        self,
        foreground: Foreground,
        options: VmOptions,
        *,
        timeout: float | None,
        files: tuple[list[Transfer], list[Transfer]],
        quiet: bool,
        as_json: bool,
    ) -> None:
        from vmkernel.cli.account import Account

        self.foreground = foreground
        self.account = Account()
        self._options = options
        self._timeout = timeout
        self._inward, self._outward = files
        self._quiet = quiet
        self._as_json = as_json

    async def work(self, source: Source) -> int:
        """Start a VM, run the code, destroy the VM.  Returns the exit code.  Raises VmError."""
        from vmkernel import VmManager, trace
        from vmkernel.cli.account import describe
        from vmkernel.cli.progress import Waiting
        from vmkernel.image.store import find_image

        settings = self._options.load(source.language)
        trace.mark("command: settings read")
        self.account.room = settings.max_output << 20
        began = time.monotonic()
        async with VmManager(settings) as manager:
            with Waiting(quiet=self._quiet) as waiting:
                vm = await manager.create_vm(
                    env=self._options.environment,
                    tenant_id=self._options.tenant,
                    task_id=self._options.task,
                    on_progress=waiting.show,
                    memory=settings.memory,  # else the recipe's would go before an option
                )
            started = round(time.monotonic() - began, 3)
            self.account.vm = describe(vm.record) | {"start_seconds": started}
            trace.mark("command: VM up")
            recipe = find_image(settings.recipe, settings).recipe
            plan = source.plan(recipe.language.name, engine=recipe.engine == "python")
            return await self._run(vm, plan, trusted=settings.outputs == "trusted")

    async def _run(self, vm: VmHandle, plan: Plan, *, trusted: bool) -> int:
        from vmkernel import trace
        from vmkernel.cli.foreground import run_code
        from vmkernel.cli.output import say_skipped
        from vmkernel.errors import VmGuestError, VmTimeoutError

        for item in self._inward:
            size = await vm.put(Path(item.source), item.target, on_skip=say_skipped)
            self.account.files["in"].append({**item._asdict(), "bytes": size})
        if plan.file:
            await vm.put(plan.text.encode(), plan.file)
        if plan.prologue:
            prepared = await vm.run(plan.prologue)
            if prepared.error is not None:
                raise VmGuestError(
                    f"the guest could not be prepared for a script: {prepared.error.value}",
                    hint="is its recipe's kernel an IPython? --recipe names another one",
                )
        trace.mark("command: script prepared")
        try:
            result = await run_code(
                self.foreground,
                vm,
                plan.code,
                timeout=self._timeout,
                account=self.account if self._as_json else None,
                script=bool(plan.prologue),
                trusted=trusted,
            )
        except VmTimeoutError as error:
            error.hint = "give it more time (--timeout), or less to do"
            raise
        trace.mark("command: code ended")
        for item in self._outward:
            await self._get(vm, item, code_failed=result.exit_code != 0)
        return result.exit_code

    async def _get(self, vm: VmHandle, item: Transfer, code_failed: bool) -> None:
        from vmkernel.cli.output import say_skipped
        from vmkernel.errors import VmError
        from vmkernel.text import plain_text

        try:
            size = await vm.get(item.source, Path(item.target), on_skip=say_skipped)
        except VmError as error:
            if not code_failed:
                raise
            # Code that failed may not have come so far: its exit code tells more than ours would
            click.echo(f"vmkernel: --out {item.source}: {plain_text(error.message)}", err=True)
            return
        self.account.files["out"].append({**item._asdict(), "bytes": size})
