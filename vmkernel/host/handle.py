"""A VM in the hands of whoever uses it: run code, move files, end it.

Where it stands: given out by ``host.manager``, over ``host.client``; the VM itself is the runner's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vmkernel.errors import VmError, VmExpiredError, VmTimeoutError
from vmkernel.host import files, wire
from vmkernel.host.client import RunnerSilentError
from vmkernel.host.processes import is_alive, kill
from vmkernel.models import Output, RunError, RunResult, VmState
from vmkernel.protocol import bounds, frames, messages

if TYPE_CHECKING:
    from vmkernel.host.capacity import Semaphore
    from vmkernel.host.client import Connection, RunnerProcess
    from vmkernel.host.registry import VmRecord

log = logging.getLogger("vmkernel")

OnOutput = Callable[[Output], None]
OnInput = Callable[[str, bool], str]
"""on_input(prompt, whether it is a password) -> what was typed; called in a thread."""
OnSkip = Callable[[str], None]
"""on_skip(path of what is neither a file nor a directory)"""
BUNDLE_COST = 256
"""What an empty MIME bundle counts for: a guest may show very many of them."""
DENSEST = 4
"""Bytes of memory that a byte of output may take: JSON of many small values takes more, and counts
for more."""
ANSWER_SECONDS = 10.0
"""How long the guest's agent may take for a small task."""
CHUNK_SECONDS = 60.0
"""How long it may take for a piece of a file; the guest's own limit is shorter."""


class VmHandle:
    """One running VM.  ``record`` is what was on record when this handle was made."""

    def __init__(
        self,
        record: VmRecord,
        connection: Connection,
        slots: Semaphore,
        max_output: int,
        runner: RunnerProcess | None = None,
    ) -> None:
        self.record = record
        self.runner = runner
        """The runner's process, where this process started it."""
        self.connection = connection
        """The way to its runner."""
        self._slots = slots
        self._max_output = max_output << 20
        self._stays = False
        """It was let go of, and goes on without us."""

    def __repr__(self) -> str:
        return f"<VmHandle {self.vm_id} {self.state}>"

    @property
    def vm_id(self) -> str:
        """The VM's name for the manager, like ``vm-1a2b3c4d``."""
        return self.record.vm_id

    @property
    def alive(self) -> bool:
        """Whether the VM can be used."""
        return self.connection.connected

    @property
    def state(self) -> VmState:
        """RUNNING, STOPPED or FAILED, as this handle knows it."""
        ended = self.connection.ended
        if (self._stays or not self.connection.usable) and is_alive(self.record.runner):
            return VmState.RUNNING  # nobody would have told us otherwise
        if not ended.done():
            return VmState.RUNNING if self.connection.connected else VmState.FAILED
        as_wished = ended.result() is None or isinstance(ended.result(), VmExpiredError)
        return VmState.STOPPED if as_wished else VmState.FAILED

    @property
    def holds_semaphore_slot(self) -> bool:
        """Whether the VM's slot is held at this moment: asked of the kernel, not remembered."""
        return self._slots.lease_holds(self.record.slot_lease)

    async def run(
        self,
        code: str,
        *,
        timeout: float | None = None,
        on_output: OnOutput | None = None,
        on_input: OnInput | None = None,
        env: Mapping[str, str] | None = None,
    ) -> RunResult:
        """Run code in the VM's kernel, after what was sent before; variables stay from run to run.

        ``on_output`` hears each output as it comes, in the event loop.  ``on_input`` answers
        input() and getpass(); without it they raise in the code.  ``env`` is added to the
        environment of the VM's kernel, for this run and those that follow.  ``timeout`` in seconds
        counts from the moment at which the code is sent.

        What the code itself does wrong is in the result.  Cancelling it interrupts the code (and
        ends its kernel when that does not help within seconds).  Raises VmTimeoutError when
        the time is over (the VM is destroyed; ``error.result`` has the output up to then),
        VmExpiredError when the VM's lifetime is over, VmGuestError when it ends otherwise, or the
        kind of kernel cannot take ``env``.
        """
        loop = asyncio.get_running_loop()
        outputs = _Outputs(self._max_output)

        def on_event(event: wire.Event) -> None:
            if isinstance(event, wire.Output):
                output = Output(event.msg_type, event.content, event.metadata)
                outputs.add(output)
                if on_output is not None:
                    on_output(output)
            elif isinstance(event, wire.InputRequest) and on_input is not None:
                self._ask_person(event, on_input)

        call = wire.Run(code, timeout, dict(env or {}), on_input is not None)
        began = loop.time()
        try:
            result, _ = await self.connection.call(call, on_event=on_event)
        except VmTimeoutError as error:
            end = wire.RunEnd(124, loop.time() - began, ("TimeoutError", error.message, []))
            error.result = outputs.result(self.vm_id, end)
            await asyncio.wait([self.connection.ended], timeout=ANSWER_SECONDS)  # in the same write
            raise
        except RunnerSilentError as error:  # it should have ended the VM: so we do
            if self.record.runner is not None:
                await asyncio.to_thread(kill, self.record.runner)
            raise VmTimeoutError(
                f"{error.message}; its VM was destroyed", hint=error.hint, code_ran="unknown"
            ) from error
        return outputs.result(self.vm_id, msgspec.convert(result, wire.RunEnd))

    def _ask_person(self, event: wire.InputRequest, on_input: OnInput) -> None:
        """In a thread of its own: it may wait for ever, and others need the loop's few threads."""
        loop = asyncio.get_running_loop()

        def ask() -> None:
            try:
                call: wire.Call = wire.Answer(
                    event.question, on_input(event.prompt, event.password)
                )
            except BaseException:  # there is no answer: not an empty one
                call = wire.Interrupt(question=event.question)
            with contextlib.suppress(RuntimeError):  # the loop is over
                loop.call_soon_threadsafe(self.connection.tell, call)

        threading.Thread(target=ask, name=f"input of {self.vm_id}", daemon=True).start()

    async def interrupt(self) -> None:
        """KeyboardInterrupt for the code that runs; without any, nothing.  Raises VmGuestError."""
        await self.connection.call(wire.Interrupt())

    async def put(
        self,
        source: Path | bytes,
        target: str,
        *,
        max_bytes: int = files.MAX_BYTES,
        max_files: int = files.MAX_FILES,
        on_progress: files.OnProgress | None = None,
        on_skip: OnSkip | None = None,
    ) -> int:
        """Copy ``source``, a file or directory of the host or bytes, to the guest; how many bytes.

        A ``target`` that ends with "/" is a directory that is there, and gets ``source`` under its
        own name; else it is the name that ``source`` gets.  A relative one begins at the guest
        user's home.  Files that are there are written over; all of it is the guest's user's.  Links
        and devices are left out: ``on_skip`` hears of each; without it, the log does.

        Raises VmFileError (no such file, no permission, a limit, the guest's disk is full, …);
        VmGuestError when the VM ends or does not answer.
        """
        done = await files.put_tree(
            self._exchange, source, target, max_bytes=max_bytes, max_files=max_files,
            on_progress=on_progress,
        )  # fmt: skip
        return self._tell(done, on_skip)

    async def get(
        self,
        source: str,
        target: Path,
        *,
        max_bytes: int = files.MAX_BYTES,
        max_files: int = files.MAX_FILES,
        on_progress: files.OnProgress | None = None,
        on_skip: OnSkip | None = None,
    ) -> int:
        """Copy ``source``, a file or a directory of the guest, to the host; how many bytes.

        A file replaces the file ``target`` (as a whole, at the end), or goes into the directory
        ``target``; a directory's contents go into the directory ``target``, made if need be, where
        nothing that is there is written over.  No link is followed or made: nothing lands outside.
        What is neither a file nor a directory is left out: ``on_skip`` hears of it; or the log.

        Raises VmFileError (no such file, no permission, a limit, something is there already, …);
        VmGuestError when the VM ends, does not answer, or lies (ProtocolError).
        """
        done = await files.get_tree(
            self._exchange, source, target, max_bytes=max_bytes, max_files=max_files,
            on_progress=on_progress,
        )  # fmt: skip
        return self._tell(done, on_skip)

    async def read_file(self, path: str, max_bytes: int = 1 << 20) -> bytes:
        """What a file of the guest contains.

        Raises VmFileError (no such file, more than ``max_bytes``, …), VmGuestError.
        """
        return await files.read_file(self._exchange, path, max_bytes)

    async def ping(self, timeout: float = ANSWER_SECONDS) -> None:
        """Prove that the guest answers.  Raises VmGuestError when it does not in time."""
        await self._ask(messages.Stats(), timeout)

    async def statistics(self, timeout: float = ANSWER_SECONDS) -> dict[str, Any]:
        """What the guest uses: the fields of `vmkernel.protocol.messages.Usage`.

        Raises VmGuestError when the guest does not answer within ``timeout`` seconds.
        """
        return await self._ask(messages.Stats(), timeout)

    async def wait_ended(self) -> VmError | None:
        """Until the VM has ended; why, or None when it was asked to."""
        return await asyncio.shield(self.connection.ended)

    async def close(self) -> None:
        """Let go of the VM.  One that this process created, and that is not kept, ends."""
        if not self.connection.ended.done():
            self._stays = self.record.kept or self.runner is None
        self.connection.close()

    async def _exchange(
        self, command: messages.Command, buffers: Sequence[frames.Piece]
    ) -> tuple[dict[str, Any], list[memoryview]]:
        return await self.connection.call(wire.Ask(command, CHUNK_SECONDS), buffers=buffers)

    def _tell(self, done: files.Transfer, on_skip: OnSkip | None) -> int:
        for path in done.skipped:
            if on_skip is not None:
                on_skip(path)
            else:
                log.warning("%s: left out, being neither file nor directory: %r", self.vm_id, path)
        return done.bytes

    async def _ask(
        self, command: messages.Command, timeout: float = ANSWER_SECONDS
    ) -> dict[str, Any]:
        result, _ = await self.connection.call(wire.Ask(command, timeout))
        return result


class _Outputs:
    """A run's output as it comes in, up to a number of bytes (of JSON, and characters of text)."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept = 0
        self._truncated = False
        self._texts = {"stdout": StringIO(), "stderr": StringIO()}
        self._results: list[dict[str, Any]] = []

    def add(self, output: Output) -> None:
        if output.msg_type == "stream":
            text = str(output.content.get("text", ""))
            room = self._most - self._kept
            if len(text) > room:
                self._truncated = True
                text = text[: max(0, room)]
            self._kept += len(text)
            name = "stderr" if output.content.get("name") == "stderr" else "stdout"
            self._texts[name].write(text)
        elif output.msg_type in ("display_data", "execute_result"):
            data = output.content.get("data")
            if not isinstance(data, dict):
                return
            encoded = msgspec.json.encode(data)
            size = max(len(encoded), bounds.memory(encoded) // DENSEST) + BUNDLE_COST
            if self._kept + size > self._most:
                self._truncated = True
                return
            self._kept += size
            self._results.append(data)

    def result(self, vm_id: str, end: wire.RunEnd) -> RunResult:
        return RunResult(
            vm_id=vm_id,
            stdout=self._texts["stdout"].getvalue(),
            stderr=self._texts["stderr"].getvalue(),
            results=self._results,
            error=RunError(*end.error) if end.error else None,
            exit_code=end.exit_code,
            duration=end.duration,
            truncated=self._truncated,
        )
