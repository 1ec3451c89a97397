"""OpenSSH's sftp-server for one workspace, behind a wall of its own.

Where it stands: `host.workspace_gate` starts one when the guest first asks for something, puts
another in its place when it died or does not answer, and alone speaks with it.

What it can see is the workspace, as /ws, and the libraries that it is made of.  The walls, from the
outside in:

* a user namespace in which the user is root, to say of the mount of the workspace that nobody
  follows a symbolic link in it (``nosymfollow``, Linux 5.10, util-linux 2.38), opens a device
  or gains a set-user-id program's rights.  So no link leads anywhere, whoever put it there, and
  there is no race between a look and a step;
* bubblewrap: namespaces of mounts, processes, network and the rest, no capability, an empty
  environment.  The sandbox's own root is a tmpfs, remounted read-only, and there is no --dev: both
  could be filled, and that is the host's memory;
* limits: no core dump, few open files, one process;
* ``-R`` and a mount that is read-only where the workspace is.

It ends with its owner: setpriv asks for the parent's death signal, and where that came too late it
reads the end of its input.  ``unshare --kill-child`` takes the rest along.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vmkernel.vm.wall import sealed_memory

SERVERS = (
    "/usr/lib/openssh/sftp-server",  # Debian, Ubuntu, Arch
    "/usr/libexec/openssh/sftp-server",  # Fedora, RHEL
    "/usr/lib/ssh/sftp-server",  # openSUSE, Alpine
    "/usr/libexec/sftp-server",
)
SETPRIV, UNSHARE, MOUNT = "/usr/bin/setpriv", "/usr/bin/unshare", "/usr/bin/mount"
OPEN_FILES = 512
MOST_WORDS = 2000

_SCRIPT = (
    f"ulimit -n {OPEN_FILES + 64}"
    + """
set -e
ulimit -c 0
top=$1; shift
mount -n -c --rbind "$top" "$top"
while [ "$1" != -- ]; do
  mount -n -c -o "remount,bind,nosuid,nodev,nosymfollow$1" "$2"
  shift 2
done
shift
exec "$@"
"""
)
"""$1: the workspace.  Then options and path of each mount in it, `--`, and what to run."""

_ALL_SIGNALS = [number for number in range(1, 32) if number not in (9, 19)]
_KEPT_FLAGS = (
    (os.ST_NOEXEC, "noexec"),
    (os.ST_NOATIME, "noatime"),
    (os.ST_NODIRATIME, "nodiratime"),
    (os.ST_RELATIME, "relatime"),
)
_MOST_MOUNTS = 64


class Missing(NamedTuple):
    """What a workspace needs and this host has not; "" when there is nothing."""

    problem: str
    hint: str


def find_server() -> str:
    """The path of sftp-server; "" when there is none."""
    return next((path for path in SERVERS if os.access(path, os.X_OK)), "")


def missing(bwrap: str) -> Missing:
    """Whether the programs are here."""
    if not bwrap:
        return Missing("bubblewrap is not installed", "sudo apt install bubblewrap")
    if not find_server():
        return Missing(
            "OpenSSH's sftp-server is not installed", "sudo apt install openssh-sftp-server"
        )
    for path in (SETPRIV, UNSHARE, MOUNT):
        if not os.access(path, os.X_OK):
            return Missing(f"{path} is not there", "sudo apt install util-linux mount")
    return Missing("", "")


def find_bwrap() -> str:
    """The path of bubblewrap; "" when there is none."""
    for directory in (*os.environ.get("PATH", os.defpath).split(":"), "/usr/bin", "/bin"):
        path = os.path.join(directory, "bwrap")  # noqa: PTH118
        if directory.startswith("/") and os.access(path, os.X_OK):
            return path
    return ""


class ServerProcess:
    """One sftp-server.  ``sock`` is the way to it, which is the caller's."""

    def __init__(self, directory: str, *, writable: bool) -> None:
        """Start it.  From the main thread.  Raises OSError."""
        self.sock, theirs = socket.socketpair()
        self._words, words = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        passwd = -1
        try:
            passwd = sealed_memory("passwd", b"u:x:0:0::/ws:/bin/false\n")
            actions = [
                (os.POSIX_SPAWN_DUP2, theirs.fileno(), 0),
                (os.POSIX_SPAWN_DUP2, theirs.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, words, 2),
                (os.POSIX_SPAWN_DUP2, passwd, 3),
            ]
            self.pid = os.posix_spawn(
                SETPRIV,
                command(find_bwrap(), find_server(), directory, writable=writable, passwd=3),
                {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
                setsid=True,
                setsigmask=(),
                setsigdef=_ALL_SIGNALS,
                file_actions=actions,
            )
            try:
                self.pidfd = os.pidfd_open(self.pid)
            except BaseException:  # nobody would ever end it
                os.kill(self.pid, 9)
                os.waitpid(self.pid, 0)
                raise
        except BaseException:
            self.sock.close()
            os.close(self._words)
            raise
        finally:
            theirs.close()
            os.close(words)
            if passwd >= 0:
                os.close(passwd)
        self.sock.setblocking(False)

    def words(self) -> str:
        """What it has said on stderr."""
        with suppress(OSError):
            return os.read(self._words, MOST_WORDS).decode(errors="replace").strip()
        return ""

    def kill(self) -> None:
        """SIGKILL, for all of it; :meth:`reap` when the pidfd is readable."""
        import signal

        with suppress(OSError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def reap(self) -> bool:
        """Whether it has ended; then its descriptors are closed."""
        try:
            if os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG) is None:
                return False
        except ChildProcessError:
            pass
        os.close(self.pidfd)
        os.close(self._words)
        return True


def command(bwrap: str, server: str, directory: str, *, writable: bool, passwd: int) -> list[str]:
    """The whole command line.  ``passwd``: a descriptor of what is to be /etc/passwd."""
    mounts = []
    for path in mounts_in(directory):
        mounts += [_options(path, writable=writable), path]
    argv = [
        SETPRIV, "--pdeathsig", "KILL", "--",
        UNSHARE, "--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child=KILL",
        "--", "/bin/sh", "-c", _SCRIPT, "sh", directory, *mounts, "--",
        bwrap,
        "--unshare-user", "--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts",
        "--unshare-cgroup-try",
        "--hostname", "vmkernel",
        "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL", "--clearenv",
    ]  # fmt: skip
    for path in ("/lib", "/lib64"):
        if Path(path).is_symlink():
            argv += ["--symlink", str(Path(path).readlink()), path]
        else:
            argv += ["--ro-bind-try", path, path]
    argv += [
        "--ro-bind", "/usr/lib", "/usr/lib",
        "--ro-bind-try", "/usr/lib64", "/usr/lib64",
        "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache",
        "--ro-bind", server, "/sftp-server",
        "--ro-bind-data", str(passwd), "/etc/passwd",
        "--dev-bind", "/dev/null", "/dev/null",
        "--bind" if writable else "--ro-bind", directory, "/ws",
        "--remount-ro", "/",
        "--chdir", "/ws",
        "--", "/sftp-server", "-e", "-l", "ERROR", "-u", "0022",
    ]  # fmt: skip
    return argv if writable else [*argv, "-R"]


def mounts_in(directory: str) -> list[str]:
    """The directory, and what is mounted below it (proc(5), mountinfo)."""
    found = [directory]
    prefix = directory.rstrip("/") + "/"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            path = line.split(" ", 5)[4]
            if "\\" in path:
                for code, letter in (("040", " "), ("011", "\t"), ("012", "\n"), ("134", "\\")):
                    path = path.replace(f"\\{code}", letter)
            if path.startswith(prefix) and path not in found:
                found.append(path)
    if len(found) > _MOST_MOUNTS:
        raise OSError(f"more than {_MOST_MOUNTS} file systems are mounted in it")
    return found


def _options(path: str, *, writable: bool) -> str:
    """What a mount has already must be said again: in a user namespace it cannot be taken off."""
    flags = os.statvfs(path).f_flag
    words = [word for flag, word in _KEPT_FLAGS if flags & flag]
    if not writable or flags & os.ST_RDONLY:
        words.append("ro")
    return "".join(f",{word}" for word in words)
