"""Work that a command does in the foreground: what ends it early, and with which exit code.

The work runs in an event loop. SIGTERM, SIGHUP and a reader that closed its end of our pipe cancel
it, and what it has made is destroyed on its way out; so does SIGINT, unless the work handles that
itself the first time (an interrupt for the code in the guest). Floor 5.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from vmkernel.errors import VmError, VmTimeoutError

if TYPE_CHECKING:
    from vmkernel.cli.account import Account
    from vmkernel.cli.streams import Streams
    from vmkernel.host.handle import VmHandle
    from vmkernel.models import RunResult

T = TypeVar("T")
EXIT_FAILED = 125
"""vmkernel itself failed, as `docker run` tells it."""
EXIT_TIMEOUT = 124
"""The time limit was reached, as timeout(1) tells it."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(Exception):  # noqa: N818 - no error: it was asked for
    """A signal ended the work."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Foreground:
    """``Foreground().run(work)``: the work's result, or `Ended`."""

    def __init__(self) -> None:
        _open_standard_streams()
        self.on_interrupt: Callable[[], Awaitable[None]] | None = None
        """What the first SIGINT means to the work just now; None: it ends it"""
        self.on_end: Callable[[], None] = lambda: None
        """Called when the work is cancelled"""
        self.streams: Streams | None = None
        self.interrupted = False
        self.failure: VmError | None = None
        """Why the work is ended, where that is no signal"""
        self._ended_by = 0
        self._settled = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._interrupting: set[asyncio.Future[None]] = set()

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do the work.  Raises Ended when a signal ended it, or what the work raises."""
        with self._handlers():
            try:
                return asyncio.run(self._main(work))
            except (asyncio.CancelledError, VmError) as error:
                if self.failure is not None:
                    raise self.failure from None
                if self._ended_by or not isinstance(error, VmError):
                    raise Ended(self._ended_by or signal.SIGINT) from None
                raise

    def settle(self) -> None:
        """What the work was to make is there, and stays: from now on no signal ends it early."""
        self._settled = True

    def end(self, number: int) -> None:
        """Cancel the work as if this signal had come; from the loop's thread."""
        if not self._ended_by and not self._settled:
            self._ended_by = number
            self.on_end()
            if self._task is not None:
                self._task.cancel()

    def output_failed(self, error: OSError) -> None:
        """Our stdout or stderr cannot be written to: end the work."""
        if not isinstance(error, BrokenPipeError) and not self._ended_by:
            self.failure = VmError(
                f"the output could not be written: {error.strerror or error}",
                hint="make room where it goes to, or send it elsewhere",
                code_ran="unknown",
            )
        self.end(signal.SIGPIPE)

    async def _main(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        if self._ended_by:  # before the loop was there
            raise asyncio.CancelledError
        return await work()

    @contextlib.contextmanager
    def _handlers(self) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            if before[number] != signal.SIG_IGN or number == signal.SIGTERM:  # nohup: stay so
                signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if self._settled else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._loop is None:
            self._ended_by = self._ended_by or number
            return
        streams = self.streams
        blocked = streams is not None and streams.blocked
        with contextlib.suppress(RuntimeError):  # the loop is closed: all is done
            self._loop.call_soon_threadsafe(self._act, number, blocked)
        if blocked:
            from vmkernel.cli.streams import Abandoned

            raise Abandoned

    def _act(self, number: int, blocked: bool) -> None:
        first, interrupt = not self.interrupted, self.on_interrupt
        if number == signal.SIGINT:
            self.interrupted = True
            if interrupt is not None and first and not blocked:
                waiting = asyncio.ensure_future(interrupt())
                self._interrupting.add(waiting)
                waiting.add_done_callback(self._seen)
                return
        self.end(number)

    def _seen(self, interrupting: asyncio.Future[None]) -> None:
        self._interrupting.discard(interrupting)
        if not interrupting.cancelled():
            interrupting.exception()  # a VM that ends meanwhile is told by who runs the code


def _open_standard_streams() -> None:
    """Let no socket of ours become descriptor 1 of a command that was started with that closed."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one


async def run_code(
    foreground: Foreground,
    vm: VmHandle,
    code: str,
    *,
    timeout: float | None,
    account: Account | None = None,
    env: Mapping[str, str] | None = None,
    results: bool = False,
    script: bool = False,
    trusted: bool = False,
) -> RunResult:
    """Run the code with this command's streams and signals for its own.

    ``trusted``: a terminal gets what the code writes as it is (setting ``outputs``).

    With *account* its outputs go there and not to our stdout and stderr.  Cancelled, it does not
    wait for the code's end: the VM, or the connection to it, is about to end.
    """
    from vmkernel.cli.stdin import Stdin
    from vmkernel.cli.streams import Streams

    streams = Streams(foreground.output_failed, results=results, script=script, trusted=trusted)
    loop = asyncio.get_running_loop()

    def say(prompt: str) -> None:  # called in a thread, and a blocked write is the main thread's
        loop.call_soon_threadsafe(streams.write, 1 if account is None else 2, prompt)

    stdin = Stdin(say)
    foreground.streams, foreground.on_end = streams, stdin.give_up
    foreground.on_interrupt = vm.interrupt
    running = asyncio.ensure_future(
        vm.run(
            code,
            timeout=timeout,
            env=env,
            on_output=streams.show if account is None else account.hear,
            on_input=stdin,
        )
    )
    running.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen
    try:
        result = await asyncio.shield(running)
    finally:
        foreground.on_interrupt = None
        stdin.give_up()
    if account is None:
        streams.show_end(result.error, result.exit_code)
        streams.close()
    else:
        account.result = result
    return result


@contextlib.contextmanager
def exit_codes(on_failure: Callable[[int, VmError | None], None] | None = None) -> Iterator[None]:
    """Turn what ended the work early into our exit code, with the error's text on stderr.

    ``on_failure(exit code, error)`` is called before, for a machine-readable account.
    """
    error: VmError | None = None
    try:
        yield
        return
    except VmTimeoutError as failure:
        code, error = EXIT_TIMEOUT, failure
    except VmError as failure:
        code, error = EXIT_FAILED, failure
    except Ended as end:
        code = 128 + end.number
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    try:
        if on_failure is not None:
            on_failure(code, error)
        if error is not None:
            from vmkernel.cli.output import say_error

            say_error(error)
    except OSError:
        os._exit(code)  # nobody reads it; the interpreter would try again, and end with 120
    sys.exit(code)
