"""The Python engine: an IPythonKernel whose ZeroMQ is replaced by the ports.

ipykernel does what a Jupyter kernel does; this module gives it another way in and out.
Requests to the main shell come one after another from the host, which keeps the queue; outputs
and replies go out through :class:`PortSession`, batched into one write per request where that
costs no liveness.  There is one event loop, in the main thread, and two helper threads: for
output (:mod:`vmkernel.guest.streams`) and for what must be heard while a cell runs
(:mod:`vmkernel.guest.control`).
"""

from __future__ import annotations

import asyncio
import contextvars
import faulthandler
import functools
import gc
import inspect
import logging
import mmap
import os
import pdb  # noqa: T100 - IPython's takes its place
import site
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a warning that helps nobody

import IPython.core.debugger
import msgspec
from ipykernel.kernelapp import IPKernelApp
from traitlets.config import Config

from vmkernel.guest import (
    script,  # noqa: F401 - for whoever sends one: a template has it loaded
    workspace,
)
from vmkernel.guest.control import ControlLane, Subshell
from vmkernel.guest.debug import ShellCaller, connect_debugger
from vmkernel.guest.express import find_express
from vmkernel.guest.kernel import PortKernel, as_message, idents
from vmkernel.guest.lean import Shortcuts
from vmkernel.guest.magics import VmMagics
from vmkernel.guest.port import Interrupts, Port
from vmkernel.guest.session import PortSession, encode_body
from vmkernel.guest.streams import OutputPump, PortStream, stream_message
from vmkernel.guest.tee import Tee
from vmkernel.guest.tracebacks import Tracebacks
from vmkernel.guest.wake import Generators, reseed_process
from vmkernel.protocol import frames, messages

WARM_UP = (
    "1+1",
    "print(end='')",
    "1/0",
    "await __import__('asyncio').sleep(0)",
    "!true",
    "%time 1",
)
"""Cells that a template has run: what they import, no clone has to."""
WARM_UP_WITH = {
    "pandas": "import pandas as _w; _w.DataFrame({'a': [1.5]})._repr_html_(); del _w",
    "matplotlib.pyplot": (
        "import matplotlib.pyplot as _w; _w.plot([1, 2]); _w.title('a'); _w.show(); del _w"
    ),
}
"""More of them, where the recipe preloads the module."""

UTC = ("", "UTC", "Etc/UTC")
UTC_NAMES = ("UTC", "UTC")
REHEARSED = (
    "1+1",
    "x = 1",
    "import os, sys",
    "x = 1\ny = x + 1\nprint(end='')\ny",
    "for x in 'a', 'b':\n    def f(y=x):\n        return y",
)
REHEARSALS = 16
"""How often each: what Python has run eight times or so, it runs in its quick way."""
FIRST = ("1+1", "import sys as _w\ndel _w")
"""What a clone runs for itself, if it has nothing else to do: it leaves nothing."""
PAGES = 64
GROWTHS = 6
"""After so many first requests QEMU is made to let its table of translated addresses grow."""
IDLE = 0.03
"""Seconds after its wake-up in which a clone runs a first cell of its own, if it has no other."""


class Translations:
    """QEMU's table of a guest's translated addresses, in emulation.

    It has 256 entries in a fresh clone, and doubles only when it is emptied while nearly full
    (accel/tcg/cputlb.c, tlb_mmu_resize_locked), which a guest that runs one process hardly ever
    asks for.  A cell with the small table takes an eighth longer.
    """

    def __init__(self) -> None:
        self._pages = mmap.mmap(-1, PAGES * mmap.PAGESIZE, mmap.MAP_PRIVATE)

    def grow(self) -> None:
        """Give back more pages than Linux forgets one by one (tlb_single_page_flush_ceiling)."""
        self._pages[0] = self._pages[(PAGES - 1) * mmap.PAGESIZE] = 1
        self._pages.madvise(mmap.MADV_DONTNEED)


class Engine:
    """One guest kernel: owns the ports, serves requests in order."""

    def __init__(self, port_fd: int, control_fd: int, output_fds: dict[str, int]) -> None:
        self.interrupts = Interrupts()
        self.port = Port(port_fd, self.interrupts)
        self.control = ControlLane(Port(control_fd))
        self.pump = OutputPump(output_fds, self.port.flush, self.interrupts)
        self._requests: list[tuple[messages.ToGuest, list[memoryview]]] = []
        self._inputs: list[str] = []
        self._awake = False
        self._generators: Generators | None = None
        """In a template, and until its clone has served a request"""
        self._served = False
        self._idle: asyncio.TimerHandle | None = None
        self._translations = Translations()
        self._growths = GROWTHS if is_emulated() else 0
        self._reading = threading.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._lock = asyncio.Lock()
        self._context = contextvars.copy_context()
        self._build_kernel()

    # --- start ---

    def _build_kernel(self) -> None:
        PortSession.port = self.port
        PortSession.pump = self.pump
        PortSession.owner_pid = os.getpid()
        session = PortSession(username="user")
        for name, fd in (("stdout", 1), ("stderr", 2)):
            publish = functools.partial(self._publish_stream, session)
            stream = PortStream(name, fd, publish, self.pump)
            self.pump.streams[name] = stream
            setattr(sys, name, stream)
        config = Config()
        config.HistoryManager.hist_file = ":memory:"
        if is_emulated():
            # jedi takes five seconds for a completion there; IPython's own completer looks at the
            # live objects, too.  `%config Completer.use_jedi = True` brings it back
            config.IPCompleter.use_jedi = False
        # What plain ipykernel's app sets up (ipykernel.kernelapp, init_shell and friends)
        config.IPKernelApp.connection_file = ""
        pdb.Pdb = IPython.core.debugger.Pdb = IPython.core.debugger.InterruptiblePdb  # type: ignore[misc]
        pdb.set_trace = IPython.core.debugger.set_trace
        log = logging.getLogger("vmkernel")
        log.addHandler(logging.NullHandler())
        # The instance of its class: comms and libraries look for it there
        self.kernel = PortKernel.instance(
            subshells=self.control.subshells,
            user_ns=None,  # a real module's, as in plain ipykernel, not a dict in a dummy
            session=session,
            config=config,
            log=log,
        )
        self.kernel.iopub_socket = "iopub"
        self.kernel.port = self.port
        self.kernel.ask = self._ask
        self.control.kernel = self.kernel
        shell = self.kernel.shell
        # Code asks it whether it runs in a kernel, and for the kernel
        app = IPKernelApp.instance(config=config)
        app.kernel, app.shell = self.kernel, shell
        shell.register_magics(VmMagics(shell, self._call_host))
        shell.extension_manager.load_extension("storemagic")  # plain ipykernel has it, too
        shell.displayhook.pub_socket = "iopub"
        shell.display_pub.pub_socket = "iopub"
        shell.configurables.append(self.kernel)
        self._shortcuts = Shortcuts(shell)
        self._tracebacks = Tracebacks(shell)
        express = find_express(self.kernel)
        tee = Tee(shell)
        if express is not None:
            express.watch(tee)
            self.kernel.express = express
        # The kernel's own names must not show up in %who
        shell.user_ns_hidden.update(shell.user_ns)

    @staticmethod
    def _publish_stream(session: PortSession, name: str, text: str, parent: dict[str, Any]) -> None:
        session.send("iopub", stream_message(name, text, parent))

    def resync(self, marker: bytes) -> None:
        """Take the place of a dead guest kernel: both ports begin anew at ``marker``."""
        self.port.resync(marker)
        self.control.port.resync(marker)

    def run(self, on_ready: Any, warm_up: bool) -> None:
        """Serve until the process ends.  ``on_ready(kernel_info)`` is called once.

        ``warm_up``: run the usual code paths first, for a template to be saved.
        """
        loop = self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        connect_debugger(self.kernel, ShellCaller(loop, self._run_for_debugger))
        self.interrupts.install()
        faulthandler.enable(file=2)  # what it prints is shown with the news of the death
        self.pump.start()
        self.control.start()
        loop.add_reader(self.port.fd, self._on_readable)
        loop.call_soon(self._prepare, on_ready, warm_up)
        while True:
            try:
                loop.run_forever()
                break
            except KeyboardInterrupt:
                continue  # an interrupt that came too late for its cell
        self.pump.publish()
        self.port.flush()

    def _prepare(self, on_ready: Any, warm_up: bool) -> None:
        from tornado import ioloop

        self.kernel.io_loop = ioloop.IOLoop.current()
        task = asyncio.get_running_loop().create_task(self._get_ready(on_ready, warm_up))
        self._tasks.add(task)

    async def _get_ready(self, on_ready: Any, warm_up: bool) -> None:
        try:
            await self._warm_up_template(warm_up)
        except BaseException:  # the agent tells the host what this process said last
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
        on_ready({"status": "ok", **self.kernel.kernel_info})

    async def _warm_up_template(self, warm_up: bool) -> None:
        if warm_up:
            preloaded = (code for name, code in WARM_UP_WITH.items() if name in sys.modules)
            for code in (*WARM_UP, *preloaded):
                await self._run_untraced(code)
            self.kernel.shell.user_ns.pop("_exit_code", None)  # what `!true` leaves
            self.kernel.do_complete("import os; os.pa", 16)
            self.kernel.do_inspect("print", 5)
            self.kernel.do_is_complete("for i in x:")
            await self._rehearse_requests()
            self._generators = Generators()  # as the rehearsals have left them to nobody
        gc.collect()
        gc.freeze()  # the collector must not write to memory that clones share

    async def _rehearse_requests(self) -> None:
        """Serve a wake-up and cells as they will come, again and again, on a socket of our own.

        So decoders and caches are made, and Python's own code for what is done often takes the
        place of what is done once (PEP 659): a clone would translate both, and write to memory that
        it shares.
        """
        home, cwd = os.getcwd(), workspace.rehearsal()
        wake = messages.encode_json(messages.WakeKernel(os.urandom(64), {}, cwd))
        requests = [("wake_request", wake)] * REHEARSALS
        for code in REHEARSED:
            cell = {"code": code, "silent": False, "store_history": True, "user_expressions": {}}
            requests += [("execute_request", messages.encode_json(cell))] * REHEARSALS
        usual = self.port.fd
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        with ours, theirs, self._unremembered():
            self._loop.remove_reader(usual)
            self._loop.add_reader(ours, self._on_readable)
            self.port.fd = ours.fileno()
            try:
                for msg_type, content in requests:
                    if msg_type == "wake_request":
                        # Not by the usual reseeding: it would make OpenSSL's generator, for all
                        self._generators = Generators()
                        self._awake = False
                    request = _request(msg_type, content)
                    theirs.sendall(b"".join(frames.encode(messages.encode_json(request))))
                    await self._until_served(theirs)
            finally:
                self.pump.publish()
                self.port.flush()
                self._loop.remove_reader(ours)
                self._loop.add_reader(usual, self._on_readable)
                self.port.fd = usual
                os.chdir(home)
        if self._idle is not None:
            self._idle.cancel()
        self._awake = self.control.awake = self._served = False
        self._growths = GROWTHS if is_emulated() else 0

    async def _until_served(self, theirs: socket.socket) -> None:
        reader = frames.FrameReader()
        while True:
            with suppress(BlockingIOError):
                for message in reader.feed(theirs.recv(1 << 16)):
                    if b'"wake_reply"' in message or b'"execution_state":"idle"' in message:
                        return
            await asyncio.sleep(0)

    @contextmanager
    def _unremembered(self) -> Iterator[None]:
        """No cell that runs in here is in the history, or leaves anything to the user."""
        shell = self.kernel.shell
        history, hook, names = shell.history_manager, shell.displayhook, shell.user_ns
        saved, hidden = dict(names), dict(shell.user_ns_hidden)
        count, inputs = shell.execution_count, len(history.input_hist_raw)
        traits = {name: getattr(history, name) for name in ("_i", "_ii", "_iii", "_i00")}
        results = hook._, hook.__, hook.___
        try:
            yield
        finally:
            shell.execution_count = count
            del history.input_hist_raw[inputs:], history.input_hist_parsed[inputs:]
            for name, value in traits.items():
                setattr(history, name, value)
            with history.db_input_cache_lock:
                history.db_input_cache = []
            for kept in (
                history.outputs,
                history.output_hist_reprs,
                history.exceptions,
                names["_oh"],
            ):
                kept.clear()
            hook._, hook.__, hook.___ = results
            names.clear()
            names.update(saved)
            shell.user_ns_hidden.clear()
            shell.user_ns_hidden.update(hidden)
            shell.last_execution_result = None
            for name in ("last_type", "last_value", "last_traceback", "last_exc"):
                vars(sys).pop(name, None)

    async def _run_untraced(self, code: str) -> None:
        """Run a cell as a request does: its code paths are warm then."""
        self.kernel.set_parent([], {"header": {}}, "shell")
        with self._untraced():
            await self.kernel.do_execute(code, False, store_history=False)

    @contextmanager
    def _untraced(self) -> Iterator[None]:
        """Nothing that runs in here reaches the host, or is left in the user's namespace."""
        hook = self.kernel.shell.displayhook
        size, hook.cache_size = hook.cache_size, 0  # no _, no Out
        PortSession.silenced = threading.get_ident()
        # Once it is awake, other threads may have something to say
        self.port.muted = not self._awake
        try:
            yield
        finally:
            self.pump.publish()
            if self.port.muted:
                self.port.discard()
                self.port.muted = False
            PortSession.silenced = 0
            hook.cache_size = size
            history = self.kernel.shell.history_manager
            history.outputs.pop(0, None)  # of a cell that has no number
            history.output_hist_reprs.pop(0, None)
            self.kernel.shell.last_execution_result = None
            for name in ("last_type", "last_value", "last_traceback", "last_exc"):
                vars(sys).pop(name, None)

    # --- requests ---

    def _on_readable(self) -> None:
        if os.getpid() != PortSession.owner_pid:
            return  # a forked child that awaits something: requests are its parent's
        self._receive()
        while self._requests:
            request, buffers = self._requests.pop(0)
            # One context for all: what a cell puts into a ContextVar, the next one finds there
            task = self._begin(self._serve(request, buffers), context=self._context)
            if not task.done():
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _begin(self, steps: Coroutine[Any, Any, None], **options: Any) -> asyncio.Task[None]:
        """A task that runs at once, where Python can do that: until it waits for something."""
        if sys.version_info >= (3, 12):
            return asyncio.Task(steps, loop=self._loop, eager_start=True, **options)
        return self._loop.create_task(steps, **options)

    def _receive(self) -> None:
        with self._reading:
            for message in self.port.receive():
                body, buffers = frames.split(message)
                request = messages.decode(body, messages.ToGuest)
                if request.channel == "stdin":
                    content = messages.decode_object(request.content)
                    self._inputs.append(str(content.get("value", "")))
                else:
                    self._requests.append((request, buffers))

    def _ask(self, msg_id: str, send: Callable[[], None]) -> str:
        """Ask the user; what is typed.  A subshell's answers come on port "control"."""
        if isinstance(threading.current_thread(), Subshell):
            return str(self.control.inbox.ask(msg_id, send))
        self._inputs.clear()  # what was typed for an earlier, interrupted question
        send()
        # Not for ever at once: a signal that comes just before the system call would end nothing,
        # and in a thread the loop may take the answer in, or the thread a request for the loop.
        while not self._inputs:
            self.port.wait(0.05)
            self._receive()
            if self._requests:  # served when this cell is done
                self._loop.call_soon_threadsafe(self._on_readable)
        return self._inputs.pop(0)

    async def _serve(self, request: messages.ToGuest, buffers: list[memoryview]) -> None:
        if request.msg_type in messages.COMM_TYPES and self._lock.locked():
            # A cell that waits in the event loop may be waiting for a widget's answer
            message = as_message(request, buffers)
            contextvars.copy_context().run(self.kernel.serve_meanwhile, message)
            return
        async with self._lock:
            if request.msg_type == "wake_request":
                await self._wake(request)
                return
            if not self._awake:
                return  # nothing is said, either: the host would not hear it
            self._served = True
            self._generators = None  # from now on anything may have been used
            await self._serve_jupyter(request, buffers)

    async def _serve_jupyter(self, request: messages.ToGuest, buffers: list[memoryview]) -> None:
        kernel = self.kernel
        message = as_message(request, buffers)
        self._shortcuts.forget()
        self._tracebacks.forget()
        # Comes to its turn only when the request lets the event loop run
        waits = self._loop.call_soon(kernel.say_awaiting, message)
        try:
            kernel.set_parent(idents(message), message, "shell")
            handler = kernel.shell_handlers.get(request.msg_type)
            if handler is not None:
                self.interrupts.armed = True
                result = handler(request.channel, [], message)
                if inspect.isawaitable(result):
                    await result
        except KeyboardInterrupt:
            pass
        except Exception:
            traceback.print_exc()
        finally:
            self.interrupts.armed = False
            waits.cancel()
            if os.getpid() != PortSession.owner_pid:
                # The cell forked, and this is the child, which came to the cell's end
                with suppress(Exception):  # the streams may be the user's own
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(0)
            if kernel.get_parent("shell").get("msg_id") != request.msg_id:
                kernel.set_parent(idents(message), message, "shell")
            self.pump.publish()  # not sys.stdout, which may be the user's, or None
            kernel.session.send("iopub", "status", {"execution_state": "idle"}, message)
            self.port.flush()
            if self._growths:  # nobody waits for this
                self._growths -= 1
                self._translations.grow()

    def _call_host(self, command: str, arguments: list[str]) -> dict[str, Any]:
        """Ask vmkernel on the host; the content of its reply.  An interrupt ends the wait."""
        number = str(uuid.uuid4())
        parent = self.kernel.get_parent("shell").get("header", {}).get("msg_id", "")
        content: dict[str, Any] = {"id": number, "command": command, "arguments": arguments}
        with suppress(OSError):  # it was removed
            cwd = os.getcwd()
            content |= {"cwd": cwd, "writable": os.access(cwd, os.W_OK)}

        def send() -> None:
            self.pump.publish()
            self.port.send(encode_body(["vm", "vm_request", parent, {}, content]))

        reply: dict[str, Any] = self.control.inbox.ask(number, send)
        return reply

    async def _run_for_debugger(self, code: str) -> dict[str, Any]:
        async with self._lock:
            reply: dict[str, Any] = await self.kernel.do_execute(code, True, store_history=False)
            return reply

    async def _wake(self, request: messages.ToGuest) -> None:
        content = messages.decode(bytes(request.content), messages.WakeKernel)
        if self._generators is not None:
            self._generators.reseed(content.entropy)
        else:
            reseed_process(content.entropy)
        os.environ.update(content.env)
        backend = content.env.get("MPLBACKEND")
        if backend and "matplotlib" in sys.modules:
            sys.modules["matplotlib"].use(backend)  # it read the environment in the template
        if content.env.get("TZ", "") not in UTC or time.tzname != UTC_NAMES:
            time.tzset()
        if content.cwd:
            workspace.wait()
            with suppress(OSError):  # not in the guest: cells start in the user's home
                os.chdir(content.cwd)
        name = os.environ.get("JPY_SESSION_NAME")
        if name:
            self.kernel.shell.user_ns["__session__"] = name
        self._awake = self.control.awake = True
        self.kernel.session.send(
            request.channel, "wake_reply", {"status": "ok"}, {"header": {"msg_id": request.msg_id}}
        )
        self.port.flush()
        self._idle = self._loop.call_later(IDLE, self._warm_up_later)

    def _warm_up_later(self) -> None:
        """Run a cell if nobody else has: under emulation the first run of any code is slow."""
        if not self._served:
            task = self._loop.create_task(self._warm_up(), context=self._context)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _warm_up(self) -> None:
        async with self._lock:
            if not self._served:
                with self._untraced():
                    for code in FIRST:
                        cell = messages.encode_json({"code": code, "store_history": False})
                        await self._serve_jupyter(_request("execute_request", cell), [])


def _request(msg_type: str, content: bytes) -> messages.ToGuest:
    empty = msgspec.Raw(b"{}")
    header = msgspec.Raw(b'{"msg_id":"m","msg_type":"execute_request","session":"s"}')
    return messages.ToGuest("shell", "m", msg_type, header, empty, msgspec.Raw(content))


def is_emulated() -> bool:
    """Whether this machine's processor is QEMU's emulation (TCG) and not a real one (KVM)."""
    with open("/proc/cpuinfo") as file:
        return "QEMU TCG" in file.read(4096)


def prepare_path(without: str) -> None:
    """Let modules be found where a plain kernel finds them: the library, the working directory,
    what the user installs with ``pip install --user``, what the image has.
    """
    site.ENABLE_USER_SITE = True
    site.USER_BASE = site.USER_SITE = None
    directory = site.getusersitepackages()
    os.makedirs(directory, exist_ok=True)
    known = [entry for entry in sys.path if entry not in ("", without)]
    site.addsitedir(directory)
    users = [entry for entry in sys.path if entry not in (*known, "", without)]
    library = [entry for entry in known if not entry.endswith("-packages")]
    sys.path[:] = [*library, "", *users, *(entry for entry in known if entry not in library)]
