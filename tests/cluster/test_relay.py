"""The relay, between real clients and a real kernel: plain ipykernel with encryption."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.session import Session

from vmkernel.cluster.relay import Relay, State
from vmkernel.errors import VmCapacityError, VmError, VmHostLostError

KEY = b"of this test only"
PATIENCE = 60


class Rig:
    """A relay in a thread of its own, as in the driver, and the kernels that it is led to."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.kernels: list[AsyncKernelManager] = []
        self.clients: list[BlockingKernelClient] = []
        self.relay: Relay = self.within(self._relay)

    async def _relay(self) -> Relay:
        relay = Relay({"ip": "127.0.0.1", "key": KEY, "signature_scheme": "hmac-sha256"})
        await relay.open()
        return relay

    def within(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """In the relay's loop."""

        async def call() -> Any:
            result = function(*arguments)
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(PATIENCE)

    def kernel(self, name: str) -> dict[str, Any]:
        """Start a kernel that encrypts; its connection information."""

        async def start() -> dict[str, Any]:
            manager = AsyncKernelManager(kernel_name=name, transport_encryption="required")
            manager.session.key = KEY
            self.kernels.append(manager)
            await manager.start_kernel()
            info = dict(manager.get_connection_info())
            return {k: v.decode() if isinstance(v, bytes) else v for k, v in info.items()}

        return self.within(start)

    def client(self) -> BlockingKernelClient:
        """Another front end."""
        client = BlockingKernelClient()
        client.load_connection_info(self.relay.info)
        client.start_channels()
        self.clients.append(client)
        return client

    def close(self) -> None:
        for client in self.clients:
            client.stop_channels()
        self.within(self.relay.close)
        for manager in self.kernels:
            self.within(lambda manager=manager: manager.shutdown_kernel(now=True))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def run(client: BlockingKernelClient, code: str, **options: Any) -> tuple[str, dict[str, Any]]:
    """What the cell printed, and its reply."""
    said: list[str] = []

    def hear(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            said.append(message["content"]["text"])
        elif message["msg_type"] == "clear_output":
            said.clear()

    reply = client.execute_interactive(code, output_hook=hear, timeout=PATIENCE, **options)
    return "".join(said), reply["content"]


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


def test_two_clients_each_get_their_own(rig: Rig, plain_spec: str) -> None:
    rig.within(rig.relay.connect, rig.kernel(plain_spec))
    one, two = rig.client(), rig.client()
    for client in (one, two):
        client.wait_for_ready(timeout=PATIENCE)
    first = one.execute("x = 5")
    assert one.get_shell_msg(timeout=PATIENCE)["parent_header"]["msg_id"] == first
    assert run(two, "print(x)")[0] == "5\n"
    with pytest.raises(Exception, match=r"^$"):
        one.get_shell_msg(timeout=0.3)


def test_input_asks_who_ran_the_cell(rig: Rig, plain_spec: str) -> None:
    rig.within(rig.relay.connect, rig.kernel(plain_spec))
    other, client = rig.client(), rig.client()
    for each in (other, client):
        each.wait_for_ready(timeout=PATIENCE)

    def answer(message: dict[str, Any]) -> None:
        client.input("blue")

    said, reply = run(client, "print(input('colour? '))", allow_stdin=True, stdin_hook=answer)
    assert (said, reply["status"]) == ("blue\n", "ok")


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
    assert interrupted.is_set()


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


def test_ten_megabytes_come_whole_and_a_slow_reader_stops_the_kernel(
    rig: Rig, plain_spec: str
) -> None:
    rig.within(rig.relay.connect, rig.kernel(plain_spec))
    client = rig.client()
    client.wait_for_ready(timeout=PATIENCE)
    said, reply = run(client, "for i in range(100_000): print('x' * 99)")
    assert reply["status"] == "ok"
    assert len(said) == 10_000_000


def round_trips(client: BlockingKernelClient, count: int = 30) -> float:
    client.wait_for_ready(timeout=PATIENCE)
    times = []
    for _ in range(count):
        began = time.perf_counter()
        run(client, "1 + 1")
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


@pytest.mark.perf
def test_what_the_relay_costs(
    rig: Rig, plain_spec: str, record_property: Callable[[str, object], None]
) -> None:
    info = rig.kernel(plain_spec)
    rig.within(rig.relay.connect, info)
    direct = BlockingKernelClient()
    direct.load_connection_info(info)
    direct.start_channels()
    rig.clients.append(direct)
    relayed = rig.client()
    record_property("direct_ms", round_trips(direct))
    record_property("relayed_ms", round_trips(relayed))
    print(f"direct {round_trips(direct):.2f} ms, relayed {round_trips(relayed):.2f} ms")
