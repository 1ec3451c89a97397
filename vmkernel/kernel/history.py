"""The cells that a person ran, kept on the host: the wrapper's side of it.

A VM forgets, so the history that front ends ask for (``history_request``: arrow-up, search) lies
on the host, in one SQLite file that all kernels of the user share.  It is read and written by
IPython's own HistoryManager.  Importing that costs 0.1 s and 10 MiB, which no kernel is to
pay for its start or for as long as it lives: it happens in a small process beside the wrapper
(:mod:`vmkernel.kernel.history_process`), started when there is something to do and ended when
there was nothing for a while.

What the wrapper was told is kept here until that process says that it is on disk.  Within
``DELAY`` of the cell's begin it is in the process's socket, and survives the wrapper's end,
SIGKILL included.  Whatever goes wrong is a warning in the log, and never a cell's business.

The guest has no part in it: it cannot read the file, and what is stored is the code that the
front end sent.  Of the guest's words only a line's number and a result's text are taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from vmkernel.environment import plain

if TYPE_CHECKING:
    from vmkernel.settings import Settings

log = logging.getLogger("vmkernel")

DELAY = 1.0
"""Seconds from a cell's begin until it is handed over; what comes meanwhile goes with it."""
REST = 2.0
"""Seconds without anything to do after which the process is ended.  To start it again takes 0.2 s
of processor time, at low priority; to keep it, 15 MiB for each kernel that somebody works with."""
PATIENCE = 10.0
"""Seconds that a front end's question may take."""
GOODBYE = 3.0
"""Seconds that the kernel's end may be delayed by what is still to be handed over."""
RETRY = 60.0
"""Seconds until the next attempt, after the file could not be written."""
MOST_CRASHES = 3
"""How many processes in a row may end without a word."""
MOST_PENDING = 10_000
"""How many things may wait to be stored."""
MOST_LINES = 1 << 31
"""No session is so long; the number is the guest's."""
LONGEST_OUTPUT = 16 << 10
"""Characters of a result's text."""
MOST_OUTPUT = 256 << 10
"""Characters of this session's results that are kept for who asks for a range with outputs."""
MOST_OUTPUTS = 10_000
"""How many of them; each may be empty."""
_LONGEST_ANSWER = 1 << 28

_NOTHING: dict[str, Any] = {"status": "ok", "history": []}


class History:
    """The history of one kernel, which is a *session* in IPython's words.

    ``options`` are the front end's ``--Class.trait=…``; those of the HistoryManager count.
    Makes no file and no process until there is something to store or to find.
    """

    def __init__(self, settings: Settings, options: Sequence[str] = ()) -> None:
        self.on = settings.history == "on" and not _is_private(options)
        """Whether the history is on the host; else the guest's own is all there is."""
        self._file = str(settings.history_file)
        self._options = [each for each in options if each.startswith("--HistoryManager.")]
        self._line = 0  # the session's last
        self._outputs: dict[int, str] = {}
        self._kept = 0  # characters of them
        self._fresh: set[int] = set()  # lines whose output is not in what is pending
        self._pending: deque[list[Any]] = deque()  # not known to be on disk, in order
        self._sent = 0  # how many of them the process has
        self._session: list[Any] | None = None  # as one process named it, for its successor
        self._starting = asyncio.Lock()
        self._writer: asyncio.StreamWriter | None = None  # to the process
        self._questions: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._asked = 0
        self._due: asyncio.TimerHandle | None = None
        self._rest: asyncio.TimerHandle | None = None
        self._closed = False
        self._crashes = 0
        self._warned = ""
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        running = self._writer is not None
        return f"<History on={self.on} pending={len(self._pending)} running={running}>"

    # --- what happened ---

    def record(self, line: Any, code: str) -> None:
        """A cell that is to be remembered has begun; ``line`` is its execution count.

        The number is the guest's word: where it is none that can be, the cell is not kept.  None
        stands for the next one: the guest died of the cell before it had said it.
        """
        if line is None:
            line = self._line + 1
        if not self.on or not code or code.isspace():  # those have no number of their own
            return
        if type(line) is not int or not 0 < line < MOST_LINES:
            return
        if line <= self._line:  # the guest kernel was replaced, and counts from 1 again
            self._settle_outputs()
            self._outputs.clear()
            self._kept = 0
            self._store(["session"])
        self._line = line
        self._store(["line", line, code])

    def output(self, line: Any, text: Any) -> None:
        """The cell with this execution count has this result, as text: the guest's words."""
        if not self.on or type(line) is not int or not 0 < line <= self._line:
            return
        if type(text) is not str:
            return
        if len(text) > LONGEST_OUTPUT:
            text = text[:LONGEST_OUTPUT] + " …"
        self._kept += len(text) - len(self._outputs.get(line, ""))
        self._outputs[line] = text
        while self._kept > MOST_OUTPUT or len(self._outputs) > MOST_OUTPUTS:
            oldest = next(iter(self._outputs))
            self._kept -= len(self._outputs.pop(oldest))
            self._fresh.discard(oldest)
        self._fresh.add(line)
        if self._due is None:
            self._hand_over_in(DELAY)

    def _settle_outputs(self) -> None:
        """What a line's result is by now goes to disk: a guest may say it again and again."""
        fresh, self._fresh = self._fresh, set()
        for line in sorted(fresh & self._outputs.keys()):
            self._store(["output", line, self._outputs[line]])

    def _store(self, item: list[Any]) -> None:
        if len(self._pending) >= MOST_PENDING:
            return  # the log has said why nothing is written
        self._pending.append(item)
        if self._due is None:
            self._hand_over_in(DELAY)

    # --- what is asked ---

    async def query(self, content: dict[str, Any]) -> dict[str, Any]:
        """The content of the ``history_reply`` to a ``history_request``.

        As ipykernel's ``do_history`` gives it, but the current session has its number, not 0.
        Empty, with a warning in the log, when the file cannot be read.
        """
        self._asked += 1
        number = self._asked
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._questions[number] = answer
        try:
            async with asyncio.timeout(PATIENCE):
                await self._hand_over()
                if self._writer is None:
                    return _NOTHING
                self._send({"question": number, "content": content})
                return await answer
        except TimeoutError:
            self._warn(f"it could not be read within {PATIENCE:g} s")
            return _NOTHING
        finally:
            del self._questions[number]
            self._rest_later()

    # --- the process ---

    def _hand_over_in(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._due = loop.call_later(seconds, lambda: self._spawn(self._hand_over()))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _hand_over(self) -> None:
        """Give what has come since to the process, which is started for it if need be."""
        if not self.on:
            return
        self._settle_outputs()
        if self._due is not None:
            self._due.cancel()
            self._due = None
        async with self._starting:
            if self._writer is None:
                await self._start()
        if self._writer is not None and self._sent < len(self._pending):
            self._send({"store": [*self._pending][self._sent :]})
            self._sent = len(self._pending)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._writer is not None
        self._writer.write(msgspec.json.encode(message) + b"\n")

    async def _start(self) -> None:
        ours, its = socket.socketpair()
        try:
            process = subprocess.Popen(  # noqa: ASYNC220 - a vfork: nothing to wait for
                [sys.executable, "-P", "-m", "vmkernel.kernel.history_process"],
                stdin=its.fileno(),
                stdout=subprocess.DEVNULL,  # ours may be a front end's pipe
                env=plain(os.environ),  # which may have had secrets of the guest's in it
                start_new_session=True,  # a SIGINT for the kernel's group is not for it
            )
        except OSError as error:
            ours.close()
            self._give_up(f"its process cannot be started: {error}")
            return
        finally:
            its.close()
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_LONGEST_ANSWER)
        writer.transport.set_write_buffer_limits(0)  # drain() waits for all
        self._writer = writer
        self._send(
            {
                "file": self._file,
                "options": self._options,
                "session": self._session,
                "outputs": list(self._outputs.items()),
            }
        )
        self._spawn(self._listen(process, reader, writer))

    async def _listen(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        problem: dict[str, Any] = {}
        try:
            while line := await reader.readline():
                message = msgspec.json.decode(line)
                if "failed" in message:
                    problem = message
                else:
                    self._on_message(message)
        except (OSError, ValueError) as error:  # msgspec's are ValueErrors
            log.warning("the history's process said what is not understood: %r", error)
        if self._closed:  # it has yet to do its work
            return
        writer.close()
        if self._writer is writer:  # it was not we who ended it
            self._on_end(problem)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)  # its socket is closed: it is gone but for the name

    def _on_message(self, message: dict[str, Any]) -> None:
        if "stored" in message:
            for _ in range(message["stored"]):
                self._pending.popleft()
                self._sent -= 1
            self._session = message["session"]
            self._crashes = 0
            self._rest_later()
        else:
            question = self._questions.get(message["answer"])
            if question is not None and not question.done():
                question.set_result(message["content"])

    def _on_end(self, problem: dict[str, Any]) -> None:
        """The process ended by itself: it could not do its work, or somebody killed it."""
        self._writer = None
        self._sent = 0
        for question in self._questions.values():
            if not question.done():
                question.set_result(_NOTHING)
        if problem.get("final"):
            self._give_up(problem["failed"])
        elif problem:
            self._warn(problem["failed"])
            if self._due is None and self._pending:
                self._hand_over_in(RETRY)
        else:
            self._crashes += 1
            if self._crashes == MOST_CRASHES:
                self._give_up("its process died again and again")
            elif self._due is None and self._pending:
                self._hand_over_in(DELAY)

    def _warn(self, what: str) -> None:
        if what != self._warned:
            self._warned = what
            log.warning("the history (%s): %s", self._file, what)

    def _give_up(self, why: str) -> None:
        self.on = False
        self._pending.clear()
        log.warning(
            "the history (%s) is off for this kernel, which knows its own cells only: %s",
            self._file,
            why,
        )

    def _rest_later(self) -> None:
        """End the process when it will have had nothing to do for a while."""
        if self._rest is not None:
            self._rest.cancel()
        self._rest = asyncio.get_running_loop().call_later(REST, self._rest_now)

    def _rest_now(self) -> None:
        if self._pending or self._questions:
            self._rest_later()
        elif self._writer is not None:
            writer, self._writer = self._writer, None
            writer.write_eof()

    async def close(self) -> None:
        """Hand over what is left.  The process ends by itself, once all is on disk."""
        if self._fresh or self._sent < len(self._pending):
            await self._hand_over()
        for timer in (self._due, self._rest):
            if timer is not None:
                timer.cancel()
        self._closed = True
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(GOODBYE):
                    await writer.drain()
            writer.close()


def _is_private(options: Sequence[str]) -> bool:
    """Whether a front end asked for a history that nobody else sees, or for none."""
    asked = dict(option.lstrip("-").partition("=")[::2] for option in options)
    return asked.get("HistoryManager.hist_file") == ":memory:" or asked.get(
        "HistoryManager.enabled", ""
    ).lower() in ("false", "0")
