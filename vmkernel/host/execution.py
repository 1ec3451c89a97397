"""Running code in a guest, one piece after another: from a request to its last output.

Where it stands: over ``host.guest``, under ``host.runner``.  A notebook's wrapper does the same for
Jupyter's messages, with queues and rules of its own (``kernel.lane``).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from vmkernel.errors import VmError, VmGuestError, VmTimeoutError
from vmkernel.host import contents
from vmkernel.host.wire import InputRequest, Output, RunEnd, Sent, once_more
from vmkernel.protocol import messages

if TYPE_CHECKING:
    from vmkernel.host.guest import Guest, KernelDeath

SHOWN = frozenset(
    "stream display_data update_display_data execute_result clear_output error".split()
)
"""Messages of iopub that are a run's output."""
MOST_UNSENT = 1 << 20
"""Bytes that may wait for a guest that asks and does not listen."""
MOST_ID = 256
LONGEST_WORD = 4096
"""Characters of an exception's name."""
LONGEST_TEXT = 1 << 20
"""Characters of an exception's text, and of its traceback."""
LONGEST_NUMBER = 20
"""Digits of an exit status that is taken for one."""
REPLACEMENTS = 5
"""How many guest kernels in a row may die before the VM is given up."""
INTERRUPT_PATIENCE = 5.0
"""Seconds that cancelled code has to end before its guest kernel is ended."""

Emit = Callable[[Output | InputRequest | Sent], None]


class _Run:
    def __init__(self, emit: Emit, done: asyncio.Future[RunEnd], allow_stdin: bool) -> None:
        self.msg_id = uuid.uuid4().hex
        self.emit = emit
        self.done = done
        self.allow_stdin = allow_stdin
        self.interrupted = False
        self.started = asyncio.Event()
        """The guest says that the code runs: an interrupt before that would hit nothing."""
        self.began = time.monotonic()
        self.reply: dict[str, Any] | None = None
        self.asked = False


class Executor:
    """Runs code in ``guest``, in order of arrival.

    Hand its ``on_output``, ``on_kernel_death`` and ``on_end`` to the guest.
    """

    def __init__(self, boot_timeout: float) -> None:
        self._boot_timeout = boot_timeout
        self.on_work: Callable[[bool], None] = lambda busy: None
        """Called with True when there is work, with False when there is none any more."""
        self._guest: Guest | None = None
        self._lock = asyncio.Lock()
        self._wanted = 0
        self._current: _Run | None = None
        self._replacing: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._dead = False
        self._deaths = 0
        """Guest kernels that died since code was sent to one"""
        self._ended: VmError | None = None
        self.on_hopeless: Callable[[VmError], None] = lambda error: None
        """Called when this VM can run nothing any more: it should be ended."""

    def attach(self, guest: Guest) -> None:
        """The guest is awake: it may be used."""
        self._guest = guest

    @property
    def busy(self) -> bool:
        """Whether code runs or waits to."""
        return self._wanted > 0

    @contextmanager
    def working(self) -> Iterator[None]:
        """Inside, there is work."""
        self._wanted += 1
        self.on_work(True)
        try:
            yield
        finally:
            self._wanted -= 1
            self.on_work(self.busy)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        with self.working():
            async with self._lock:
                yield

    async def run(
        self,
        code: str,
        emit: Emit,
        *,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        allow_stdin: bool = False,
    ) -> RunEnd:
        """Run ``code`` when what came before is done; ``emit`` hears its outputs.

        Cancelling it interrupts the code.  Raises VmTimeoutError when it takes longer than
        ``timeout`` seconds (the VM is then of no use: end it), VmGuestError when the VM ends.
        """
        async with self._turn():
            for task in (self._ending, self._replacing):
                if task is not None:
                    await asyncio.shield(task)
            guest = self._guest
            if self._ended is not None:
                raise once_more(self._ended, "no")
            if guest is None:
                raise VmGuestError("the VM is not up", hint="start it first")
            if env:
                await guest.set_environment(env, self._boot_timeout)
            run = _Run(emit, asyncio.get_running_loop().create_future(), allow_stdin)
            self._current = run
            self._deaths = 0
            guest.send(execute_request(run.msg_id, code, allow_stdin))
            emit(Sent())
            try:
                async with asyncio.timeout(timeout):
                    return await asyncio.shield(run.done)
            except TimeoutError:
                what = f"the code took longer than its time limit of {timeout:g} s"
                # Whoever waits for its turn behind it gets none: the VM is about to end
                self._ended = VmGuestError(f"the VM was destroyed, since {what}")
                raise VmTimeoutError(
                    f"{what}; its VM was destroyed",
                    hint="give it more time (timeout=…), or less to do",
                    code_ran="unknown",
                ) from None
            except asyncio.CancelledError:
                run.emit = lambda event: None  # nobody listens any more
                # In a task of its own: who cancels twice does not leave the code running
                self._ending = asyncio.ensure_future(self._make_it_end(guest, run))
                await asyncio.shield(self._ending)
                raise
            finally:
                if self._ending is None:
                    self._current = None

    def answer(self, question: str, value: str) -> None:
        """What was typed for an `InputRequest`; too late when its run has ended."""
        run, guest = self._current, self._guest
        if run is not None and run.msg_id == question and run.asked and guest is not None:
            run.asked = False
            guest.send(_request("stdin", run.msg_id, "input_reply", {"value": value}))

    async def interrupt(self, *, kill: bool = False, question: str = "") -> None:
        """Interrupt the running code; without any, do nothing.  Raises VmGuestError.

        With ``question``, only the run that asked it.
        """
        run, guest = self._current, self._guest
        if run is not None and guest is not None and question in ("", run.msg_id):
            await _begun(run)
            if not run.done.done():
                run.interrupted = True
                await guest.interrupt(kill=kill)

    async def _make_it_end(self, guest: Guest, run: _Run) -> None:
        """Interrupt code that nobody waits for, so that the next one gets its turn."""
        try:
            await _begun(run)
            for kill in (False, True):
                if run.done.done():
                    return
                with suppress(TimeoutError, VmError):
                    await guest.interrupt(kill=kill)
                    async with asyncio.timeout(INTERRUPT_PATIENCE):
                        await asyncio.shield(run.done)
            if not run.done.done():
                self.on_hopeless(
                    VmGuestError(
                        "a run was cancelled, and the guest could not be made to end it",
                        hint="create another VM",
                    )
                )
        finally:
            self._ending = self._current = None

    # --- from the guest ---

    def on_output(self, message: messages.FromGuest, buffers: Sequence[memoryview]) -> bool:
        """The guest kernel sent a message; returns whether nobody waits for such a one now."""
        if message.channel == "vm":
            self._on_question(message)
            return True
        run = self._current
        if run is None or message.parent_id != run.msg_id or run.done.done():
            return True  # of a thread that code left behind: it belongs to no run
        content = message.content
        if message.channel == "stdin" and message.msg_type == "input_request":
            if not run.allow_stdin or run.asked:
                return True  # one question at a time: whoever answers has one thread for it
            run.asked = True
            asked = contents.question(content)
            run.emit(InputRequest(run.msg_id, asked["prompt"], asked["password"]))
        elif message.channel == "shell" and message.msg_type == "execute_reply":
            if run.reply is not None:
                return True
            run.reply = content
        elif message.channel != "iopub":
            return True
        elif message.msg_type == "execute_input":
            run.started.set()
        elif message.msg_type in SHOWN and contents.fits(message.msg_type, content):
            run.emit(Output(message.msg_type, content, message.metadata))
        elif message.msg_type == "status" and contents.is_idle(content):
            run.done.set_result(_end_of(run))
        else:
            return True
        return False

    def _on_question(self, message: messages.FromGuest) -> None:
        """``%vm``: nobody is here to answer it, and whoever asks must hear that."""
        number, guest = message.content.get("id"), self._guest
        if message.msg_type == "vm_request" and isinstance(number, str) and guest is not None:
            reply = {
                "status": "error",
                "ename": "UsageError",
                "evalue": "%vm is for notebooks; this VM is in the hands of a program",
            }
            request = _request("vm", number[:MOST_ID], "vm_reply", reply)
            if guest.vm.control.unsent < MOST_UNSENT:
                with suppress(VmError):  # the VM is about to end
                    guest.send(request, while_busy=True)

    def on_kernel_death(self, death: KernelDeath) -> None:
        """The guest kernel ended: what ran has ended with it; the VM gets another one."""
        run = self._current
        if run is not None and not run.done.done():
            if death.output:
                run.emit(Output("stream", {"name": "stderr", "text": death.output}, {}))
            if death.asked_for and run.reply is not None:
                run.done.set_result(_end_of(run))
            else:
                run.done.set_result(
                    RunEnd(
                        death.exit_code,
                        time.monotonic() - run.began,
                        ("GuestKernelDied", f"{death.reason} ({death.hint})", []),
                    )
                )
        self._dead = True
        self._deaths += 1
        if self._deaths > REPLACEMENTS:
            self.on_hopeless(
                VmGuestError(
                    "the guest kernel died again and again, and no other stayed in its place",
                    hint="create another VM",
                )
            )
        elif self._replacing is None:
            self._replacing = asyncio.ensure_future(self._replace())

    def refuse(self, error: VmError) -> None:
        """The VM is about to end: nothing new is run."""
        self._ended = self._ended or error

    def on_end(self, error: VmError) -> None:
        """The VM has ended."""
        self.refuse(error)
        run = self._current
        if run is not None and not run.done.done():
            run.done.set_exception(once_more(error, "unknown"))
            run.done.exception()  # seen: its waiter may be gone

    async def _replace(self) -> None:
        """Put a kernel in the dead one's place, and again if that dies, too."""
        assert self._guest is not None
        error: VmError | None = None
        for _ in range(REPLACEMENTS):
            self._dead = False
            try:
                await self._guest.restart_kernel(self._boot_timeout)
            except VmError as failure:
                error = failure
                await asyncio.sleep(0.5)
                continue
            if not self._dead:
                break
        else:
            reason = f": {error.message}" if error is not None else ""
            self.on_hopeless(
                VmGuestError(
                    f"the guest kernel died, and no other stayed in its place{reason}",
                    hint="create another VM",
                )
            )
        self._replacing = None


async def _begun(run: _Run) -> None:
    """Until the code runs or has run; not for ever, as a guest may not say so."""
    started = asyncio.ensure_future(run.started.wait())
    waiting: set[asyncio.Future[Any]] = {started, run.done}
    await asyncio.wait(waiting, timeout=INTERRUPT_PATIENCE, return_when=asyncio.FIRST_COMPLETED)
    started.cancel()


def execute_request(msg_id: str, code: str, allow_stdin: bool = False) -> messages.ToGuest:
    """Code on its way to the guest kernel (messaging specification, "Execute")."""
    content = {
        "code": code,
        "silent": False,
        "store_history": True,
        "user_expressions": {},
        "allow_stdin": allow_stdin,
        "stop_on_error": True,
    }
    return _request("shell", msg_id, "execute_request", content)


def _request(channel: Any, msg_id: str, msg_type: str, content: dict[str, Any]) -> messages.ToGuest:
    header = {
        "msg_id": msg_id,
        "msg_type": msg_type,
        "session": "vmkernel",
        "username": "",
        "date": datetime.now(UTC).isoformat(),
        "version": messages.PROTOCOL_VERSION,  # else it passes for version 4
    }
    raw = (msgspec.Raw(messages.encode_json(value)) for value in (header, {}, content))
    return messages.ToGuest(channel, msg_id, msg_type, *raw)


def _end_of(run: _Run) -> RunEnd:
    duration = time.monotonic() - run.began
    reply = run.reply or {}
    if reply.get("status") == "ok":
        return RunEnd(0, duration)
    if reply.get("status") != "error":
        # Cut off before it could say how it ended, such as by an interrupt between two steps
        return RunEnd(130 if run.interrupted else 1, duration, _unanswered(run))
    name = _text(reply.get("ename"), LONGEST_WORD)
    value = _text(reply.get("evalue"), LONGEST_TEXT)
    lines, room = reply.get("traceback"), LONGEST_TEXT
    traceback: list[str] = []
    for line in lines if isinstance(lines, list) else ():
        if room <= 0:
            break
        traceback.append(_text(line, room))
        room -= len(traceback[-1]) + 1
    return RunEnd(exit_code_of(name, value), duration, (name, value, traceback))


def _unanswered(run: _Run) -> tuple[str, str, list[str]]:
    if run.interrupted:
        return ("KeyboardInterrupt", "", [])
    return ("NoReply", "the guest kernel ended the code without a reply", [])


def _text(value: Any, most: int) -> str:
    """A guest's word as text, of so many characters at most."""
    if isinstance(value, str):
        return value[:most]
    return "" if value is None else f"{value!r:.100}"


def exit_code_of(name: str, value: str) -> int:
    """What a process that fails with this exception ends with (library reference, ``sys.exit``)."""
    if name == "SystemExit":
        if value in ("", "None"):
            return 0
        if value in ("True", "False"):
            return int(value == "True")
        try:
            return int(value) & 0xFF
        except ValueError:
            return 1
    if name == "KeyboardInterrupt":
        return 130
    if (
        not name and value.isdecimal() and len(value) <= LONGEST_NUMBER
    ):  # no exception: bash_kernel tells a command's status so
        return int(value) & 0xFF
    return 1
