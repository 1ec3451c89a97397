"""The process that is a driver of Ray: ``python -m vmkernel.cluster.placer``.  Floor 5.

Ray is kept out of the front end's process, which may be a Jupyter server with everybody's kernels:
Ray's C++ ends its process when the cluster's head is away for a minute, never returns from a join
that nobody answers, and bears no fork.  Here it does all that to nobody else.  The parent's side is
`vmkernel.cluster.placement`; the two speak over a socket, and when it closes this process ends,
with it Ray's job, and with that every reservation that was made for it.

Messages are MessagePack with their length (4 bytes, big end first) before them: requests
``[number, method, arguments]``, answers ``[number, kind, value]`` in any order, where the kind is
``ok`` or one of `KINDS`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

NAMESPACE = "vmkernel"
RESOURCE = "vm_slot"
PREFIX = "vmkernel-"
"""Of the names of reservations; the kernel's id follows."""
LENGTH = struct.Struct(">I")
KINDS = frozenset({"dead", "silent", "failed"})
"""What can be wrong: the host is surely gone; it does not answer; it answered with an error."""


class TroubleError(Exception):
    """What is answered in place of a value: one of `KINDS`, and the reason."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def main() -> None:
    """Serve the socket that is this process's standard input, until it closes."""
    channel = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        asyncio.run(_serve(channel))
    finally:
        os._exit(1)


async def _serve(channel: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    placer = Placer()
    sending = threading.Lock()
    tasks: set[asyncio.Task[None]] = set()

    def send(answer: list[Any]) -> None:
        data = msgspec.msgpack.encode(answer, enc_hook=str)
        with sending:
            channel.sendall(LENGTH.pack(len(data)) + data)

    async def handle(number: int, method: str, arguments: list[Any]) -> None:
        try:
            handler: Callable[..., Awaitable[Any]] = getattr(placer, f"do_{method}")
            answer = [number, "ok", await handler(*arguments)]
        except TroubleError as trouble:
            answer = [number, trouble.kind, str(trouble)]
        except Exception as error:  # the parent says what it means; nothing may go unanswered
            answer = [number, "failed", f"{type(error).__name__}: {error}"]
        send(answer)

    def begin(request: list[Any]) -> None:
        task = loop.create_task(handle(*request))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def read() -> None:
        # In a thread of its own, and out by _exit: whatever Ray is stuck in, the parent's end is
        # this process's end.
        try:
            while True:
                (length,) = LENGTH.unpack(_exactly(channel, LENGTH.size))
                request = msgspec.msgpack.decode(_exactly(channel, length))
                loop.call_soon_threadsafe(begin, request)
        finally:
            os._exit(0)

    threading.Thread(target=read, name="vmkernel-placer-read", daemon=True).start()
    await asyncio.Event().wait()


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = channel.recv(min(size - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


class Placer:
    """What the parent may ask for: the methods ``do_…``."""

    def __init__(self) -> None:
        self._groups: dict[str, Any] = {}
        self._actors: dict[str, Any] = {}
        self._making: dict[str, asyncio.Lock] = {}
        # Waits for reservations occupy a thread for a second each; the rest must not queue for it.
        self._waits = ThreadPoolExecutor(32, "vmkernel-wait")
        self._calls = ThreadPoolExecutor(8, "vmkernel-ray")

    async def do_join(self, address: str) -> dict[str, Any]:
        """Join the cluster at *address*, or the one that this host is part of (``auto``)."""
        # A module of this name beside the caller's files would be imported in Ray's place
        import ray

        if not hasattr(ray, "init"):
            place = list(getattr(ray, "__path__", ()))
            raise TroubleError("failed", f"ImportError: a directory is named ray: {place}")
        from vmkernel.cluster import hostactor

        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
        context = ray.get_runtime_context()
        return {"address": context.gcs_address, "interface": hostactor.INTERFACE}

    async def do_hosts(self) -> list[dict[str, Any]]:
        """Every node that has VM slots, dead ones too."""
        import ray

        nodes = await self._call(ray.nodes)
        return [
            {
                "node_id": node["NodeID"],
                "ip": node["NodeManagerAddress"],
                "name": node["NodeManagerHostname"],
                "slots": int(node["Resources"].get(RESOURCE, 0)),
                "alive": node["Alive"],
            }
            for node in nodes
            if node["Resources"].get(RESOURCE) or not node["Alive"]
        ]

    async def do_slots(self) -> dict[str, int]:
        """VM slots of the cluster, and how many of them are free, as Ray counts them."""
        import ray

        total = await self._call(ray.cluster_resources)
        free = await self._call(ray.available_resources)
        return {"total": int(total.get(RESOURCE, 0)), "free": int(free.get(RESOURCE, 0))}

    async def do_waiting(self) -> list[str]:
        """The names of the kernels, anybody's, that wait for a slot."""
        from ray.util.placement_group import placement_group_table

        groups = (await self._call(placement_group_table)).values()
        names = [group["name"] for group in groups if group["state"] in ("PENDING", "RESCHEDULING")]
        return sorted(name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))

    async def do_reserve(self, key: str, kernel_id: str, avoid: list[str], only: str) -> None:
        """Ask for one slot on any host but *avoid*, or on *only* (ids of nodes).

        *key* names the reservation from now on; it may be released before it is made.
        """
        from ray.util.placement_group import placement_group

        where = f"in({only})" if only else f"!in({','.join(avoid)})" if avoid else ""
        name = f"{PREFIX}{kernel_id}"
        options: dict[str, Any] = {}
        if where:
            options["bundle_label_selector"] = [{"ray.io/node-id": where}]

        def make() -> Any:
            return placement_group([{RESOURCE: 1}], strategy="SPREAD", name=name, **options)

        self._groups[key] = None
        group = await self._call(make)
        if key in self._groups:
            self._groups[key] = group
        else:
            await self._remove(group)

    async def do_await_reservation(self, key: str, seconds: float) -> str:
        """The id of the node that the slot is on; "" when *seconds* are over."""
        from ray.util.placement_group import placement_group_table

        group = self._groups.get(key)
        if group is None:
            raise TroubleError("dead", "the reservation was released")
        loop = asyncio.get_running_loop()
        if not await loop.run_in_executor(self._waits, group.wait, seconds):
            return ""
        table = await self._call(placement_group_table, group)
        if key not in self._groups or table.get("state") != "CREATED":
            raise TroubleError("dead", f"the reservation's state is {table.get('state')}")
        return str(table["bundles_to_node_id"][0])

    async def do_release(self, key: str) -> None:
        """Give the slot back, or stop waiting for it."""
        group = self._groups.pop(key, None)
        if group is not None:
            await self._remove(group)

    async def _remove(self, group: Any) -> None:
        from ray.util.placement_group import remove_placement_group

        await self._call(remove_placement_group, group)

    async def do_host(
        self,
        node_id: str,
        ip: str,
        make: bool,
        method: str,
        arguments: list[Any],
        options: dict[str, Any],
        seconds: float,
    ) -> Any:
        """Call the actor of a host; *make* it where it is missing."""
        from ray import exceptions as lost

        gone = (lost.ActorDiedError, lost.ActorUnschedulableError, lost.NodeDiedError)

        async def call() -> Any:
            actor = await self._actor(node_id, ip, make)
            try:
                result = getattr(actor, method).remote(*arguments, **options)
                return await asyncio.wrap_future(result.future())
            except gone:
                self._actors.pop(node_id, None)
                raise

        known = node_id in self._actors
        try:
            async with asyncio.timeout(seconds):
                try:
                    return await call()
                except gone:
                    if not (make and known):
                        raise
                    return await call()  # it had ended itself, for want of kernels
        except gone as error:
            raise TroubleError("dead", _in_short(error)) from error
        except (lost.RayActorError, TimeoutError) as error:
            raise TroubleError("silent", _in_short(error)) from error
        except lost.RayTaskError as error:
            raise TroubleError("failed", _in_short(error)) from error

    async def _actor(self, node_id: str, ip: str, make: bool) -> Any:
        """The handle of a host's actor; a call to it fails when it cannot be made there."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from vmkernel.cluster import hostactor

        actor = self._actors.get(node_id)
        if actor is not None:
            return actor
        name = f"vmkernel-host-{hostactor.INTERFACE}-{node_id}"
        async with self._making.setdefault(node_id, asyncio.Lock()):
            if node_id in self._actors:
                return self._actors[node_id]
            if make:
                # By reference: the host runs the class of the vmkernel that is installed there
                host = ray.remote(getattr(hostactor, "RayHost", hostactor.KernelHost))
                options = host.options(
                    name=name,
                    namespace=NAMESPACE,
                    lifetime="detached",
                    get_if_exists=True,
                    num_cpus=0,
                    max_restarts=0,
                    max_concurrency=10_000,  # each kernel may have a wait that lasts
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
                )
                actor = await self._call(options.remote, ip)
            else:
                try:
                    actor = await self._call(ray.get_actor, name, NAMESPACE)
                except ValueError as error:
                    raise TroubleError("dead", "its actor is gone") from error
            self._actors[node_id] = actor
            return actor

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Ray's blocking calls, in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._calls, function, *arguments)


def _in_short(error: BaseException) -> str:
    """The telling line of Ray's explanations, which run to twenty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Error: " in line] or lines
    return (telling[-1] if telling else type(error).__name__)[:300]


if __name__ == "__main__":
    sys.argv[0] = "vmkernel"
    main()
