"""The relay under what is heavy, slow, or broken: nothing is lost, nothing grows without bound."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq
from jupyter_client.session import Session

from relayrig import KEY, PATIENCE, Rig, Wire, run
from vmkernel.cluster import remote
from vmkernel.errors import VmHostLostError
from vmkernel.kernel import sockets

MIB = 1 << 20


@pytest.fixture(scope="module")
def shared(plain_spec: str) -> Iterator[Rig]:
    """A relay with a kernel, for tests that leave both as they are."""
    rig = Rig()
    rig.connect(rig.kernel(plain_spec))
    yield rig
    rig.close()


def memory() -> int:
    """Bytes of this process, in which the relay is."""
    return int(psutil.Process().memory_info().rss)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that takes no messages meanwhile, as a host that is cut off."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_ten_megabytes_of_lines_come_whole(shared: Rig) -> None:
    said, reply = run(shared.ready(), "for i in range(100_000): print('x' * 99)")
    assert reply["status"] == "ok"
    assert len(said) == 10_000_000


def test_a_hundred_megabytes_go_through_both_ways(shared: Rig) -> None:
    client = shared.ready()
    code = (
        "from ipykernel.comm import Comm\n"
        "def opened(comm, message):\n"
        "    comm.send({'size': len(message['buffers'][0])}, buffers=message['buffers'])\n"
        "get_ipython().kernel.comm_manager.register_target('echo', opened)"
    )
    assert run(client, code)[1]["status"] == "ok"
    iopub, shell = Wire(shared, "iopub"), Wire(shared, "shell")
    assert iopub.receive()["msg_type"] == "iopub_welcome"
    large = os.urandom(MIB) * 100
    shell.send("comm_open", {"comm_id": "1", "target_name": "echo", "data": {}}, buffers=[large])
    while (message := iopub.receive())["msg_type"] != "comm_msg":
        pass
    assert message["content"]["data"] == {"size": len(large)}
    assert bytes(message["buffers"][0]) == large
    assert run(client, "print(1)")[0] == "1\n"
    iopub.close()
    shell.close()


def test_a_flood_for_a_kernel_that_takes_none_stops_the_sender_and_loses_nothing(
    rig: Rig, plain_spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MOST_ON_THE_WAY", 8 * MIB)
    rig.connect(rig.kernel(plain_spec))
    client = rig.ready()
    code = (
        "got = []\n"
        "def opened(comm, message):\n"
        "    comm.on_msg(lambda message: got.append(message['content']['data']['n']))\n"
        "get_ipython().kernel.comm_manager.register_target('count', opened)"
    )
    assert run(client, code)[1]["status"] == "ok"
    shell = Wire(rig, "shell", sndhwm=10)
    shell.send("comm_open", {"comm_id": "2", "target_name": "count", "data": {}})
    sent, began, last = 0, memory(), time.monotonic()
    filling = "x" * (256 << 10)
    with stopped(rig.pid()):
        while time.monotonic() - last < 1:
            try:
                shell.send("comm_msg", {"comm_id": "2", "data": {"n": sent, "fill": filling}})
            except zmq.Again:
                time.sleep(0.01)
            else:
                sent, last = sent + 1, time.monotonic()
            assert sent < 2000, "nobody stopped the flood"
        assert memory() - began < 400 * MIB
        # Another channel is not held up by it
        control = Wire(rig, "control")
        control.send("kernel_info_request", {})
    assert control.receive()["msg_type"] == "kernel_info_reply"
    assert run(client, "print(got == list(range(len(got))), len(got))")[1]["status"] == "ok"
    deadline = time.monotonic() + PATIENCE
    while (said := run(client, "print(got == list(range(len(got))), len(got))")[0]) != (
        f"True {sent}\n"
    ):
        assert time.monotonic() < deadline, said
    control.close()
    shell.close()


@pytest.mark.vm
def test_a_front_end_that_does_not_read_stops_the_kernel_and_nothing_is_lost(
    rig: Rig, cluster_spec: str
) -> None:
    rig.connect(rig.kernel(cluster_spec))
    client = rig.ready()
    slow = Wire(rig, "iopub", rcvhwm=10)
    assert slow.receive()["msg_type"] == "iopub_welcome"
    count, began = 100, memory()
    cell = client.execute(
        f"for i in range({count}): display({{'text/plain': str(i) + 'x' * {MIB}}}, raw=True)"
    )
    time.sleep(5)
    assert memory() - began < 400 * MIB
    control = Wire(rig, "control")
    control.send("kernel_info_request", {})
    assert control.receive()["msg_type"] == "kernel_info_reply"  # not held up by it
    control.close()
    seen = []
    while True:
        message = slow.receive()
        if message["parent_header"].get("msg_id") != cell:
            continue
        if message["msg_type"] == "display_data":
            text = message["content"]["data"]["text/plain"]
            seen.append(int(text.partition("x")[0]))
        elif message["content"].get("execution_state") == "idle":
            break
    assert seen == list(range(count))
    slow.close()


def test_a_front_end_that_goes_without_reading_is_not_waited_for(shared: Rig) -> None:
    client = shared.ready()
    dead = Wire(shared, "iopub", rcvhwm=1)
    assert dead.receive()["msg_type"] == "iopub_welcome"
    cell = client.execute("for i in range(40): print('x' * (1 << 20), flush=True)")
    time.sleep(1)
    dead.close()
    while client.get_shell_msg(timeout=PATIENCE)["parent_header"].get("msg_id") != cell:
        pass
    assert run(client, "print('on')")[0] == "on\n"


def test_a_thousand_front_ends_with_the_same_ids_get_their_answers(shared: Rig) -> None:
    shared.ready()
    wires = [Wire(shared, "shell", f"client {number}".encode()) for number in range(1000)]
    for number, wire in enumerate(wires):
        wire.send("is_complete_request", {"code": f"'{number}"}, "one id for all")
    for number, wire in enumerate(wires):
        reply = wire.receive()
        assert reply["parent_header"]["msg_id"] == "one id for all", number
        wire.close()
    assert "pending=0" in repr(shared.relay)


def test_very_many_cells_on_a_host_that_is_lost_have_their_answers(
    rig: Rig, plain_spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "MOST_BACKLOG", 100)
    rig.connect(rig.kernel(plain_spec))
    rig.ready().stop_channels()  # one that does not read would be waited for
    shell, iopub = Wire(rig, "shell"), Wire(rig, "iopub", rcvhwm=10)
    assert iopub.receive()["msg_type"] == "iopub_welcome"
    codes = ["while True: pass", *["1"] * 799]
    ids = [shell.send("execute_request", {"code": code, "silent": False}) for code in codes]
    deadline = time.monotonic() + PATIENCE
    while "pending=800" not in repr(rig.relay):
        assert time.monotonic() < deadline, rig.relay
        time.sleep(0.05)
    rig.within(rig.relay.fail, VmHostLostError("gone " * 2000))
    errors = []
    while len(errors) < len(ids):
        message = iopub.receive(10)
        if message["msg_type"] == "error":
            errors.append(message["parent_header"]["msg_id"])
    assert errors == ids
    replies = [shell.receive(10) for _ in ids]
    assert [reply["parent_header"]["msg_id"] for reply in replies] == ids
    shell.close()
    iopub.close()


def test_many_cells_of_many_clients_at_once(shared: Rig) -> None:
    """Every request has its one answer, in its client's order."""
    clients = [shared.ready() for _ in range(4)]
    answers: list[int] = []

    def work(client: Any) -> None:
        ids = [client.execute("1") for _ in range(50)]
        got = [client.get_shell_msg(timeout=PATIENCE) for _ in ids]
        assert [reply["parent_header"]["msg_id"] for reply in got] == ids
        answers.append(len(got))

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert answers == [50] * 4


class Peer:
    """The sockets of a kernel that says what no kernel should."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        public, secret = zmq.curve_keypair()
        self.info: dict[str, Any] = {
            "ip": "127.0.0.1", "transport": "tcp", "curve_publickey": public.decode(),
        }  # fmt: skip
        self.sockets: dict[str, zmq.Socket[bytes]] = {}
        for name in ("shell", "control", "stdin", "iopub"):
            kind = zmq.XPUB if name == "iopub" else zmq.ROUTER
            sock: zmq.Socket[bytes] = self.context.socket(kind)
            sock.curve_publickey, sock.curve_secretkey, sock.curve_server = public, secret, True
            self.info[f"{name}_port"] = sock.bind_to_random_port("tcp://127.0.0.1")
            self.sockets[name] = sock

    def request(self, name: str) -> list[bytes]:
        """The next one, identities first."""
        assert self.sockets[name].poll(PATIENCE * 1000)
        return self.sockets[name].recv_multipart()

    def close(self) -> None:
        self.context.destroy(linger=0)


GARBAGE: list[list[bytes]] = [
    [b""],
    [b"\xff" * 300],
    [b"<IDS|MSG>"],
    [b"<IDS|MSG>", b"", b"{}"],
    [b"<IDS|MSG>", b"", b"\xff\xfe", b"[]", b"{", b""],
    [b"topic", b"<IDS|MSG>", b"", b"[" * 100_000, b"[" * 100_000, b"", b""],
    [b"<IDS|MSG>", b"", b"1", b'{"msg_id": {"a": []}}', b"1", b"1"],
    [b"x"] * 300,
]


def test_what_a_broken_kernel_says_costs_only_itself(rig: Rig) -> None:
    peer, client = Peer(), rig.client()
    began = threading.Thread(target=rig.connect, args=(peer.info,))
    began.start()
    assert peer.sockets["iopub"].recv() == b"\x01"
    for message in GARBAGE:
        peer.sockets["iopub"].send_multipart(message)
    began.join(PATIENCE)
    cell = client.execute("1")
    ours, theirs, *frames = peer.request("shell")
    for message in GARBAGE:
        peer.sockets["shell"].send_multipart([ours, *message])
        peer.sockets["shell"].send_multipart([ours, theirs, *message])
        peer.sockets["iopub"].send_multipart(message)
    session = Session(key=KEY)
    reply = session.msg("execute_reply", {"status": "ok"}, parent=session.deserialize(frames[1:]))
    peer.sockets["shell"].send_multipart([ours, theirs, *session.serialize(reply)])
    wanted = None
    while wanted is None:
        # What garbage is for this client comes to it as it is, and is its to refuse
        with contextlib.suppress(ValueError, TypeError, IndexError, KeyError, RecursionError):
            got = client.get_shell_msg(timeout=PATIENCE)
            wanted = got if got["parent_header"].get("msg_id") == cell else None
    rig.within(rig.relay.fail, VmHostLostError("gone"))  # the loop lives
    peer.close()


@pytest.mark.parametrize("lack", ["shell_port", "ip"])
def test_a_host_that_tells_half_is_an_error(rig: Rig, lack: str) -> None:
    peer = Peer()
    del peer.info[lack]
    with pytest.raises(Exception, match="cannot be used"):
        rig.connect(peer.info)
    peer.close()


def test_a_connection_that_broke_is_told(rig: Rig) -> None:
    """A kernel that welcomes again has lost us for a moment."""
    peer, client = Peer(), rig.client()
    began = threading.Thread(target=rig.connect, args=(peer.info,))
    began.start()
    assert peer.sockets["iopub"].recv() == b"\x01"
    session = Session(key=KEY)
    welcome = session.serialize(session.msg("iopub_welcome", {"subscription": ""}))
    peer.sockets["iopub"].send_multipart(welcome)
    began.join(PATIENCE)
    client.execute("1")
    peer.request("shell")
    peer.sockets["iopub"].send_multipart(welcome)
    while (message := client.get_iopub_msg(timeout=PATIENCE))["msg_type"] != "stream":
        pass
    assert "some output may be missing" in message["content"]["text"]
    peer.close()


def test_nothing_is_left_of_a_relay(plain_spec: str, tmp_path: Path) -> None:
    """Threads and descriptors end with it, also while messages wait for somebody who is gone."""
    process = psutil.Process()
    rig = Rig()
    before = process.num_threads(), process.num_fds()
    for _ in range(5):
        relay = rig.within(rig._relay, {"ip": "127.0.0.1", "key": KEY})
        rig.within(relay.close)
    time.sleep(0.2)
    after = process.num_threads(), process.num_fds()
    rig.close()
    assert after[0] <= before[0] + 5  # of asyncio's executor
    assert after[1] <= before[1]


def test_the_end_of_the_interpreter_closes_a_relay_too() -> None:
    code = """if True:
        import asyncio, atexit
        from vmkernel.cluster.relay import Relay
        loop = asyncio.new_event_loop()
        async def opened():
            relay = Relay({"ip": "127.0.0.1", "key": b"k"})
            await relay.open()
            return relay
        relay = loop.run_until_complete(opened())
        atexit.register(lambda: (loop.run_until_complete(relay.close()), print("closed")))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert (done.stdout, done.stderr) == ("closed\n", "")
