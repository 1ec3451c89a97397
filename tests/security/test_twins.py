"""Twenty clones of one template, alive at once: no two agree on anything that is to be random.

DESIGN 4.2 has the sources.  What the guest kernel's own process was given before the template was
saved stays the same in all clones, and is not asked for here: the layout of its memory, its stack's
canary and its strings' hashes.  A process that is started in a clone has its own.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmhost import RunningVm, VmHost

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

TWINS = 20
AT_ONCE = 5
"""Starting and asking, that is; they all stay."""

ASK = r"""
import json, os, random, secrets, ssl, struct, subprocess, sys, tempfile, uuid
import numpy

FRESH = '''
import ctypes, json, random, struct
vector = open("/proc/self/auxv", "rb").read()
pairs = dict(struct.iter_unpack("QQ", vector))
maps = [line.split() for line in open("/proc/self/maps")]
places = {line[-1]: line[0].partition("-")[0] for line in maps if line[-1][:1] in "[/"}
print(json.dumps({
    "canary and pointer guard of a new process": ctypes.string_at(pairs[25], 16).hex(),
    "stack of a new process": places["[stack]"],
    "heap of a new process": places["[heap]"],
    "libc of a new process": next(a for name, a in places.items() if "libc.so" in name),
    "hash seed of a new process": hash("x"),
    "random in a new process": random.random(),
}))
'''

def hello():
    # The first thing that a TLS client says: its random, and its half of a key exchange
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    out = ssl.MemoryBIO()
    try:
        context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost").do_handshake()
    except ssl.SSLWantReadError:
        pass
    data = out.read()
    found = {"TLS client random": data[11:43].hex()}
    at = 43
    at += 1 + data[at]  # session id
    at += 2 + struct.unpack_from(">H", data, at)[0]  # cipher suites
    at += 1 + data[at]  # compression
    end = at + 2 + struct.unpack_from(">H", data, at)[0]
    at += 2
    while at < end:
        kind, length = struct.unpack_from(">HH", data, at)
        if kind == 51:
            found["TLS key share"] = data[at + 4 : at + 4 + length].hex()
        at += 4 + length
    return found

key = subprocess.run("openssl genpkey -algorithm ED25519", shell=True, capture_output=True)
answers = {
    "os.urandom": os.urandom(16).hex(),
    "os.getrandom": os.getrandom(16).hex(),
    "/dev/urandom": open("/dev/urandom", "rb").read(16).hex(),
    "/dev/random": open("/dev/random", "rb").read(16).hex(),
    "random": random.random(),
    "random.Random": random.Random().random(),
    "SystemRandom": random.SystemRandom().random(),
    "numpy.random": numpy.random.random(),
    "numpy.random.RandomState": numpy.random.RandomState().random(),
    "numpy.random.default_rng": numpy.random.default_rng().random(),
    "uuid1": str(uuid.uuid1()),
    "node": uuid.getnode(),
    "uuid4": str(uuid.uuid4()),
    "secrets": secrets.token_hex(),
    "secrets.choice": secrets.randbelow(1 << 62),
    "ssl": ssl.RAND_bytes(16).hex(),
    "a key of openssl's": key.stdout.decode(),
    "mkdtemp": tempfile.mkdtemp(),
    "NamedTemporaryFile": tempfile.NamedTemporaryFile().name,
    "kernel's uuid": open("/proc/sys/kernel/random/uuid").read(),
    "boot_id": open("/proc/sys/kernel/random/boot_id").read(),
    "machine-id": open("/etc/machine-id").read(),
    "host name": os.uname().nodename,
    **hello(),
    **json.loads(subprocess.check_output([sys.executable, "-I", "-S", "-c", FRESH])),
}
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def host(session_dir: Path) -> Iterator[VmHost]:
    """The module's host."""
    host = VmHost(session_dir)
    yield host
    assert host.left() == []


@pytest.fixture(scope="module")
def answers(host: VmHost, datascience_image: str) -> dict[str, list[Any]]:
    """What each source said in each of the twins; ``clock``: by how many seconds it is wrong."""
    # The memory of the session's kernelspec, so that its template serves here, too.
    settings = host.settings(
        VMKERNEL_RECIPE=datascience_image,
        VMKERNEL_MEMORY="1G",
        VMKERNEL_MAX_CONCURRENT_VMS=str(TWINS),
    )
    told = asyncio.run(ask_all(host, settings))
    return {name: [answer[name] for answer in told] for name in told[0]}


async def ask_all(host: VmHost, settings: Any) -> list[dict[str, Any]]:
    turns = asyncio.Semaphore(AT_ONCE)
    everybody = asyncio.Barrier(TWINS)
    templates = set()

    async def one() -> dict[str, Any]:
        await turns.acquire()
        async with RunningVm(settings) as vm:
            answer: dict[str, Any] = json.loads(await vm.run(ASK))
            answer["clock"] = min([await clock_error(vm) for _ in range(3)])
            assert vm.start.template is not None
            templates.add(vm.start.template.directory)
            turns.release()
            await everybody.wait()
        return answer

    told = await asyncio.gather(*(one() for _ in range(TWINS)))
    assert len(templates) == 1
    return told


async def clock_error(vm: RunningVm) -> float:
    before = time.time()
    guest = float(await vm.run("import time; print(time.time())"))
    after = time.time()
    # It was read at some moment between: outside of that it is wrong by this much
    return max(before - guest, guest - after, 0.0)


SOURCES = [
    "/dev/random",
    "/dev/urandom",
    "NamedTemporaryFile",
    "SystemRandom",
    "TLS client random",
    "TLS key share",
    "a key of openssl's",
    "boot_id",
    "canary and pointer guard of a new process",
    "hash seed of a new process",
    "heap of a new process",
    "host name",
    "kernel's uuid",
    "libc of a new process",
    "machine-id",
    "mkdtemp",
    "node",
    "numpy.random",
    "numpy.random.RandomState",
    "numpy.random.default_rng",
    "os.getrandom",
    "os.urandom",
    "random",
    "random in a new process",
    "random.Random",
    "secrets",
    "secrets.choice",
    "ssl",
    "stack of a new process",
    "uuid1",
    "uuid4",
]


def test_every_source_was_asked(answers: dict[str, list[Any]]) -> None:
    assert sorted(answers) == sorted([*SOURCES, "clock"])


@pytest.mark.parametrize("source", SOURCES)
def test_no_two_twins_agree_on(answers: dict[str, list[Any]], source: str) -> None:
    assert all(answers[source])
    assert len(answers[source]) == TWINS
    assert len(set(answers[source])) == TWINS


def test_their_clocks_are_right(answers: dict[str, list[Any]]) -> None:
    assert max(answers["clock"]) < 0.1
