"""Attempts to reach what the setting `network` does not open: none arrives, each is told.

The first part speaks to a VM's proxy, the real process behind its wall, in the guest's place; a
canary listens on the host's loopback addresses.  The second is inside a VM.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from network_rig import PASSWORD, Canary, PackageIndex, Rig, Web, pip_variables, say, status
from vmkernel.network.dial import Dialer, UnreachableError
from vmkernel.network.pipconfig import read_config
from vmkernel.network.policy import Policy, RefusedError
from vmkernel.protocol import mux

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def canary() -> Iterator[Canary]:
    """On 127.0.0.1 and ::1, and on all others that are this host's."""
    found = Canary("0.0.0.0", "::1")
    yield found
    found.close()


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    """What is allowed."""

    def respond(handler) -> None:  # type: ignore[no-untyped-def]
        size = int(handler.headers.get("Content-Length") or 0)
        body = handler.rfile.read(size)
        if handler.path == "/away":
            say(handler, 302, b"", Location="http://169.254.169.254/latest/")
        else:
            say(handler, 200, b"hello " + body)

    found = Web(respond)
    yield found
    found.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def opened(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """The proxy of a VM with ``network = open``."""
    async with Rig("open", [], tmp_path_factory.mktemp("open")) as rig:
        yield rig


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def allowed(tmp_path_factory: pytest.TempPathFactory, web: Web) -> AsyncIterator[Rig]:
    """The proxy of a VM with one server allowed."""
    allow = [f"127.0.0.1:{web.port}", "allowed.example", "*.below.example", "0.0.0.0/0"]
    async with Rig("allow", allow, tmp_path_factory.mktemp("allow")) as rig:
        yield rig


def own_address() -> str:
    """One of this host's that is not loopback's; "" when there is none."""
    for addresses in psutil.net_if_addrs().values():
        for each in addresses:
            if each.family == socket.AF_INET and not each.address.startswith("127."):
                return each.address
    return ""


NEVER = (
    "127.0.0.1", "127.1", "127.0.1", "0x7f.1", "0x7f000001", "2130706433", "017700000001",
    "0177.0.0.01", "127.0.0.1.", "0", "0.0.0.0", "0x0", "localhost", "LOCALHOST", "localhost.",
    "some.localhost", "[::1]", "[0:0:0:0:0:0:0:1]", "[::]", "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b::127.0.0.1]",
    "[2002:7f00:1::]", "[2001:0:7f00:1::]", "[fe80::1]", "[fe80::1%25lo]", "[::1%25lo]",
    "169.254.169.254", "0xa9fea9fe", "[::ffff:169.254.169.254]", "[fd00:ec2::254]",
    "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "224.0.0.1", "255.255.255.255",
    "240.0.0.1", "198.18.0.1", "192.0.2.1", "[fc00::1]", "[ff02::1]", "[fec0::1]", "OWN", "NAME",
)  # fmt: skip
"""Hosts that not even `open` opens, as they can be written."""


@pytest.mark.asyncio(loop_scope="module")
async def test_no_form_of_a_private_address_is_reached(opened: Rig, canary: Canary) -> None:
    hosts = [host for host in NEVER if host not in ("OWN", "NAME")]
    hosts += [host for host in (own_address(), socket.gethostname()) if host]
    for host in hosts:
        where = f"{host}:{canary.port}"
        tunnel = await opened.tunnel(where)
        assert status(tunnel) in (403, 502 if host == socket.gethostname() else 403), where
        assert status(await opened.get(f"http://{where}/")) in (403, 502), where
        assert b"vmkernel: " in tunnel.splitlines()[0]
    assert canary.connections == 0
    assert any("127.0.0.1" in text and "loopback" in text for text in opened.told)


@pytest.mark.asyncio(loop_scope="module")
async def test_only_what_is_named_is_reached(allowed: Rig, web: Web, canary: Canary) -> None:
    answer = await allowed.get(f"http://127.0.0.1:{web.port}/")
    assert status(answer) == 200
    assert answer.endswith(b"hello ")
    refused = [
        f"127.0.0.1:{canary.port}",  # another port of the same address
        f"localhost:{web.port}",  # the same server by a name that nobody allowed
        f"127.0.0.2:{web.port}",  # another address of it
        f"10.0.0.1:{80}",  # 0.0.0.0/0 means what is public
        "allowed.example:22",
        "allowed.example.evil.test:443",
        "notallowed.example:443",
        "below.example:443",
        "x.below.example.evil.test:443",
        "allowed.example\\@evil.test:443",
        "allowed.example@evil.test:443",
        "evil.test#allowed.example:443",
        "allowed.example%00.evil.test:443",
        "packages.vmkernel:443",
        "packages.vmkernel:22",
    ]
    for where in refused:
        answer = await allowed.tunnel(where)
        assert status(answer) == 403, where
    for url in ("http://allowed.example@127.0.0.1/", "http://a:b@127.0.0.1/", "http:///x",
                f"http://127.0.0.1:{canary.port}@allowed.example/", "ftp://allowed.example/",
                "https://allowed.example/", "file:///etc/passwd", "/etc/passwd", "*"):  # fmt: skip
        assert status(await allowed.ask(f"GET {url} HTTP/1.1\r\nHost: x\r\n\r\n".encode())) in (
            400,
            403,
        ), url
    assert canary.connections == 0


@pytest.mark.asyncio(loop_scope="module")
async def test_a_redirection_is_the_clients_to_follow(allowed: Rig, web: Web) -> None:
    answer = await allowed.get(f"http://127.0.0.1:{web.port}/away")
    assert status(answer) == 302
    target = answer.split(b"Location: ")[1].split(b"\r\n")[0].decode()
    assert status(await allowed.get(target)) == 403
    assert "link-local" in await allowed.until_told("169.254.169.254")


SMUGGLED = (
    # The second request of each is for the canary, and must never be one
    b"GET http://WEB/ HTTP/1.1\r\nHost: WEB\r\n\r\nGET http://CANARY/ HTTP/1.1\r\nHost: CANARY\r\n"
    b"\r\n",
    b"GET http://WEB/ HTTP/1.1\r\nHost: WEB\r\n\r\nCONNECT CANARY HTTP/1.1\r\n\r\n",
    b"POST http://WEB/ HTTP/1.1\r\nHost: WEB\r\nContent-Length: 4\r\nTransfer-Encoding: chunked"
    b"\r\n\r\n0\r\n\r\nGET http://CANARY/ HTTP/1.1\r\nHost: CANARY\r\n\r\n",
    b"POST http://WEB/ HTTP/1.1\r\nHost: WEB\r\nContent-Length: 0\r\nContent-Length: 44\r\n\r\n"
    b"GET http://CANARY/ HTTP/1.1\r\nHost: C\r\n\r\n",
    b"POST http://WEB/ HTTP/1.1\r\nHost: WEB\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"POST http://WEB/ HTTP/1.1\r\nHost: WEB\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    b"GET http://WEB/ HTTP/1.1\r\nHost: CANARY\r\n\r\n",
    b"GET http://WEB/ HTTP/1.1\r\nHost: WEB\r\nHost: CANARY\r\n\r\n",
    b"GET http://WEB/ HTTP/1.1\nHost: WEB\nX: a\r\n Host: CANARY\r\n\r\n",
    b"GET http://WEB/ HTTP/1.1\r\nHost: WEB\r\nX: a\rHost: CANARY\r\n\r\n",
    b"CONNECT WEB HTTP/1.1\r\nContent-Length: 9\r\n\r\nCANARY",
    b"GET http://WEB/\x00 HTTP/1.1\r\nHost: WEB\r\n\r\n",
    b"GET http://WEB/ HTTP/1.1\r\nHost: WEB\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
    b"GET http://WEB/ HTTP/1.1\r\nHost: WEB\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 600,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x05\x01\x00\x01\x7f\x00\x00\x01",
)


@pytest.mark.asyncio(loop_scope="module")
async def test_nothing_is_smuggled_behind_a_request(allowed: Rig, web: Web, canary: Canary) -> None:
    where = {b"WEB": b"127.0.0.1:%d" % web.port, b"CANARY": b"127.0.0.1:%d" % canary.port}
    for number, data in enumerate(SMUGGLED):
        before = len(web.requests)
        for name, value in where.items():
            data = data.replace(name, value)
        answer = await allowed.ask(data, seconds=5)
        assert answer.count(b"HTTP/1.1 ") <= 1, (number, answer)
        assert status(answer) in (0, 200, 400, 403, 408, 431, 502), (number, answer)
        assert len(web.requests) <= before + 1, number
        for line, headers in web.requests[before:]:
            assert line.split()[0] in ("GET", "POST"), number
            assert headers["Host"] == where[b"WEB"].decode(), number
    assert canary.connections == 0


@pytest.mark.asyncio(loop_scope="module")
async def test_a_host_header_that_names_another_host_is_refused(allowed: Rig, web: Web) -> None:
    """It is written anew anyway; but who says two hosts wants something of the difference."""
    where = f"127.0.0.1:{web.port}"
    for url, said in (
        (f"http://{where}/", "evil.test"),
        (f"http://{where}/", "127.0.0.1"),
        (f"http://{where}/", f"127.0.0.2:{web.port}"),
        ("http://packages.vmkernel/simple/x/", where),
    ):
        before = len(web.requests)
        answer = await allowed.ask(f"GET {url} HTTP/1.1\r\nHost: {said}\r\n\r\n".encode())
        assert status(answer) == 403, (url, said)
        assert b"its Host header names another one" in answer
        assert len(web.requests) == before


@pytest.mark.asyncio(loop_scope="module")
async def test_hop_by_hop_headers_stay_here(allowed: Rig, web: Web) -> None:
    answer = await allowed.get(
        f"http://127.0.0.1:{web.port}/", "Proxy-Authorization: Basic eDp5", "Upgrade: websocket",
        "Connection: Upgrade, X-Secret", "X-Secret: 1", "TE: trailers", "X-Kept: 1",
    )  # fmt: skip
    assert status(answer) == 200
    _, headers = web.requests[-1]
    assert headers["X-Kept"] == "1"
    assert headers["Connection"] == "close"
    assert not {"Proxy-Authorization", "Upgrade", "X-Secret", "TE"} & headers.keys()


# --- names that change their mind: the resolver is the test's ---


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["::1"], ["9.9.9.9", "127.0.0.1"], ["9.9.9.9", "10.1.2.3"],
     ["::ffff:127.0.0.1"], ["169.254.169.254"], ["0.0.0.0"], ["64:ff9b::a00:1"], ["fe80::1%2"]],
)  # fmt: skip
async def test_a_permitted_name_with_a_private_address_is_refused(addresses: list[str]) -> None:
    async def lookup(host: str, port: int) -> list[str]:
        return addresses

    for policy in (Policy("open"), Policy("allow", ["good.example", "9.9.9.9"])):
        with pytest.raises(RefusedError):
            await Dialer(policy, lookup).connect("good.example", 80)


async def test_rebinding_gains_nothing(canary: Canary, web: Web) -> None:
    asked = []

    async def lookup(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    before = canary.connections
    policy = Policy("allow", ["good.example", f"good.example:{web.port}", f"127.0.0.1:{web.port}"])
    _, writer = await Dialer(policy, lookup).connect("good.example", web.port)
    assert writer.get_extra_info("peername") == ("127.0.0.1", web.port)  # what was judged
    writer.close()
    assert asked == ["good.example"]
    with pytest.raises(RefusedError):  # the second answer is judged, too
        await Dialer(policy, lookup).connect("good.example", web.port)
    assert canary.connections == before


async def test_behind_the_hosts_own_proxy_the_judged_address_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        asked.append(head.split()[1])
        refused = b"named" in refuse and not head.split()[1].startswith(b"written")
        writer.write(b"HTTP/1.1 %s X\r\n\r\n" % (b"403" if refused else b"200"))
        writer.close()

    async def lookup(host: str, port: int) -> list[str]:
        if "unknown" in host:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return ["9.9.9.9"] if "public" in host or "written" in host else ["127.0.0.1"]

    refuse: set[bytes] = set()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    opened = Dialer(Policy("open"), lookup)
    listed = Dialer(
        Policy("allow", ["written.example", "unknown.example", "*.below.example"]), lookup
    )
    async with server:
        await opened.connect("public.example", 443)
        assert asked == [b"9.9.9.9:443"]  # not the name, which it would look up again
        for dialer, host in ((opened, "private.example"), (opened, "localhost")):
            with pytest.raises(RefusedError):
                await dialer.connect(host, 443)
        for dialer, host in ((opened, "unknown.example"), (listed, "unknown.below.example")):
            with pytest.raises((UnreachableError, RefusedError)):
                await dialer.connect(host, 443)
        assert asked == [b"9.9.9.9:443"]
        await listed.connect("unknown.example", 443)  # written out by the host's owner
        refuse.add(b"named")  # a proxy that lets no addresses through
        await listed.connect("written.example", 443)
        assert asked[1:] == [b"unknown.example:443", b"9.9.9.9:443", b"written.example:443"]


async def test_a_resolver_that_hangs_or_lies_is_an_error() -> None:
    async def fails(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    with pytest.raises(UnreachableError):
        await Dialer(Policy("open"), fails).connect("good.example", 80)


def test_tls_for_another_name_ends_the_tunnel() -> None:
    import ssl

    from vmkernel.network.clienthello import TlsCheck

    def hello(name: str | None) -> bytes:
        context = ssl.create_default_context()
        context.check_hostname = False
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(incoming, outgoing, server_hostname=name)
        with pytest.raises(ssl.SSLWantReadError):
            client.do_handshake()
        return outgoing.read()

    for name, problem in (("good.example", ""), ("evil.test", "evil.test"), (None, "")):
        data = hello(name)
        check = TlsCheck("good.example")
        fed = [check.feed(data[i : i + 1]) for i in range(len(data))]
        assert fed[:-1] == [True] * (len(data) - 1)
        assert not fed[-1]
        assert problem in check.problem
        assert bool(problem) == bool(check.problem)
    for junk in (
        b"\x16\x03\x01\x00\x05\x02aaaa",
        b"\x16\x03\x01\xff\xff\x01\xff" + b"\xff" * 70_000,
    ):
        check = TlsCheck("good.example")
        assert not check.feed(junk)
        assert check.problem


# --- the multiplexer ---


def frame(kind: int, number: int, payload: bytes = b"", length: int | None = None) -> bytes:
    """A frame, perhaps with a false length."""
    size = len(payload) if length is None else length
    return struct.pack("!BII", kind, number, size) + payload


OPEN_1 = frame(mux.OPEN, 1)
BROKEN = {
    "unknown kind": frame(9, 1),
    "kind 0": frame(0, 0),
    "data before open": frame(mux.DATA, 1, b"x"),
    "number skipped": frame(mux.OPEN, 7),
    "number 0": frame(mux.OPEN, 0),
    "opened twice": OPEN_1 * 2,
    "open with a payload": frame(mux.OPEN, 1, b"x"),
    "huge frame": OPEN_1 + frame(mux.DATA, 1, b"", 0xFFFFFFFF),
    "frame too large": OPEN_1 + frame(mux.DATA, 1, b"x" * (mux.PIECE + 1)),
    "empty data": OPEN_1 + frame(mux.DATA, 1),
    "credit overrun": OPEN_1 + frame(mux.DATA, 1, b"G" * mux.PIECE) * 40,
    "credit forged": OPEN_1 + frame(mux.GRANT, 1, b"\xff\xff\xff\xff"),
    "credit of a wrong size": OPEN_1 + frame(mux.GRANT, 1, b"\x01"),
    "end with a payload": OPEN_1 + frame(mux.END, 1, b"x"),
    "ended twice": OPEN_1 + frame(mux.END, 1) * 2,
    "data after the end": OPEN_1 + frame(mux.END, 1) + frame(mux.DATA, 1, b"x"),
    "stream flood": b"".join(frame(mux.OPEN, n) for n in range(1, mux.MOST_STREAMS + 2)),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_who_breaks_the_multiplexers_rules_is_cut_off(name: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()
        lost: asyncio.Future[Exception | None] = loop.create_future()
        streams = mux.Mux(ours.fileno(), b"m" * 16, lost.set_result, lambda stream: None)
        sending = asyncio.ensure_future(
            loop.sock_sendall(theirs, b"junk" + b"m" * 16 + BROKEN[name])
        )
        async with asyncio.timeout(10):
            error = await lost
        sending.cancel()  # nobody reads the rest
        assert type(error).__name__ == "ProtocolError"
        assert not streams.streams


async def test_a_network_that_was_broken_stays_so(tmp_path: Path) -> None:
    async with Rig("open", [], tmp_path) as rig:
        rig.socket.sendall(rig.marker + BROKEN["stream flood"])
        text = await rig.until_told("broke the rules")
        assert "restart the kernel" in text
        await asyncio.sleep(1)
        assert rig.network._process is None
        rig.socket.settimeout(5)
        while rig.socket.recv(1 << 16):  # the guest is told by the end of its port
            pass
        assert "broke the rules" in rig.log_path.read_text()


async def test_a_guest_that_does_not_read_fills_no_memory(tmp_path: Path) -> None:
    body = b"x" * (64 << 20)
    big = Web(lambda handler: say(handler, 200, body))
    try:
        async with Rig("allow", [f"127.0.0.1:{big.port}"], tmp_path) as rig:
            assert status(await rig.get(f"http://127.0.0.1:{big.port}/x", "Range: x")) == 200
            before = rig.process.memory_info().rss
            streams = [rig.connect().open() for _ in range(32)]
            for stream in streams:
                await stream.send(f"GET http://127.0.0.1:{big.port}/ HTTP/1.1\r\nHost: 127.0.0.1:"
                                  f"{big.port}\r\n\r\n".encode())  # fmt: skip
            await asyncio.sleep(2)
            # A window of each, what asyncio and the sockets hold; and not 2 GiB
            assert rig.process.memory_info().rss - before < 64 << 20
            assert status(await rig.get(f"http://127.0.0.1:{big.port}/y")) == 200  # others go on
    finally:
        big.close()


async def test_a_flood_of_streams_that_are_given_up_fills_no_memory(tmp_path: Path) -> None:
    async with Rig("open", [], tmp_path) as rig:
        rig.socket.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(rig.socket, rig.marker)
        async with asyncio.timeout(20):
            assert await loop.sock_recv(rig.socket, 64)  # it has started
        before = rig.process.memory_info().rss
        most = 0
        flood = b"".join(frame(mux.OPEN, n) + frame(mux.RESET, n) for n in range(1, 60_001))
        sending = asyncio.ensure_future(loop.sock_sendall(rig.socket, flood))
        while not sending.done():
            await asyncio.sleep(0.05)
            most = max(most, rig.process.memory_info().rss)
            with contextlib.suppress(BlockingIOError):
                rig.socket.recv(1 << 20)
        assert most - before < 32 << 20


async def test_a_scan_of_ports_does_not_flood_the_notebook(tmp_path: Path) -> None:
    async with Rig("open", [], tmp_path) as rig:
        for port in range(1, 300):
            where = f"127.0.0.1:{port}"
            assert status(await rig.tunnel(where)) == 403
        assert 1 <= len(rig.told) <= 25
        assert rig.log_path.read_text().count("\n") <= 25


async def test_hostile_names_are_told_as_plain_text(tmp_path: Path) -> None:
    async with Rig("open", [], tmp_path) as rig:
        answer = await rig.ask(b"CONNECT \x1b]0;evil\x07<b>:1 HTTP/1.1\r\n\r\n")
        assert status(answer) == 400
        await rig.ask(b"CONNECT a\xe2\x80\xaeb:1 HTTP/1.1\r\nHost: a\r\n\r\n")
        await rig.tunnel("<script>alert(1)</script>:1")
        await rig.until_told("script")
        for text in (*rig.told, rig.log_path.read_text()):
            assert "\x1b" not in text
            assert "\x07" not in text
            assert "\u202e" not in text


# --- the package gateway ---


async def test_the_gateway_gives_what_an_index_named_and_nothing_else(tmp_path: Path) -> None:
    index = PackageIndex()
    links = tmp_path / "links"
    links.mkdir()
    (links / "local-1.0.tar.gz").write_bytes(b"local")
    (tmp_path / "secret-1.0.tar.gz").write_bytes(b"secret")
    (links / "leak-1.0.tar.gz").symlink_to(tmp_path / "secret-1.0.tar.gz")
    (links / "fifo-1.0.tar.gz").unlink(missing_ok=True)
    os.mkfifo(links / "fifo-1.0.tar.gz")
    (links / "notes.txt").write_text("secret")
    canary = Canary("127.0.0.1")
    index.strange_links = (
        f'<a href="file://{tmp_path}/secret-1.0.tar.gz">secret-1.0.tar.gz</a>'
        f'<a href="http://127.0.0.1:{canary.port}/loop-1.0.tar.gz">loop</a>'
        '<a href="http://169.254.169.254/meta-1.0.tar.gz">meta</a>'
        '<a href="../../files/away-1.0.tar.gz">away</a>'
        '<a href="javascript:alert(1)-1.0.tar.gz">script</a>'
    )
    index.strange_target = f"http://127.0.0.1:{canary.port}/"
    base = "http://packages.vmkernel"
    try:
        with pip_variables(PIP_INDEX_URL=index.url, PIP_FIND_LINKS=str(links)):
            async with Rig("packages", [], tmp_path) as rig:
                page = await rig.get(f"{base}/simple/vmkpkg/")
                assert status(page) == 200
                assert index.file.encode() in page
                urls = [part.split(b'"')[0].partition(b"#")[0].decode()
                        for part in page.split(b'href="')[1:]]  # fmt: skip
                by_name = {url.rpartition("/")[2]: url for url in urls}
                assert "secret-1.0.tar.gz" not in by_name  # an index names no files of this host
                good = by_name[index.file]
                answer = await rig.get(good)
                assert status(answer) == 200
                assert answer.endswith(index.wheel)
                # What the index named, and may not be reached by its naming it
                for name in ("loop-1.0.tar.gz", "meta-1.0.tar.gz", "away-1.0.tar.gz"):
                    assert status(await rig.get(by_name[name])) == 502, name
                # Tokens and paths
                token = good.split("/")[4]
                for path in (
                    f"/files/{'0' * 40}/{index.file}", f"/files/{token}/../{index.file}",
                    f"/files/{token}/%2e%2e%2fsecret-1.0.tar.gz", f"/files/{token}/other-1.0.whl",
                    f"/files/{token}/{index.file}.metadata", f"/files/{token[:-1]}/{index.file}",
                    "/files/", "/simple/", "/simple/../../../etc/passwd", "/simple/%2e%2e/",
                    "/simple/..%2f..%2f/", "/simple/a/b/", "/etc/passwd", "//etc/passwd",
                    "/simple/vmkpkg%00/", "/simple/.ssh/",
                ):  # fmt: skip
                    assert status(await rig.get(base + path)) == 404, path
                assert status(await rig.ask(
                    b"POST http://packages.vmkernel/simple/x/ HTTP/1.1\r\nHost: packages.vmkernel"
                    b"\r\nContent-Length: 0\r\n\r\n")) == 405  # fmt: skip
                # A directory of links: a file of it, and no way out
                page = await rig.get(f"{base}/simple/local/")
                url = page.split(b'href="')[1].split(b'"')[0].decode()
                assert (await rig.get(url)).endswith(b"\r\n\r\nlocal")
                for name in ("leak", "fifo"):
                    page = await rig.get(f"{base}/simple/{name}/")
                    url = page.split(b'href="')[1].split(b'"')[0].decode()
                    assert status(await rig.get(url)) == 404, name
                # Not the index itself, past the gateway
                where = f"127.0.0.1:{index.port}"
                assert status(await rig.tunnel(where)) == 403
                # And its password nowhere
                said = "".join(rig.told) + rig.log_path.read_text()
                assert PASSWORD not in said
                assert PASSWORD.encode() not in page
                command_lines = [rig.process.cmdline(), list(rig.process.environ().values())]
                assert PASSWORD not in str(command_lines)
        assert canary.connections == 0
    finally:
        canary.close()
        index.close()


async def test_an_indexs_password_is_for_its_own_origin(tmp_path: Path) -> None:
    """The host's proxy is the test's: it sees what is said to any address, and answers for it."""

    def respond(handler) -> None:  # type: ignore[no-untyped-def]
        host = handler.headers["Host"]
        if host == "9.9.9.10" and "moved" in handler.path:
            say(handler, 302, b"", Location=f"http://9.9.9.9{handler.path}")
        elif handler.path.startswith("/simple/"):
            links = ("http://9.9.9.9/x-1.0.zip", "http://9.9.9.10:8080/y-1.0.zip",
                     "http://9.9.9.10/moved-1.0.zip", "http://9.9.9.10/own-1.0.zip")  # fmt: skip
            page = "".join(f'<a href="{link}">{link[-9:]}</a>' for link in links)
            say(handler, 200, page.encode(), Content_Type="text/html")
        else:
            say(handler, 200, b"file")

    def connect(handler) -> None:  # type: ignore[no-untyped-def]
        handler.send_response(200)
        handler.end_headers()

    web = Web(respond)
    web.server.RequestHandlerClass.do_CONNECT = connect  # type: ignore[attr-defined]
    try:
        with pip_variables(
            PIP_INDEX_URL=f"http://reader:{PASSWORD}@9.9.9.10/simple",
            PIP_PROXY=f"http://127.0.0.1:{web.port}",
        ):
            async with Rig("packages", [], tmp_path) as rig:
                for project in ("all", "moved"):
                    page = await rig.get(f"http://packages.vmkernel/simple/{project}/")
                    assert status(page) == 200
                    for part in page.split(b'href="')[1:]:
                        answer = await rig.get(part.split(b'"')[0].decode())
                        assert answer.endswith(b"file")
    finally:
        web.close()
    hosts = {headers["Host"] for _, headers in web.requests}
    assert hosts == {"9.9.9.9", "9.9.9.10", "9.9.9.10:8080"}
    for line, headers in web.requests:
        own = headers["Host"] == "9.9.9.10"
        assert ("Authorization" in headers) == own, (line, headers["Host"])


async def test_a_link_that_leaves_its_index_is_not_followed(tmp_path: Path) -> None:
    """Not even to where the proxy sees: a second directory of links lies open to it."""
    links, beside = tmp_path / "links", tmp_path / "beside"
    links.mkdir()
    beside.mkdir()
    (beside / "notes").write_bytes(b"secret")
    (beside / "good-1.0.zip").write_bytes(b"good")
    (links / "leak-1.0.zip").symlink_to(beside / "notes")
    with pip_variables(PIP_FIND_LINKS=f"{links} {beside}", PIP_NO_INDEX="1"):
        async with Rig("packages", [], tmp_path) as rig:
            answers = {}
            for name in ("good", "leak"):
                page = await rig.get(f"http://packages.vmkernel/simple/{name}/")
                url = page.split(b'href="')[1].split(b'"')[0].decode()
                answers[name] = await rig.get(url)
    assert answers["good"].endswith(b"good")  # it sees that directory
    assert status(answers["leak"]) == 404
    assert b"vmkernel: the file leak-1.0.zip" in answers["leak"].splitlines()[0]  # pip shows that
    assert b"secret" not in answers["leak"]


def test_what_of_pips_configuration_is_wrong_is_told_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    with (
        contextlib.chdir(tmp_path),
        pip_variables(
            PIP_INDEX_URL="http://u:hidden@[bad/simple",
            PIP_EXTRA_INDEX_URL="http://host:port/x https://good.example/simple",
            PIP_FIND_LINKS="wheels ~nosuchuser/x",
        ),
    ):
        config = read_config()
    assert [index.url for index in config.indexes] == [
        "https://good.example/simple", (tmp_path / "wheels").as_uri(),
    ]  # fmt: skip
    assert len(config.problems) == 3
    assert "hidden" not in str(config.problems)


async def test_a_package_index_that_cannot_be_understood_is_said(tmp_path: Path) -> None:
    with pip_variables(PIP_INDEX_URL="http://[bad/simple"):
        async with Rig("packages", [], tmp_path) as rig:
            assert status(await rig.get("http://packages.vmkernel/simple/x/")) == 404
            assert "URL is none" in await rig.until_told("pip's configuration")


async def test_the_proxy_sees_no_files_and_starts_no_programs(tmp_path: Path) -> None:
    """What is behind the wall with it, by its own mount table and limits."""
    async with Rig("open", [], tmp_path) as rig:
        await rig.get("http://127.0.0.1/")
        process = rig.process
        mounts = Path(f"/proc/{process.pid}/mountinfo").read_text()
        points = [line.split()[4] for line in mounts.splitlines()]
        if "/usr" not in points or len(points) > 60:
            pytest.skip("bubblewrap does not work here")
        home = str(Path.home())
        assert home not in points
        assert "/home" not in points
        assert "/tmp" not in points
        assert "/var" not in points
        assert "/run" not in points
        assert "/proc" not in points
        state = Path(f"/proc/{process.pid}/status").read_text()
        assert "CapEff:\t0000000000000000" in state
        assert "NoNewPrivs:\t1" in state
        assert "Seccomp:\t2" in state
        root = Path(f"/proc/{process.pid}/root")
        assert not (root / home.lstrip("/") / ".ssh").exists()
        assert not (root / "etc/shadow").exists()


def test_entries_that_open_too_much_are_no_entries() -> None:
    for text in ("*", "*.com", "http://example.com", "a b", "host:0", "host:99999", "10.0.0.0/33",
                 "[::1", "*.10.0.0.1", "example..com", "-x.com", "user@host"):  # fmt: skip
        with pytest.raises(ValueError, match=r"[a-z]"):
            Policy("allow", [text])


def test_what_is_wrong_with_an_entry_is_said_in_words_that_help() -> None:
    for text, words in (
        ("http://example.com", "the host only"), ("example.com/path", "the host only"),
        ("localhost", "write 127.0.0.1:80"), ("localhost:8080", "write 127.0.0.1:8080"),
        ("1", "in full"), ("0:80", "in full"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            Policy("allow", [text])


def test_this_hosts_own_address_is_not_opened_by_its_network() -> None:
    own = own_address()
    if not own or not ipaddress.ip_address(own).is_private:
        pytest.skip("this host has no address in a private network")
    network = ipaddress.ip_network(f"{own}/24", strict=False)
    ours = {each.address for many in psutil.net_if_addrs().values() for each in many}
    neighbour = next(each for each in network.hosts() if str(each) not in ours)
    policy = Policy("allow", [str(network)])
    policy.judge(neighbour, 80)
    with pytest.raises(RefusedError):
        policy.judge(ipaddress.ip_address(own), 80)
    Policy("allow", [f"{own}:80"]).judge(ipaddress.ip_address(own), 80)  # by itself, with its port


def test_an_address_may_be_written_in_all_usual_ways() -> None:
    written = ("2001:db8::1", "[2001:db8::1]:443", "2001:db8::/32", "[2001:db8::/32]:443",
               "9.9.9.9", "10.0.0.0/8:5432", "*.example.com:8443", "EXAMPLE.com.")  # fmt: skip
    assert [str(rule.network or rule.name) for rule in Policy("allow", written).rules] == [
        "2001:db8::1/128", "2001:db8::1/128", "2001:db8::/32", "2001:db8::/32", "9.9.9.9/32",
        "10.0.0.0/8", "example.com", "example.com",
    ]  # fmt: skip


def test_a_wide_network_opens_nothing_private() -> None:
    policy = Policy("allow", ["0.0.0.0/0", "::/0", "10.1.0.0/16:5432", "127.0.0.0/8", "127.0.0.1"])
    for text, port, right in (
        ("10.1.2.3", 5432, True),
        ("10.1.2.3", 5433, False),
        ("10.2.0.1", 5432, False),
        ("127.0.0.1", 80, False),  # what is this host's alone is named with its port
        ("127.0.0.5", 80, False),
        ("169.254.169.254", 80, False),
        ("9.9.9.9", 443, True),
        ("9.9.9.9", 22, False),
    ):
        address = ipaddress.ip_address(text)
        if right:
            policy.judge(address, port)
        else:
            with pytest.raises(RefusedError):
                policy.judge(address, port)
