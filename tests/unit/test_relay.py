"""The relay between a socket pair and a real ipykernel: what it says to the host.

The same relay is tested in real VMs in tests/jupyter; here its rules are shown without one.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from vmkernel.guest import relay as relay_module
from vmkernel.guest.foreign import as_object
from vmkernel.protocol import frames, messages

ROOT = Path(__file__).resolve().parents[2]
IPYKERNEL = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
WARM = {**IPYKERNEL, "wake_code": "import os, random; random.seed('{entropy}'); "
        "os.environ.update({env:json}); os.chdir({cwd:json})"}  # fmt: skip


class Answer(msgspec.Struct, array_like=True):
    """FromGuest, less its limits, and its buffers."""

    channel: str
    msg_type: str
    parent_id: str
    metadata: dict[str, Any]
    content: dict[str, Any]
    buffers: list[bytes] = []


class Relay:
    """The host's end."""

    def __init__(self, recipe: dict[str, Any], *options: str) -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        self.sock, self.control = (ours for ours, _ in pairs)
        self.sock.settimeout(60)
        theirs = [sock.fileno() for _, sock in pairs]
        child = Path(__file__).with_name("relay_child.py")
        self.process = subprocess.Popen(
            [sys.executable, str(child), ",".join(map(str, theirs)), json.dumps(recipe), *options],
            pass_fds=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
            env={k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"},
            start_new_session=True,
        )  # fmt: skip
        for _, sock in pairs:
            sock.close()
        assert self.process.stdout is not None
        self.info = json.loads(self.process.stdout.readline())
        self.reader = frames.FrameReader()
        self.waiting: list[Answer] = []
        self.count = 0

    def send(
        self,
        msg_type: str,
        content: dict[str, Any],
        channel: str = "shell",
        *,
        msg_id: str = "",
        port: socket.socket | None = None,
        buffers: tuple[bytes, ...] = (),
        **header: Any,
    ) -> str:
        self.count += 1
        msg_id = msg_id or f"m{self.count}"
        header = {"msg_id": msg_id, "msg_type": msg_type, "session": "s", "username": "u",
                  "date": "2026-01-01T00:00:00Z", "version": "5.4", **header}  # fmt: skip
        body = [channel, msg_id, msg_type, header, {}, content]
        (port or self.sock).sendall(b"".join(frames.encode(msgspec.json.encode(body), buffers)))
        return msg_id

    def receive(self) -> Answer:
        while not self.waiting:
            data = self.sock.recv(1 << 18)
            if not data:
                raise EOFError
            for message in self.reader.feed(data):
                body, buffers = frames.split(message)
                answer = msgspec.json.decode(body, type=Answer)
                answer.buffers = [bytes(buffer) for buffer in buffers]
                self.waiting.append(answer)
        return self.waiting.pop(0)

    def until(self, condition: Callable[[Answer], object]) -> list[Answer]:
        got = [self.receive()]
        while not condition(got[-1]):
            got.append(self.receive())
        return got

    def until_idle(self, msg_id: str) -> list[Answer]:
        return self.until(lambda a: a.msg_type == "status" and a.parent_id == msg_id)

    def cell(self, code: str, **options: Any) -> str:
        content = {"code": code, "silent": False, "store_history": True, "allow_stdin": True}
        header = {"subshell_id": options.pop("subshell_id")} if "subshell_id" in options else {}
        return self.send("execute_request", {**content, **options}, **header)

    def run(self, code: str, **options: Any) -> list[Answer]:
        return self.until_idle(self.cell(code, **options))

    def ask(self, msg_type: str, content: dict[str, Any], channel: str) -> Answer:
        answers = self.until_idle(self.send(msg_type, content, channel))
        return next(a for a in answers if a.channel == channel)

    def wake(self, cwd: str = "", **env: str) -> None:
        content = messages.WakeKernel(os.urandom(64), env, cwd)
        self.send("wake_request", msgspec.to_builtins(content), "control")
        assert self.receive().msg_type == "wake_reply"

    def interrupt(self) -> None:
        """As the agent does it."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> tuple[int, str]:
        """The exit status, and the last words."""
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                self.receive()
        _, words = self.process.communicate(timeout=30)
        return self.process.returncode, words.decode()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.sock.close()
        self.control.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Relay]]:
    relays: list[Relay] = []

    def start(recipe: dict[str, Any], *options: str) -> Relay:
        relays.append(Relay(recipe, *options))
        return relays[-1]

    yield start
    for relay in relays:
        relay.close()


@pytest.fixture(scope="module")
def relay() -> Iterator[Relay]:
    relay = Relay(WARM)
    relay.wake(JPY_SESSION_NAME="a '{seed}'.ipynb")
    yield relay
    relay.close()


def types(answers: list[Answer]) -> list[str]:
    return [answer.msg_type for answer in answers]


def text(answers: list[Answer], name: str = "stdout") -> str:
    return "".join(a.content["text"] for a in answers if a.content.get("name") == name)


def test_the_template_knows_what_kernel_it_holds(relay: Relay) -> None:
    assert relay.info["status"] == "ok"
    assert relay.info["language_info"]["name"] == "python"


def test_a_cell_is_awaiting_input_result_reply_idle(relay: Relay) -> None:
    answers = relay.run("6*7")
    assert types(answers) == [
        "awaiting", "execute_input", "execute_result", "execute_reply", "status",
    ]  # fmt: skip
    assert [a.channel for a in answers] == ["vm", "iopub", "iopub", "shell", "iopub"]
    assert answers[2].content["data"] == {"text/plain": "42"}
    assert answers[-1].content == {"execution_state": "idle"}
    assert len({answer.parent_id for answer in answers}) == 1


def test_idle_comes_last_and_once_whatever_the_load(relay: Relay) -> None:
    for n in range(60):
        answers = relay.run(f"for i in range(20): display({n})\n1/{n % 2}")
        assert types(answers)[-2:] == ["execute_reply", "status"]
        assert types(answers).count("display_data") == 20
        assert types(answers).count("status") == 1


def test_the_wake_code_ran_with_its_values_quoted(relay: Relay) -> None:
    assert text(relay.run("import os; print(os.environ['JPY_SESSION_NAME'])")) == (
        "a '{seed}'.ipynb\n"
    )
    assert relay.run("1")[-2].content["execution_count"] > 0


def test_a_relay_that_sleeps_serves_nothing(start: Callable[..., Relay], tmp_path: Path) -> None:
    relay = start(WARM)
    mark = tmp_path / "ran"
    relay.cell(f"open({str(mark)!r}, 'w')")
    relay.wake(str(tmp_path))
    assert text(relay.run("import os; print('awake in', os.getcwd())")) == f"awake in {tmp_path}\n"
    assert not mark.exists()


def test_twins_differ(start: Callable[..., Relay]) -> None:
    numbers = set()
    for _ in range(2):
        relay = start(WARM)
        relay.wake()
        numbers.add(text(relay.run("import random; print(random.random())")))
    assert len(numbers) == 2


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_kernel_without_wake_code_is_started_after_the_wake_up(
    start: Callable[..., Relay], tmp_path: Path, transport: str
) -> None:
    relay = start({**IPYKERNEL, "env": {"FROM_RECIPE": "r"}, "transport": transport})
    assert relay.info["language_info"]["name"] == "python"
    assert not psutil.Process(relay.process.pid).children()
    relay.wake(str(tmp_path), FROM_HOST="h")
    code = "import os; print(os.getcwd(), os.environ['FROM_HOST'], os.environ['FROM_RECIPE'])"
    assert text(relay.run(code)) == f"{tmp_path} h r\n"


def test_a_kernel_in_a_dead_ones_place_is_started_with_the_wake_up(
    start: Callable[..., Relay],
) -> None:
    relay = start(WARM, "fresh")
    assert relay.info == {}
    relay.wake(FROM_HOST="h")
    assert text(relay.run("import os; print(os.environ['FROM_HOST'])")) == "h\n"


def test_wake_code_that_fails_is_an_error_of_the_template() -> None:
    with pytest.raises(json.JSONDecodeError):
        Relay({**IPYKERNEL, "wake_code": "1/0"})


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import asyncio; await asyncio.sleep(60)",
        "import subprocess; subprocess.run(['sleep', '60'])",
        "input('name? ')",
    ],
)
def test_an_interrupt_ends_the_cell_and_nothing_else(relay: Relay, code: str) -> None:
    relay.run("kept = 1")
    msg_id = relay.cell(code)
    relay.until(lambda a: a.msg_type == "execute_input")
    time.sleep(0.3)
    began = time.monotonic()
    relay.interrupt()
    answers = relay.until_idle(msg_id)
    assert time.monotonic() - began < 10
    error = next(a for a in answers if a.msg_type == "error").content["ename"]
    assert error in ("KeyboardInterrupt", "CancelledError")
    assert text(relay.run("print(kept)")) == "1\n"


def test_an_interrupt_while_idle_does_nothing(relay: Relay) -> None:
    relay.interrupt()
    time.sleep(0.1)
    assert types(relay.run("print('still here')")).count("stream") == 1


def test_a_kernel_that_wants_messages_gets_no_signal(start: Callable[..., Relay]) -> None:
    relay = start({**WARM, "interrupt_mode": "message"})
    relay.wake()
    # ipykernel answers an interrupt_request with a SIGINT to itself or its group
    msg_id = relay.cell("import time; time.sleep(60)")
    relay.until(lambda a: a.msg_type == "execute_input")
    time.sleep(0.3)
    relay.interrupt()
    answers = relay.until_idle(msg_id)
    assert [a.content["ename"] for a in answers if a.msg_type == "error"] == ["KeyboardInterrupt"]
    kernel = int(text(relay.run("import os; print(os.getpid())")))
    assert os.getpgid(kernel) != relay.process.pid


def test_input_asks_and_gets_an_answer(relay: Relay) -> None:
    msg_id = relay.cell("print('first'); name = input('name? '); print('hello', name)")
    asked = relay.until(lambda a: a.msg_type == "input_request")
    assert asked[-1].channel == "stdin"
    assert asked[-1].parent_id == msg_id
    assert asked[-1].content == {"prompt": "name? ", "password": False}
    relay.send("input_reply", {"value": "Grüße"}, "stdin", msg_id=msg_id)
    assert text(asked + relay.until_idle(msg_id)) == "first\nhello Grüße\n"


def test_comm_messages_have_an_end_and_carry_buffers(relay: Relay) -> None:
    relay.run(
        "def opened(comm, message):\n"
        "    comm.send({'got': len(message['buffers'][0])}, buffers=[message['buffers'][0]])\n"
        "get_ipython().kernel.comm_manager.register_target('echo', opened)"
    )
    payload = os.urandom(3_000_000)
    content = {"comm_id": "c1", "target_name": "echo", "data": {}}
    msg_id = relay.send("comm_open", content, buffers=(payload,))
    answers = relay.until_idle(msg_id)
    assert types(answers) == ["comm_msg", "status"]
    assert answers[0].content["data"] == {"got": len(payload)}
    assert answers[0].buffers == [payload]


def test_a_comm_message_reaches_a_cell_that_awaits(relay: Relay) -> None:
    relay.run(
        "import asyncio\ncame = asyncio.Event()\n"
        "get_ipython().kernel.comm_manager.register_target('come', lambda *_: came.set())"
    )
    msg_id = relay.cell("await asyncio.wait_for(came.wait(), 30); print('came')")
    relay.until(lambda a: a.msg_type == "execute_input")
    comm = relay.send("comm_open", {"comm_id": "c2", "target_name": "come", "data": {}})
    answers = relay.until_idle(msg_id)
    assert text(answers) == "came\n"
    assert ("status", comm) not in [(a.msg_type, a.parent_id) for a in answers]


def test_a_comm_message_while_a_cell_computes_is_served_after_it(relay: Relay) -> None:
    relay.run(
        "get_ipython().kernel.comm_manager.register_target('say', lambda *_: print('served'))"
    )
    msg_id = relay.cell("import time; time.sleep(1); print('computed')")
    relay.until(lambda a: a.msg_type == "execute_input")
    comm = relay.send("comm_open", {"comm_id": "c3", "target_name": "say", "data": {}})
    assert text(relay.until_idle(msg_id)) == "computed\n"
    assert text(relay.until_idle(comm)) == "served\n"


def test_control_requests_are_served_while_a_cell_runs(relay: Relay) -> None:
    msg_id = relay.cell("import time; time.sleep(60)")
    relay.until(lambda a: a.msg_type == "execute_input")
    content = {"type": "request", "seq": 1, "command": "debugInfo"}
    asked = relay.send("debug_request", content, "control", port=relay.control)
    answers = relay.until_idle(asked)
    assert [a.msg_type for a in answers if a.channel == "control"] == ["debug_reply"]
    relay.interrupt()
    relay.until_idle(msg_id)


def test_a_subshell_answers_while_a_cell_runs(relay: Relay) -> None:
    subshell = relay.ask("create_subshell_request", {}, "control").content["subshell_id"]
    msg_id = relay.cell("import time; time.sleep(60)")
    relay.until(lambda a: a.msg_type == "execute_input")
    assert text(relay.run("print('beside')", subshell_id=subshell)) == "beside\n"
    relay.interrupt()
    relay.until_idle(msg_id)


def test_a_request_that_the_kernel_does_not_know_ends(relay: Relay) -> None:
    began = time.monotonic()
    assert types(relay.until_idle(relay.send("unheard_request", {}))) == ["status"]
    assert time.monotonic() - began < 3 * relay_module.LOST


def test_a_host_that_does_not_read_stops_the_relay_and_loses_no_end(relay: Relay) -> None:
    msg_id = relay.cell("for n in range(300): display({'text/plain': 'x' * 100_000}, raw=True)")
    process = psutil.Process(relay.process.pid)
    time.sleep(3)
    before = process.memory_info().rss
    time.sleep(2)
    assert process.memory_info().rss - before < 50 << 20
    answers = relay.until_idle(msg_id)
    assert types(answers)[-2:] == ["execute_reply", "status"]
    assert types(answers).count("display_data") == 300
    assert text(relay.run("print('on')")) == "on\n"


def test_a_large_output_arrives_whole(relay: Relay) -> None:
    answers = relay.run("print('ä' * 10_000_000)")
    assert text(answers) == "ä" * 10_000_000 + "\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import os; os._exit(3)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        (
            "import ctypes, os, time; os.write(2, b'last words'); time.sleep(1)\n"
            "ctypes.string_at(0)",
            -signal.SIGSEGV,
        ),
    ],
)
def test_the_relay_ends_as_its_kernel_does(
    start: Callable[..., Relay], code: str, status: int
) -> None:
    relay = start(WARM)
    relay.wake()
    relay.run("import os, time; os.write(1, b'of another cell'); time.sleep(0.5)")
    relay.cell(code)
    found, words = relay.end()
    assert found == status
    assert "of another cell" not in words
    if status == -signal.SIGSEGV:
        assert "last words" in words


def test_what_a_kernel_said_before_its_end_is_passed_on(start: Callable[..., Relay]) -> None:
    relay = start(WARM)
    relay.wake()
    (kernel,) = psutil.Process(relay.process.pid).children()
    relay.cell(  # as many as the sockets hold while nobody reads
        "import os, time; time.sleep(1)\nfor n in range(150): display(n)\n"
        "time.sleep(1); os._exit(0)"
    )
    got = relay.until(lambda a: a.msg_type == "execute_input")
    relay.process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 30
    while kernel.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    relay.process.send_signal(signal.SIGCONT)
    with contextlib.suppress(EOFError, ConnectionResetError):
        while True:
            got.append(relay.receive())
    assert types(got).count("display_data") == 150
    assert "status" not in types(got)  # the cell has not ended, the kernel has


def test_exit_is_answered_before_the_end(start: Callable[..., Relay]) -> None:
    relay = start(WARM)
    relay.wake()
    answers = relay.run("exit")
    assert answers[-2].content["payload"][0]["source"] == "ask_exit"
    assert relay.end()[0] == 0


def test_the_kernel_ends_with_its_relay(start: Callable[..., Relay]) -> None:
    relay = start(WARM)
    relay.wake()
    kernel = psutil.Process(int(text(relay.run("import os; print(os.getpid())"))))
    relay.process.kill()
    kernel.wait(30)


def test_a_command_that_is_not_there_is_told() -> None:
    with pytest.raises(json.JSONDecodeError):
        Relay({"argv": ["/no/such/kernel", "{connection_file}"]})


def test_placeholders_are_filled_in_once_and_quoted() -> None:
    env = {"A": "it's {cwd:sh}", "B": '"'}
    code = "seed={seed} cd {cwd:sh} export {env:sh} x=${HOME} py={env:json} {entropy}"
    assert json.loads(json.loads(relay_module.fill_in("{env:string}", bytes(64), env, "/"))) == env
    filled = relay_module.fill_in(code, b"\xff" * 64, env, "/a b")
    assert filled == (
        f"seed={2**31 - 1} cd '/a b' export A='it'\"'\"'s {{cwd:sh}}' B='\"' x=${{HOME}} "
        f"py={json.dumps(env)} {'ff' * 64}"
    )


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        (b'{"a": 1}', {"a": 1}),
        (b'{"a": NaN, "b": [Infinity]}', {"a": None, "b": [None]}),
        (b'{"a": "\\ud800"}', {"a": "\\ud800"}),
        (b'{"a": "\xff"}', {"a": "\ufffd"}),
        (b"[1]", {}),
        (b"{", {}),
    ],
)
def test_what_a_kernel_takes_for_json_is_json_for_the_host(
    said: bytes, heard: dict[str, Any]
) -> None:
    assert msgspec.json.decode(as_object(said), type=dict[str, Any]) == heard
