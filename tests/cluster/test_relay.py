"""The relay, between real clients and a real kernel: plain ipykernel with encryption."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
import zmq
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.session import Session

from relayrig import PATIENCE, Rig, Wire, run
from vmkernel.cluster import relay_waiting
from vmkernel.cluster.relay import State
from vmkernel.errors import VmCapacityError, VmError, VmHostLostError


@pytest.fixture(scope="module")
def shared(plain_spec: str) -> Iterator[Rig]:
    """A relay with a kernel, for tests that leave both as they are."""
    rig = Rig()
    rig.connect(rig.kernel(plain_spec))
    yield rig
    rig.close()


def test_what_waits_is_told_so_and_runs_when_there_is_a_kernel(rig: Rig, plain_spec: str) -> None:
    client = rig.client()
    client.wait_for_ready(timeout=10)  # answered by the relay
    heard: list[str] = []
    rig.within(rig.relay.say, "waiting for a VM slot in the cluster: 2 of 2 taken")
    ids = [client.execute(f"print({number})") for number in range(3)]
    deadline = time.monotonic() + PATIENCE
    while not any("2 of 2 taken" in text for text in heard):
        message = client.get_iopub_msg(timeout=10)
        if message["msg_type"] == "stream":
            assert message["parent_header"]["msg_id"] == ids[0]
            heard.append(message["content"]["text"])
        assert time.monotonic() < deadline
    rig.within(rig.relay.connect, rig.kernel(plain_spec))
    replies = [client.get_shell_msg(timeout=PATIENCE) for _ in ids]
    assert [reply["parent_header"]["msg_id"] for reply in replies] == ids
    assert run(client, "6 * 7; print('on')")[0] == "on\n"


def test_two_clients_each_get_their_own(shared: Rig) -> None:
    one, two = shared.ready(), shared.ready()
    first = one.execute("x = 5")
    assert one.get_shell_msg(timeout=PATIENCE)["parent_header"]["msg_id"] == first
    assert run(two, "print(x)")[0] == "5\n"
    with pytest.raises(Exception, match=r"^$"):
        one.get_shell_msg(timeout=0.3)


def test_input_asks_who_ran_the_cell(shared: Rig) -> None:
    shared.ready()
    client = shared.ready()

    def answer(message: dict[str, Any]) -> None:
        client.input("blue")

    said, reply = run(client, "print(input('colour? '))", allow_stdin=True, stdin_hook=answer)
    assert (said, reply["status"]) == ("blue\n", "ok")


def test_a_subshell_and_the_debugger_answer_while_a_cell_runs(shared: Rig) -> None:
    client = shared.ready()
    busy = client.execute("import time; time.sleep(5)")
    control = Wire(shared, "control")
    control.send("create_subshell_request", {})
    subshell = control.receive()["content"]["subshell_id"]
    control.send("debug_request", {"seq": 1, "type": "request", "command": "debugInfo"})
    assert control.receive()["content"]["success"]
    message = client.session.msg("execute_request", {"code": "7", "silent": False})
    message["header"]["subshell_id"] = subshell
    client.shell_channel.send(message)
    reply = client.get_shell_msg(timeout=PATIENCE)
    assert reply["parent_header"]["msg_id"] == message["header"]["msg_id"]
    control.send("interrupt_request", {})
    assert client.get_shell_msg(timeout=PATIENCE)["parent_header"]["msg_id"] == busy
    control.close()


def test_where_the_kernel_is_is_not_told(shared: Rig) -> None:
    shell = Wire(shared, "shell")
    shell.send("connect_request", {})
    told = shell.receive()["content"]
    assert told["shell_port"] == shared.relay.info["shell_port"]
    assert told["iopub_port"] == shared.relay.info["iopub_port"]
    shell.close()


@pytest.mark.parametrize("transport", ["encrypted", "ipc"])
def test_the_front_ends_side_as_jupyter_asks_for_it(
    plain_spec: str, transport: str, tmp_path: Path
) -> None:
    public, secret = (key.decode() for key in zmq.curve_keypair())
    local = {"curve_publickey": public, "curve_secretkey": secret}
    if transport == "ipc":
        local = {"transport": "ipc", "ip": str(tmp_path / "kernel-ipc")}
    rig = Rig(local)
    try:
        rig.connect(rig.kernel(plain_spec))
        assert run(rig.ready(), "print(6 * 7)")[0] == "42\n"
    finally:
        rig.close()
    assert not list(tmp_path.iterdir())


def test_a_terminal_console_joins_by_the_relays_connection_file(
    shared: Rig, tmp_path: Path
) -> None:
    file = tmp_path / "kernel.json"
    file.write_text(json.dumps(shared.relay.info))
    arguments = ["-m", "jupyter", "console", f"--existing={file}", "--simple-prompt"]
    child = pexpect.spawn(
        sys.executable, arguments, env={**os.environ, "TERM": "dumb", "NO_COLOR": "1"},
        encoding="utf-8", timeout=PATIENCE, dimensions=(50, 120),
    )  # fmt: skip
    try:
        child.expect(r"In \[")
        child.sendline("print('twelve', 3 * 4)")
        child.expect("twelve 12")
        child.expect(r"In \[")
    finally:
        child.close(force=True)


def _info_of(rig: Rig) -> dict[str, Any]:
    info = dict(rig.kernels[-1].get_connection_info())
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in info.items()}


def test_the_kernel_is_gone_and_every_request_has_its_one_answer(rig: Rig, plain_spec: str) -> None:
    info = rig.kernel(plain_spec)
    rig.within(rig.relay.connect, info)
    client = rig.client()
    client.wait_for_ready(timeout=PATIENCE)
    ids = [client.execute("import time; time.sleep(60)"), client.execute("2")]
    time.sleep(0.5)
    lost = VmHostLostError("the host vm3 is gone", hint="run the cells again")
    rig.within(rig.relay.fail, lost)
    replies = [client.get_shell_msg(timeout=5) for _ in ids]
    assert [reply["parent_header"]["msg_id"] for reply in replies] == ids
    for reply in replies:
        assert reply["content"]["ename"] == "VmHostLostError"
        assert "run the cells again" in "".join(reply["content"]["traceback"])
    # So are those that come later, until there is another kernel
    assert run(client, "3")[1]["ename"] == "VmHostLostError"
    rig.within(rig.relay.waiting)
    late = client.execute("print('there again')")
    rig.within(rig.relay.connect, rig.kernel(plain_spec))
    assert client.get_shell_msg(timeout=PATIENCE)["parent_header"]["msg_id"] == late


def test_a_control_message_with_a_cells_id_is_not_the_cell(rig: Rig, plain_spec: str) -> None:
    """A kernel manager counts its messages as its client does, from the same session."""
    rig.connect(rig.kernel(plain_spec))
    rig.ready()
    shell, control = Wire(rig, "shell", b"one"), Wire(rig, "control", b"one")
    other = Wire(rig, "shell", b"two")
    content = {"code": "while True: pass", "silent": False}
    for wire in (shell, other):
        wire.send("execute_request", content, "the same")
    control.send("kernel_info_request", {}, "the same")
    assert control.receive()["msg_type"] == "kernel_info_reply"
    rig.within(rig.relay.fail, VmHostLostError("the host vm3 is gone"))
    for wire in (shell, other):
        assert wire.receive(5)["content"]["ename"] == "VmHostLostError"
    for wire in (shell, other, control):
        with pytest.raises(TimeoutError):
            wire.receive(0.2)
        wire.close()


def test_a_restart_looks_as_plains_does(rig: Rig, plain_spec: str) -> None:
    rig.connect(rig.kernel(plain_spec))
    client = rig.ready()
    run(client, "x = 1")
    client.execute("import time; time.sleep(1)")
    rig.relay.kernel_info = None
    iopub = Wire(rig, "iopub")
    assert iopub.receive()["msg_type"] == "iopub_welcome"
    client.shutdown(restart=True)
    assert client.get_control_msg(timeout=PATIENCE)["content"]["restart"] is True
    while iopub.receive()["msg_type"] != "shutdown_reply":  # which plain publishes, too
        pass
    late = client.execute("print('x' in globals())")  # waits for the next one, as in plain's socket
    rig.within(rig.relay.waiting)
    rig.connect(rig.kernel(plain_spec))
    while client.get_shell_msg(timeout=PATIENCE)["parent_header"]["msg_id"] != late:
        pass
    seen: list[str] = []
    while "False\n" not in seen:
        message = iopub.receive()
        content = message["content"]
        seen.append(content.get("execution_state") or content.get("text") or message["msg_type"])
    iopub.close()
    order = [word for word in seen if word in ("starting", "False\n")]
    # The new kernel says "starting", too; whether that is heard depends on who is quicker
    assert [word for word, _ in itertools.groupby(order)] == ["starting", "False\n"]
    assert "iopub_welcome" not in seen  # its connection stayed


def test_a_restart_while_it_waits_drops_what_waited(rig: Rig, plain_spec: str) -> None:
    client = rig.client()
    ids = [client.execute("print('must not run')") for _ in range(2)]
    time.sleep(0.2)
    client.shutdown(restart=True)
    assert client.get_control_msg(timeout=5)["content"]["status"] == "ok"
    replies = [client.get_shell_msg(timeout=5) for _ in ids]
    assert [reply["parent_header"]["msg_id"] for reply in replies] == ids
    assert {reply["content"]["ename"] for reply in replies} == {"KeyboardInterrupt"}
    rig.within(rig.relay.waiting)
    rig.connect(rig.kernel(plain_spec))
    assert run(client, "print('runs')")[0] == "runs\n"


def test_an_editors_question_waits_a_little_for_a_kernel(rig: Rig, plain_spec: str) -> None:
    info = rig.kernel(plain_spec)
    client = rig.client()
    began = time.monotonic()
    client.complete("pri")
    client.get_shell_msg(timeout=10)
    assert 1.5 < time.monotonic() - began < 5
    client.complete("prin")
    rig.connect(info)
    assert client.get_shell_msg(timeout=PATIENCE)["content"]["matches"]


def test_what_waits_is_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_waiting, "MOST_HELD", 3)
    client = rig.client()
    ids = [client.execute(str(number)) for number in range(4)]
    reply = client.get_shell_msg(timeout=5)
    assert reply["parent_header"]["msg_id"] == ids[3]
    assert "3 requests" in reply["content"]["evalue"]
    monkeypatch.setattr(relay_waiting, "MOST_HELD", 1000)
    monkeypatch.setattr(relay_waiting, "MOST_HELD_BYTES", 10_000)
    last = client.execute("'" + "x" * 10_000 + "'")
    reply = client.get_shell_msg(timeout=5)
    assert reply["parent_header"]["msg_id"] == last
    assert reply["content"]["status"] == "error"


def test_a_failed_wait_is_tried_again_by_the_next_cell(rig: Rig) -> None:
    client = rig.client()
    rig.within(rig.relay.fail, VmCapacityError("no slot in 2 s", hint="wait"))
    assert run(client, "1")[1]["ename"] == "VmCapacityError"
    rig.relay.on_work = rig.relay.waiting
    client.execute("1")
    with pytest.raises(Exception, match=r"^$"):
        client.get_shell_msg(timeout=0.5)
    assert rig.relay.state is State.WAITING


def test_an_interrupt_ends_the_wait(rig: Rig) -> None:
    client = rig.client()
    interrupted = threading.Event()
    rig.relay.on_interrupt = interrupted.set
    client.execute("1")
    time.sleep(0.2)
    client.control_channel.send(client.session.msg("interrupt_request", {}))
    assert client.get_control_msg(timeout=5)["content"] == {"status": "ok"}
    reply = client.get_shell_msg(timeout=5)["content"]
    assert reply["ename"] == "KeyboardInterrupt"
    assert "did not run" in reply["evalue"]
    assert interrupted.wait(5)


def test_nothing_unsigned_is_obeyed(rig: Rig) -> None:
    client = rig.client()
    asked = threading.Event()
    rig.relay.on_shutdown = lambda restart: asked.set()
    client.session = Session(key=b"another")
    client.control_channel.session = client.session
    client.shutdown()
    assert not asked.wait(0.5)


def test_who_does_not_encrypt_is_refused(rig: Rig, plain_spec: str) -> None:
    info = rig.kernel(plain_spec)
    del info["curve_publickey"]
    with pytest.raises(VmError, match="does not encrypt"):
        rig.within(rig.relay.connect, info)


def round_trips(client: BlockingKernelClient, count: int = 30) -> float:
    client.wait_for_ready(timeout=PATIENCE)
    times = []
    for _ in range(count):
        began = time.perf_counter()
        run(client, "1 + 1")
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


@pytest.mark.perf
def test_what_the_relay_costs(shared: Rig, record_property: Callable[[str, object], None]) -> None:
    direct = BlockingKernelClient()
    direct.load_connection_info(_info_of(shared))
    direct.start_channels()
    shared.clients.append(direct)
    relayed = shared.client()
    record_property("direct_ms", round_trips(direct))
    record_property("relayed_ms", round_trips(relayed))
    print(f"direct {round_trips(direct):.2f} ms, relayed {round_trips(relayed):.2f} ms")
