"""Any bytes on a port, and any message of a guest: nothing but what is meant to happen.

`script/fuzz` does the first of it for hours, with a view of which lines are reached.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
import zmq.asyncio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from security import protocol_inputs
from vmkernel.host.execution import Executor
from vmkernel.host.start import Label
from vmkernel.kernel.history import History
from vmkernel.kernel.sockets import DELIMITER, Sockets
from vmkernel.kernel.wrapper import IOPUB_TYPES, Wrapper
from vmkernel.protocol import messages
from vmkernel.settings import load_settings

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())


def test_what_the_fuzzer_found_worth_keeping_is_still_harmless():
    assert len(CORPUS) > 50
    for path in CORPUS:
        try:
            protocol_inputs.run(path.read_bytes())
        except BaseException:
            print(path)
            raise


@pytest.mark.parametrize("target", protocol_inputs.TARGETS, ids=lambda target: target.__name__)
def test_any_bytes_are_read_or_refused(target: Any):
    starts = [path.read_bytes() for path in CORPUS]
    number = protocol_inputs.TARGETS.index(target)
    own = [data[1:] for data in starts if data and data[0] % len(protocol_inputs.TARGETS) == number]

    @settings(max_examples=60, deadline=None)
    @given(
        st.one_of(st.binary(max_size=300), st.tuples(st.sampled_from(own or [b"{}"]), st.data()))
    )
    def check(drawn: Any) -> None:
        if isinstance(drawn, tuple):
            data, choose = drawn
            at = choose.draw(st.integers(0, len(data)))
            drawn = data[:at] + choose.draw(st.binary(max_size=8)) + data[at + 1 :]
        target(drawn)

    check()


# --- memory --------------------------------------------------------------------------

CHILD = """
import resource, sys
from vmkernel.protocol import bounds, frames, messages
resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, resource.RLIM_INFINITY))
begin, part, end, mebibytes = (eval(word) for word in sys.argv[1:])
count = (mebibytes << 20) // len(part)
reader = frames.FrameReader()
messages_in = []
def feed(data):
    for at in range(0, len(data), 1 << 18):
        messages_in.extend(reader.feed(data[at:at + (1 << 18)]))
total = len(begin) + len(part) * count + len(end) + 4
sent = 0
pending = bytearray(frames._WORD.pack(total - 4) + begin)
def flush(last):
    global sent
    while len(pending) >= frames.MAX_FRAME or (last and pending):
        piece = bytes(pending[:frames.MAX_FRAME])
        del pending[:frames.MAX_FRAME]
        sent += len(piece)
        feed(frames._WORD.pack(len(piece) | (0x80000000 if sent < total else 0)) + piece)
for at in range(0, count, 10000):
    pending += part * min(10000, count - at)
    flush(False)
pending += end
flush(True)
body, buffers = frames.split(messages_in.pop())
try:
    message = messages.decode_from_guest(body)
except bounds.TooMuchError as error:
    print("refused", error)
else:
    body = messages.encode_json(message.content)
    print("passed")
# Not ru_maxrss, which begins with the parent's (getrusage(2), proc_pid_status(5))
(line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(line.split()[1]) >> 10)
"""


def decoded_in_a_process(begin: bytes, part: bytes, end: bytes, mebibytes: int) -> tuple[str, int]:
    """What became of such a message under a limit of 1 GiB, and the process's peak in MiB."""
    arguments = [repr(value) for value in (begin, part, end, mebibytes)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-2000:]
    verdict, peak = done.stdout.splitlines()
    return verdict, int(peak)


DISPLAY = b'["iopub","display_data","",{},{"data":{"x":'
LEGAL = {
    "an image": (DISPLAY + b'"', base64.b64encode(os.urandom(300)), b'"}}]', 127),
    "wide text": (DISPLAY + b'"', "text with 😀 and more\\n".encode(), b'"}}]', 95),
    "numbers": (DISPLAY + b"[", b"0.12345678901,", b"1]}}]", 80),
}
BOMBS = {
    "objects": (DISPLAY + b"[", b"{},", b"1]}}]", 60),
    "texts": (DISPLAY + b"[", b'"",', b"1]}}]", 60),
    "small objects": (DISPLAY + b"[", b'{"a":[{}]},', b"1]}}]", 40),
}


@pytest.mark.parametrize("what", LEGAL)
def test_a_large_display_passes_within_a_gibibyte(what: str):
    verdict, peak = decoded_in_a_process(*LEGAL[what])
    assert verdict == "passed"
    assert peak < 1024


@pytest.mark.parametrize("what", BOMBS)
def test_json_that_grows_when_decoded_is_refused(what: str):
    verdict, peak = decoded_in_a_process(*BOMBS[what])
    assert verdict.startswith("refused")
    assert peak < 512
    # And the most of it that passes is within the bound
    begin, part, end, _ = BOMBS[what]
    verdict, peak = decoded_in_a_process(begin, part, end, {3: 7, 11: 9}[len(part)])
    assert verdict == "passed"
    assert peak < 600


# --- the wrapper kernel ----------------------------------------------------------------


class FakeGuest:
    """What says whatever a test wants it to; a real one takes seconds for each example."""

    def __init__(self) -> None:
        port = SimpleNamespace(
            connected=True, unsent=0, pause=lambda why: None, resume=lambda why: None
        )
        self.vm = SimpleNamespace(kernel=port, control=port, running=True)
        self.sent: list[messages.ToGuest] = []
        self.charged = 0.0

    def send(self, request: messages.ToGuest, buffers: Any = (), *, while_busy: bool = False):
        self.sent.append(request)

    def charge(self, cost: float) -> None:
        self.charged += cost

    async def interrupt(self, *, kill: bool = False) -> None:
        pass


NAMES = ("shell", "control", "stdin", "iopub", "hb")


class Front:
    """A wrapper with real sockets, and a front end at them."""

    def __init__(self, directory: Path) -> None:
        info: dict[str, Any] = {f"{name}_port": number for number, name in enumerate(NAMES, 1)}
        info |= {"transport": "ipc", "ip": str(directory / "k"), "key": ""}
        file = directory / "kernel-1.json"
        file.write_text(json.dumps(info))
        self.sockets = Sockets(file, lambda request: self.wrapper.on_request(request))
        configured = load_settings()
        history = History(configured, ["--HistoryManager.enabled=False"])
        history.on = False
        self.wrapper = Wrapper(configured, self.sockets, Label(), history, None)
        self.guest = FakeGuest()
        self.wrapper.supply.current = self.guest  # type: ignore[assignment]
        self.wrapper.supply._keep_time = self._keep_time  # type: ignore[method-assign]
        self.context = zmq.asyncio.Context()
        self.clients: dict[str, zmq.asyncio.Socket] = {}
        for name in ("shell", "control", "stdin", "iopub"):
            sock = self.clients[name] = self.context.socket(
                zmq.SUB if name == "iopub" else zmq.DEALER
            )
            sock.linger = 0
            if name == "iopub":
                sock.subscribe(b"")
            else:
                sock.identity = b"me"
            sock.connect(f"ipc://{directory}/k-{NAMES.index(name) + 1}")
        self.sent: dict[str, dict[str, Any]] = {}
        self.published: list[str] = []
        publish = self.sockets.publish

        def note(msg_type: str, *rest: Any, **more: Any) -> None:
            self.published.append(msg_type)
            publish(msg_type, *rest, **more)

        self.sockets.publish = note  # type: ignore[method-assign]

    async def _keep_time(self, guest: Any) -> None:
        pass

    async def ask(self, msg_type: str, channel: str = "shell") -> str:
        number = f"request-{len(self.sent)}"
        header = {"msg_id": number, "msg_type": msg_type, "session": "s", "username": "u"}
        self.sent[number] = header
        content = {"code": "1+1", "allow_stdin": True, "comm_id": "c"}
        parts = [json.dumps(part).encode() for part in (header, {}, {}, content)]
        await self.clients[channel].send_multipart([DELIMITER, b"", *parts])
        return number

    async def heard(self) -> list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]]:
        """(channel, header, parent header, content) of all that has come."""
        done = []
        for name, sock in self.clients.items():
            while await sock.poll(5):
                frames = await sock.recv_multipart()
                header, parent, _, content = frames[frames.index(DELIMITER) + 2 :][:4]
                done.append((name, *map(json.loads, (header, parent, content))))
        return done

    def close(self) -> None:
        for lane in (self.wrapper._main, *self.wrapper._subshells.values()):
            lane.close()
        for task in self.wrapper._tasks:
            task.cancel()
        self.context.destroy(linger=0)
        for sock in self.sockets._sockets.values():
            sock.linger = 0
        self.sockets.close()


@asynccontextmanager
async def front(directory: Path) -> AsyncIterator[Front]:
    front = Front(directory)
    try:
        async with asyncio.timeout(5):
            await front.clients["iopub"].recv_multipart()  # its welcome: it hears us
        yield front
    finally:
        front.close()


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.none()),
)  # fmt: skip
FIELDS = (
    "status execution_state execution_count payload comm_id target_name subshell_id name text data "
    "metadata transient ename evalue traceback prompt password id command arguments code wait"
).split()
RIGHT = {
    "status": "ok", "execution_state": "idle", "execution_count": 3, "comm_id": "c", "data": {},
    "name": "stdout", "text": "t", "ename": "e", "evalue": "v", "traceback": [], "prompt": "?",
    "id": "1", "command": "help", "arguments": [], "target_name": "t", "subshell_id": "sub",
    "payload": [{"source": "ask_exit"}],
}  # fmt: skip
CONTENT = st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=6).flatmap(
    lambda junk: st.sampled_from([{**RIGHT, **junk}, junk, RIGHT])
)
TYPES = st.sampled_from([
    *sorted(IOPUB_TYPES), "status", "execute_reply", "complete_reply", "debug_reply", "awaiting",
    "input_request", "vm_request", "shutdown_reply", "iopub_welcome", "interrupt_reply",
    "create_subshell_reply", "kernel_info_reply", "",
])  # fmt: skip
REQUESTS = ("execute_request", "complete_request", "comm_msg")
ON_CONTROL = ("debug_request", "create_subshell_request", "kernel_info_request")
SAYS = st.tuples(
    st.just("guest"),
    st.sampled_from(["shell", "control", "stdin", "iopub", "vm"]),
    TYPES,
    st.sampled_from(["request-0", "request-1", "request-2", "", "forged"]),
    st.dictionaries(st.sampled_from(["started", "x"]), JUNK, max_size=2),
    CONTENT,
)
# What is nearly right, so that it gets past the first looks
NEARLY = st.tuples(
    st.just("guest"),
    st.sampled_from(["shell", "shell", "iopub", "control", "stdin"]),
    st.sampled_from(["execute_reply", "stream", "execute_input", "input_request", "comm_msg"]),
    st.sampled_from(["request-0", "request-0", "request-1", "forged"]),
    st.just({}),
    st.just(RIGHT),
)
ASKS = st.tuples(st.just("ask"), st.sampled_from(REQUESTS + ON_CONTROL))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(steps=[("guest", "shell", "execute_reply", "request-0", {}, RIGHT)] * 2)
@example(steps=[("guest", "control", "execute_reply", "request-0", {}, RIGHT)])
@given(st.lists(st.one_of(SAYS, NEARLY, NEARLY, ASKS), max_size=25))
def test_whatever_a_guest_says_each_request_has_one_answer(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[Any, ...]]
):
    """And each message its true parent, and no type is published that is not a guest's to publish.

    The guest ends each request in the end, as one does that wants its kernel to go on.
    """

    async def scenario() -> None:
        async with front(tmp_path_factory.mktemp("f")) as kernel:
            await kernel.ask("execute_request")
            async with asyncio.timeout(10):
                while not kernel.wrapper._with_guest:
                    await asyncio.sleep(0.001)
            for step in steps:
                if step[0] == "ask":
                    channel = "control" if step[1] in ON_CONTROL else "shell"
                    await kernel.ask(step[1], channel)
                    await asyncio.sleep(0.005)
                else:
                    published = len(kernel.published)
                    kernel.wrapper.on_output(messages.FromGuest(*step[1:]), [])
                    if step[3] == "forged":
                        assert len(kernel.published) == published
            heard: list[Any] = []
            async with asyncio.timeout(20):
                while len(answers_in(heard)) < len(answers_wanted(kernel)):
                    for number in list(kernel.wrapper._with_guest):
                        kernel.wrapper.on_output(
                            messages.FromGuest("iopub", "status", number, {}, IDLE), []
                        )
                    heard += await kernel.heard()
            judge(kernel, heard)

    asyncio.run(scenario())


IDLE = {"execution_state": "idle"}


def answers_in(heard: list[Any]) -> list[str]:
    return sorted(parent["msg_id"] for name, _, parent, _ in heard if name in ("shell", "control"))


def answers_wanted(kernel: Front) -> list[str]:
    return sorted(
        number for number, asked in kernel.sent.items() if asked["msg_type"] != "comm_msg"
    )


def judge(kernel: Front, heard: list[tuple[str, dict[str, Any], dict[str, Any], Any]]) -> None:
    for channel, header, parent, content in heard:
        assert isinstance(content, dict)
        msg_type = header["msg_type"]
        assert header["session"] == kernel.sockets.session
        if channel == "iopub":
            assert parent == {} or kernel.sent[parent["msg_id"]] == parent
            assert msg_type in IOPUB_TYPES | {"status", "iopub_welcome"}
            continue
        asked = kernel.sent[parent["msg_id"]]
        assert asked == parent
        if channel == "stdin":
            assert msg_type == "input_request"
            assert set(content) == {"prompt", "password"}
            continue
        assert msg_type == asked["msg_type"].removesuffix("_request") + "_reply"
    assert answers_in(heard) == answers_wanted(kernel)


# --- a program's VM ----------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(SAYS, NEARLY), max_size=30))
def test_whatever_a_guest_says_a_run_ends_once(steps: list[tuple[Any, ...]]):
    async def scenario() -> None:
        executor, guest, heard = Executor(1.0), FakeGuest(), []
        executor.attach(guest)  # type: ignore[arg-type]
        running = asyncio.ensure_future(executor.run("1", heard.append))
        await asyncio.sleep(0)
        own = guest.sent[0].msg_id
        for _, channel, msg_type, parent, metadata, content in steps:
            parent = own if parent.startswith("request") else parent
            executor.on_output(messages.FromGuest(channel, msg_type, parent, metadata, content), [])
        executor.on_output(
            messages.FromGuest("iopub", "status", own, {}, {"execution_state": "idle"}), []
        )
        end = await running
        assert 0 <= end.exit_code <= 255
        for event in heard:
            messages.encode_json(event)

    asyncio.run(scenario())
