"""From inside a VM: there is no way out but the proxy, whatever a cell tries."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from network_rig import Canary, Web, say

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

ATTEMPTS = """
import ctypes, json, os, socket, subprocess, urllib.request, urllib.error

CANARY, WEB = {canary}, {web}
del os.environ["no_proxy"], os.environ["NO_PROXY"]  # 127.0.0.1 is to be the host's here
found = {{}}

def attempt(name, action):
    try:
        found[name] = ["reached", repr(action())[:200]]
    except urllib.error.HTTPError as error:
        found[name] = ["HTTP", error.code, str(error)]
    except Exception as error:
        found[name] = [type(error).__name__, getattr(error, "errno", None), str(error)[:300]]

def tcp(host, port, family=socket.AF_INET):
    with socket.socket(family) as sock:
        sock.settimeout(5)
        sock.connect((host, port))
        return sock.getpeername()

def udp(host, port, family=socket.AF_INET):
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(2)
        sock.sendto(b"x", (host, port))
        return sock.recv(100)

def tunnel(where):
    with socket.create_connection(("127.0.0.1", 3128), 10) as sock:
        sock.sendall(f"CONNECT {{where}} HTTP/1.1\\r\\nHost: {{where}}\\r\\n\\r\\n".encode())
        answer = sock.recv(1000).decode()
        if answer.split()[1] != "200":
            raise PermissionError(int(answer.split()[1]), answer.splitlines()[0])
        return answer

def port_device():
    for name in os.listdir("/sys/class/virtio-ports"):
        if open(f"/sys/class/virtio-ports/{{name}}/name").read().strip() == "network":
            return os.open(f"/dev/{{name}}", os.O_RDWR)

def network_pid():
    for name in os.listdir("/proc"):
        if name.isdecimal() and os.stat(f"/proc/{{name}}").st_uid == 65534:
            return int(name)

libc = ctypes.CDLL(None, use_errno=True)

def call(*arguments):
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

open_url = lambda url: urllib.request.urlopen(url, timeout=20).read()
attempt("the proxy works", lambda: open_url(f"http://127.0.0.1:{{WEB}}/").decode())
attempt("a devices' list", lambda: os.listdir("/sys/class/net") != ["lo"] or 1 / 0)
attempt("TCP out", lambda: tcp("9.9.9.9", 443))
attempt("TCP to the host's usual address", lambda: tcp("10.0.2.2", 80))
attempt("TCP to the metadata service", lambda: tcp("169.254.169.254", 80))
attempt("TCP over IPv6", lambda: tcp("2620:fe::fe", 443, socket.AF_INET6))
attempt("UDP DNS", lambda: udp("9.9.9.9", 53))
attempt("UDP over IPv6", lambda: udp("2620:fe::fe", 53, socket.AF_INET6))
attempt("a resolver here", lambda: udp("127.0.0.53", 53))
attempt("names", lambda: socket.getaddrinfo("example.com", 80))
attempt("ICMP", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
attempt("ICMP of a user", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).connect(("9.9.9.9", 0)))
attempt("packets", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
attempt("vsock", lambda: tcp(2, CANARY, 40))
attempt("a tunnel device", lambda: os.open("/dev/net/tun", os.O_RDWR))
attempt("a new namespace", lambda: call(272, 0x40000000))
attempt("the port itself", port_device)
attempt("the canary by address", lambda: open_url(f"http://127.0.0.1:{{CANARY}}/"))
attempt("the canary by name", lambda: open_url(f"http://localhost.localdomain:{{CANARY}}/"))
attempt("the canary in a tunnel", lambda: tunnel(f"127.0.0.1:{{CANARY}}"))
attempt("the canary by IPv6", lambda: tunnel(f"[::1]:{{CANARY}}"))
attempt("the canary as a number", lambda: tunnel(f"2130706433:{{CANARY}}"))
attempt("the canary, mapped", lambda: tunnel(f"[::ffff:127.0.0.1]:{{CANARY}}"))
attempt("ssh of the host", lambda: tunnel("127.0.0.1:22"))
attempt("metadata by the proxy", lambda: open_url("http://169.254.169.254/latest/meta-data/"))
attempt("another name", lambda: open_url("http://evil.example/"))
attempt("TLS to another name", lambda: open_url("https://evil.example/"))
attempt("a redirection", lambda: open_url(f"http://127.0.0.1:{{WEB}}/away"))
attempt("the package index", lambda: open_url("http://packages.vmkernel/etc/passwd"))
pid = network_pid()
attempt("the guest's own process: kill", lambda: os.kill(pid, 9))
attempt("the guest's own process: memory", lambda: open(f"/proc/{{pid}}/mem", "rb"))
attempt("the guest's own process: descriptors", lambda: os.listdir(f"/proc/{{pid}}/fd"))
attempt("its place", lambda: socket.create_server(("127.0.0.1", 3128)))
attempt("the certificates", lambda: open("/run/vmkernel/authorities.pem", "w"))
attempt("the proxy still works", lambda: open_url(f"http://127.0.0.1:{{WEB}}/").decode())
print(json.dumps(found))
"""  # noqa: E501

GOOD = ("the proxy works", "the proxy still works")
BY_PROXY = {
    "the canary by address", "the canary by name", "the canary in a tunnel", "the canary by IPv6",
    "the canary as a number", "the canary, mapped", "ssh of the host", "metadata by the proxy",
    "another name", "a redirection",
}  # fmt: skip
"""Refused by it, with 403"""


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Web, Canary]]:
    """What is allowed, and what must see nobody."""

    def respond(handler) -> None:  # type: ignore[no-untyped-def]
        if handler.path == "/away":
            say(handler, 302, b"", Location=f"http://127.0.0.1:{canary.port}/")
        else:
            say(handler, 200, b"hello")

    canary = Canary("0.0.0.0", "::1")
    web = Web(respond)
    yield web, canary
    web.close()
    canary.close()


def test_no_attempt_leaves_the_vm(
    template: str, servers: tuple[Web, Canary], session_dir: Path
) -> None:
    from vmhost import VmHost

    web, canary = servers
    host = VmHost(session_dir)
    code = ATTEMPTS.format(canary=canary.port, web=web.port)
    (host.directory / "attempts.py").write_text(code)
    done = host.cli(
        "run", str(host.directory / "attempts.py"),
        VMKERNEL_NETWORK="allow", VMKERNEL_NETWORK_ALLOW=f"127.0.0.1:{web.port},good.example",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= 35
    for name in GOOD:
        assert found.pop(name) == ["reached", "'hello'"]
    for name, result in found.items():
        assert result[0] != "reached", name
        if name in BY_PROXY:
            assert 403 in result, (name, result)
    assert canary.connections == 0
    # Each refusal is told in the cell, with the name
    for name in ("evil.example:80", "evil.example:443", "169.254.169.254:80", "127.0.0.1:22"):
        assert f"vmkernel: network: {name} refused: " in done.stderr, name
    assert "VMKERNEL_NETWORK_ALLOW=" in done.stderr


def test_without_a_network_nothing_listens(template: str, session_dir: Path) -> None:
    from vmhost import VmHost

    code = (
        "import os, socket\n"
        "print(socket.socket().connect_ex(('127.0.0.1', 3128)), 'http_proxy' in os.environ)"
    )
    done = VmHost(session_dir).cli("run", "-c", code, VMKERNEL_NETWORK="none")
    assert done.stdout.split() == ["111", "False"], done.stderr  # ECONNREFUSED


async def test_a_network_that_is_over_says_so_and_the_vm_lives(
    template: str, session_dir: Path
) -> None:
    from vmhost import RunningVm, VmHost

    ask = """
import socket, urllib.request
try:
    print(urllib.request.urlopen("http://packages.vmkernel/x", timeout=30).status)
except OSError as error:
    print(error)
"""
    settings = VmHost(session_dir).settings(VMKERNEL_NETWORK="packages")
    async with RunningVm(settings) as vm:
        assert "404" in await vm.run(ask)
        network = vm.start._network
        assert network is not None
        network._on_news(b'{"kind":"broken","where":"the guest","why":"a frame of kind 9"}')
        assert network._process is not None
        network._process.kill()
        async with asyncio.timeout(20):
            while "refused" not in (said := await vm.run(ask)):
                await asyncio.sleep(0.2)
        assert "Connection refused" in said
        assert "2" in await vm.run("print(1 + 1)")
