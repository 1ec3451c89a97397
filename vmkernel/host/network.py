"""A VM's network, from the side of its owner: the proxy's process, and what it has to tell.

Where it stands: `host.start` has one for each VM whose setting `network` is not "none".  Nothing is
started before the guest uses its network: the owner waits for a first byte on the port, and then
starts the proxy (`vmkernel.network.serve`) in bubblewrap, where that works: without the host's
files, without a capability, unable to start a program, but with the host's network, which is its
work.  It ends with the VM; with its owner, whatever becomes of him; and if it dies it is replaced,
as often as `MOST_DEATHS`, and the guest's side begins anew.

What it refused is told three times: in the log, in ``network.log`` beside the VM's console, and in
the cell that runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vmkernel.environment import outward
from vmkernel.errors import SettingsError, VmError
from vmkernel.protocol import messages
from vmkernel.text import plain_text

if TYPE_CHECKING:
    from vmkernel.network.pipconfig import PipConfig
    from vmkernel.settings import Settings
    from vmkernel.vm.machine import Spawned
    from vmkernel.vm.ports import AgentPort

log = logging.getLogger("vmkernel")

PROXY = "http://127.0.0.1:3128"  # vmkernel.guest.network
GATEWAY = "packages.vmkernel"  # vmkernel.network.policy
AUTHORITIES = "/run/vmkernel/authorities.pem"  # vmkernel.guest.network
MOST_AUTHORITIES = 1 << 20
MOST_DEATHS = 5
MOST_NEWS = 200
"""Lines of news in a minute that a proxy is listened to; it says fewer, unless it is not ours."""
MOST_LOG = 1 << 20
CALL_SECONDS = 30.0
_LIBRARIES = ("/lib", "/lib32", "/lib64")
_RESOLVER = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/host.conf",
             "/etc/gai.conf", "/run/systemd/resolve", "/run/nscd")  # fmt: skip
_CERTIFICATES = ("/etc/ssl", "/etc/pki", "/etc/ca-certificates")
_CERTIFICATE = re.compile(
    rb"-----BEGIN CERTIFICATE-----\s[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----\n?"
)
_PROGRAM = Path(__file__).parents[1] / "network" / "run_proxy.py"


def check(settings: Settings) -> None:
    """See that `network_allow` says what can be understood.

    Raises:
        SettingsError: an entry does not.
    """
    from vmkernel.network.policy import parse_rule

    for entry in settings.network_allow:
        try:
            parse_rule(entry)
        except ValueError as error:
            raise SettingsError(
                f"Setting 'network_allow' has an entry that opens nothing: {error}",
                hint="write example.com, *.example.com, 192.0.2.7, 10.0.0.0/8; :port behind it",
            ) from None


def in_words(settings: Settings) -> str:
    """The setting for people: ``%vm``, ``ps``."""
    if settings.network == "allow":
        return f"allow ({', '.join(('packages', *settings.network_allow))})"
    return settings.network


def network_problem(settings: Settings) -> tuple[str, str]:
    """What is wrong with the network's settings on this host, and what to do; else ("", "")."""
    if settings.network == "none":
        return "", ""
    try:
        check(settings)
    except SettingsError as error:
        return error.message, error.hint
    from vmkernel.network.pipconfig import read_config

    config = read_config()
    if config.problems:
        return config.problems[0], "look at `pip config list`"
    if settings.network == "packages" and not config.indexes:
        return "pip is configured for no package index here", "look at `pip config list`"
    return "", ""


def guest_variables(settings: Settings) -> dict[str, str]:
    """What a guest with a network has in its environment."""
    if settings.network == "none":
        return {}
    variables = {
        "PIP_INDEX_URL": f"http://{GATEWAY}/simple/",
        "PIP_TRUSTED_HOST": GATEWAY,
        "PIP_RETRIES": "1",
        "PIP_DEFAULT_TIMEOUT": "120",
        "UV_DEFAULT_INDEX": f"http://{GATEWAY}/simple/",
        "UV_INSECURE_HOST": GATEWAY,
    }
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        variables[name] = variables[name.upper()] = PROXY
    variables["no_proxy"] = variables["NO_PROXY"] = "localhost,127.0.0.1,::1"
    if settings.network in ("allow", "open") and _bundle():
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT",
                     "GIT_SSL_CAINFO", "NODE_EXTRA_CA_CERTS"):  # fmt: skip
            variables[name] = AUTHORITIES
    return variables


def _bundle() -> str:
    from vmkernel.network.pipconfig import host_bundle

    return host_bundle()


def _authorities(settings: Settings) -> bytes:
    """The certificates that this host trusts, and nothing else that may stand in that file."""
    path = _bundle() if settings.network in ("allow", "open") else ""
    if not path:
        return b""
    with open(path, "rb") as file:
        found = _CERTIFICATE.findall(file.read(16 << 20))
    data = b"\n".join(each.strip() for each in found) + b"\n"
    return data if len(data) <= MOST_AUTHORITIES else b""


class Network:
    """One VM's.  ``tell(text)`` says something in the cell that runs."""

    def __init__(
        self,
        settings: Settings,
        spawned: Spawned,
        log_path: Path,
        tell: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._port = spawned.network
        self._qemu = spawned.machine.qemu
        self._log_path = log_path
        self._tell = tell
        self._agent: AgentPort | None = None
        self._marker = b""
        self._process: subprocess.Popen[bytes] | None = None
        self._news: socket.socket | None = None
        self._line = b""
        self._waiting = False
        self._deaths = 0
        self._minute = 0.0
        self._heard = 0
        self._broken = False
        self._closed = False
        self._log_fd = -1
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        process = self._process.pid if self._process is not None else None
        return f"<Network {self._settings.network} process={process} deaths={self._deaths}>"

    async def open(self, agent: AgentPort) -> None:
        """Let the guest listen.  Raises VmError."""
        self._agent = agent
        self._marker = os.urandom(16)
        await agent.exchange(
            messages.OpenNetwork(self._marker), (_authorities(self._settings),), CALL_SECONDS
        )
        if not self._closed:
            asyncio.get_running_loop().add_reader(self._port, self._start)
            self._waiting = True

    async def close(self) -> None:
        """End the proxy."""
        self._closed = True
        self._stop_waiting()
        for task in self._tasks:
            task.cancel()
        self._hang_up()
        if self._log_fd >= 0:
            os.close(self._log_fd)
            self._log_fd = -1
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, 10)

    # --- the process ---

    def _stop_waiting(self) -> None:
        if self._waiting:
            self._waiting = False
            asyncio.get_running_loop().remove_reader(self._port)

    def _hang_up(self) -> None:
        news, self._news = self._news, None
        if news is not None:
            asyncio.get_running_loop().remove_reader(news)
            news.close()

    def _start(self) -> None:
        """The guest has something to say to a proxy."""
        self._stop_waiting()
        try:
            self._spawn()
        except Exception as error:  # whatever it was: the guest's connections wait for a word
            self._broken = True
            log.debug("no proxy", exc_info=error)
            self._say(f"the network is not available: {error}; restart the kernel to try again")
            self._disconnect()

    def _spawn(self) -> None:
        from vmkernel.network.pipconfig import read_config
        from vmkernel.network.wire import Orders, encode
        from vmkernel.vm.filter import seccomp_filter
        from vmkernel.vm.sandbox import find_wall
        from vmkernel.vm.wall import sealed_memory

        settings = self._settings
        config = read_config()
        assert settings.network != "none"
        allow, environ = settings.network_allow, outward(os.environ)
        deny = settings.network_deny
        orders = encode(Orders(settings.network, allow, self._marker, config, environ, deny))
        bwrap = find_wall(settings, self._qemu).bwrap
        ours, theirs = socket.socketpair()
        fds = [theirs.fileno()]
        try:
            fds.append(sealed_memory("orders", orders))
            words = [str(_PROGRAM), *map(str, (self._port.fileno(), *fds))]
            command = [sys.executable, "-I", *words]
            if bwrap:
                fds.append(sealed_memory("filter", seccomp_filter(frozenset(("socket",)))))
                command = [*enclosure(bwrap, fds[-1], config), *command]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._open_log(),
                pass_fds=(self._port.fileno(), *fds),
                env={"LC_ALL": "C.UTF-8", "PATH": os.defpath},
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            for fd in fds[1:]:
                os.close(fd)
        ours.setblocking(False)
        self._news = ours
        self._line = b""
        asyncio.get_running_loop().add_reader(ours, self._hear)

    def _open_log(self) -> int:
        if self._log_fd < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            self._log_fd = os.open(self._log_path, flags, 0o600)
        return self._log_fd

    def _hear(self) -> None:
        assert self._news is not None
        try:
            data = self._news.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._on_end()
            return
        *lines, self._line = (self._line + data).split(b"\n")
        self._line = self._line[-(1 << 16) :]
        now = time.monotonic()
        if now - self._minute > 60:
            self._minute, self._heard = now, 0
        for line in lines:
            self._heard += 1
            if self._heard <= MOST_NEWS:
                self._on_news(line)

    def _on_news(self, line: bytes) -> None:
        from vmkernel.network.wire import decode_news

        try:
            news = decode_news(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        where, why = plain_text(news.where), plain_text(news.why)
        text = f"{where} {news.kind}: {why}"
        if news.kind == "broken":
            self._broken = True
            text = f"the guest's side broke the rules ({why}); restart the kernel to have it again"
        elif news.kind == "closed":
            text = f"{where} refused: {why}{self._advice(where)}"
        if news.left_out:
            text += f" ({news.left_out} more before this)"
        self._say(text)

    def _advice(self, where: str) -> str:
        host, _, port = where.rpartition(":")
        entry = where if port not in ("80", "443") else host
        known = ",".join((*self._settings.network_allow, entry))
        to_set = f"VMKERNEL_NETWORK=allow VMKERNEL_NETWORK_ALLOW={known}"
        return f"; to open it, on the host: {to_set}"

    def _say(self, text: str) -> None:
        log.warning("network: %s", text)
        with contextlib.suppress(OSError):
            fd = self._open_log()
            if os.fstat(fd).st_size < MOST_LOG:
                moment = time.strftime("%Y-%m-%d %H:%M:%S")
                os.write(fd, f"{moment} {text}\n".encode(errors="replace"))
        self._tell(f"vmkernel: network: {text}\n")

    def _on_end(self) -> None:
        """The proxy is gone."""
        self._hang_up()
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            task = asyncio.get_running_loop().create_task(self._replace(process))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _disconnect(self) -> None:
        """Let the guest's side find out that nobody is here: connections then fail at once."""
        with contextlib.suppress(OSError):
            self._port.shutdown(socket.SHUT_RDWR)

    async def _replace(self, process: subprocess.Popen[bytes]) -> None:
        await asyncio.to_thread(process.wait)
        await asyncio.sleep(0.5)  # at the VM's end the port is lost first
        if self._closed or self._agent is None:
            return
        if self._broken:
            self._disconnect()
            return
        self._deaths += 1
        if self._deaths >= MOST_DEATHS:
            self._broken = True
            self._say("its process died again and again; restart the kernel to have it again")
            self._disconnect()
            return
        self._say(f"its process ended (status {process.returncode}); connections are lost")
        with contextlib.suppress(VmError):  # the VM is ending, too
            await self.open(self._agent)


def enclosure(bwrap: str, filter_fd: int, config: PipConfig) -> list[str]:
    """Bubblewrap for the proxy: Python, resolver, certificates, local indexes; nothing writable."""
    command = [
        bwrap,
        "--unshare-user",
        "--unshare-pid",
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-cgroup-try",
        "--die-with-parent",
        "--new-session",
        "--as-pid-1",
        "--cap-drop", "ALL",
        "--seccomp", str(filter_fd),
        "--chdir", "/",
        "--ro-bind", "/usr", "/usr",
    ]  # fmt: skip
    for path in _LIBRARIES:
        if Path(path).is_symlink():
            command += ["--symlink", str(Path(path).readlink()), path]
        else:
            command += ["--ro-bind-try", path, path]
    shown = ["/etc/ld.so.cache", *_RESOLVER, *_CERTIFICATES, *_python(), *_of_pip(config)]
    shown += [os.environ.get(name, "") for name in ("SSL_CERT_FILE", "SSL_CERT_DIR")]
    for path in dict.fromkeys(shown):
        for each in dict.fromkeys((path, os.path.realpath(path))):
            if each in ("", "/") or each.startswith("/usr/"):
                continue
            if each.startswith("/") and os.access(each, os.R_OK):  # bwrap ends at what it cannot
                command += ["--ro-bind-try", each, each]
    for device in ("/dev/null", "/dev/urandom"):
        command += ["--dev-bind", device, device]
    return [*command, "--remount-ro", "/", "--"]


def _python() -> list[str]:
    """Where the interpreter, its library and our packages lie."""
    from importlib.util import find_spec  # only to be found: this process has no use for them

    places = [sys.prefix, sys.base_prefix, os.path.realpath(sys.executable)]
    for name in ("h11", "msgspec"):
        found = find_spec(name)
        if found is None or found.origin is None:
            raise VmError(f"the Python package {name} is missing", hint="install vmkernel again")
        places.append(str(Path(found.origin).parents[1]))
    return [*places, str(_PROGRAM.parents[1])]


def _of_pip(config: PipConfig) -> list[str]:
    from vmkernel.network.pipconfig import directory_of, roots_of

    places = [config.cert, config.client_cert]
    for index in config.indexes:
        if index.url.startswith("file:"):
            places += [str(directory_of(index)), str(roots_of(index))]
    return [path for path in places if path]
