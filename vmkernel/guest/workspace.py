"""The workspace in the guest: the host's directory, mounted by sshfs over a port of its own.

sshfs is started, and its file system mounted, while the template is made, at a place that only root
can reach; the host's builder answers what it asks for that (`vm.mounting`).  So a clone wakes with
a mount that works, and all it has to do is to bind it to the path that the directory has on the
host.  There is never an empty directory where the workspace should be: without the mount there is
no such path, and sshfs sees no end of its connection as long as the VM lives.

sshfs is root's: the user's code can neither end nor trace nor unmount it, and it is spared when
memory runs out, as the agent is.
"""

from __future__ import annotations

import os
import pwd
import select
import time
from contextlib import suppress

from vmkernel.guest.guard import MS_BIND, MS_NODEV, MS_NOSUID, MS_REMOUNT, mount, unmount
from vmkernel.protocol.sftp import ROOT

SSHFS = "/usr/bin/sshfs"
PRIVATE = "/run/vmkernel-workspace"
SOURCE = f"{PRIVATE}/mount"
REHEARSAL = "/.vmkernel/rehearsal/workspace"
"""Where the workspace appears for a while as a template is made, on the disk as all its places."""
MOUNT_SECONDS = 15.0
WAIT_SECONDS = 5.0
"""How long a guest kernel waits for the agent to mount the workspace."""
MS_RDONLY = 1  # mount(2)

OPTIONS = (
    "passive",  # its connection is stdin and stdout
    "allow_other",
    # Without default_permissions: what may be read the server decides, who is the host's user, and
    # Linux need not ask for the permissions of each directory on the way
    #
    # What is saved on the host is seen at once: no name is remembered, so whoever opens or looks
    # for a file has its attributes fresh, and what was read of it is forgotten when it is opened
    # anew.  Only who has a file open, and asks for its attributes, may be told what they were
    "dir_cache=no",
    "entry_timeout=0",
    "negative_timeout=0",
    "attr_timeout=0.2",
    # They are followed in here, where the path is the same as on the host; the host follows none
    "no_contain_symlinks",
    "no_rofd_flush",  # what was opened for reading has nothing to write back
    "max_conns=1",
)


class Workspace:
    """The agent's part.  Needs root."""

    def __init__(self) -> None:
        self.problem = "this guest has no workspace"
        """Why there is none; "" when there is."""
        self._path = b""
        self._told, self._tell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def prepare(self, port: int) -> None:
        """Mount the workspace where nobody sees it; ``port`` is sshfs' from now on."""
        user = pwd.getpwnam("user")
        options = (*OPTIONS, f"uid={user.pw_uid}", f"gid={user.pw_gid}")
        try:
            os.makedirs(SOURCE, mode=0o700, exist_ok=True)
            os.chmod(PRIVATE, 0o700)
            os.set_blocking(port, True)
            pid = os.posix_spawn(
                SSHFS,
                [SSHFS, "-f", "-o", ",".join(options), f":{ROOT.decode()}", SOURCE],
                {"PATH": "/usr/bin", "LC_ALL": "C.UTF-8"},
                file_actions=[(os.POSIX_SPAWN_DUP2, port, 0), (os.POSIX_SPAWN_DUP2, port, 1)],
            )
        except OSError as error:
            self.problem = f"sshfs could not be started in the guest: {error}"
            return
        finally:
            os.close(port)
        deadline = time.monotonic() + MOUNT_SECONDS
        while not os.path.ismount(SOURCE):
            if os.waitpid(pid, os.WNOHANG)[0] or time.monotonic() > deadline:
                self.problem = "sshfs could not mount the workspace: has this guest kernel no FUSE?"
                return
            time.sleep(0.02)
        # Linux asks sshfs once whether it wants to be asked who may enter: not in each clone
        os.chdir(SOURCE)
        os.chdir("/")
        self.problem = ""

    def show(self, path: bytes, writable: bool) -> None:
        """Have the workspace appear at ``path``.  Once in a VM's life.  Raises OSError."""
        try:
            if self._path == path:
                return
            if self.problem or self._path:
                raise OSError(self.problem or "the workspace is somewhere else already")
            _make_directories(path)
            # mount(2) has bytes: surrogates are those of a name that is no UTF-8
            target = os.fsdecode(path)
            mount(target, MS_BIND, source=SOURCE)
            flags = MS_NOSUID | MS_NODEV | (0 if writable else MS_RDONLY)
            mount(target, MS_REMOUNT | MS_BIND | flags)
            self._path = path
        finally:
            with suppress(BlockingIOError):
                os.write(self._tell, b"\n")

    def hide(self) -> None:
        """Take back a :meth:`show` at `REHEARSAL`: a template must not have it."""
        if self._path != os.fsencode(REHEARSAL):
            return
        unmount(REHEARSAL)
        os.removedirs(REHEARSAL)
        self._path = b""
        os.read(self._told, 4096)

    def wait(self) -> None:
        """Until :meth:`show` was called."""
        select.select([self._told], [], [], WAIT_SECONDS)

    def disown(self) -> None:
        """In a fork of the agent: it may wait, no more."""
        os.close(self._tell)


def _make_directories(path: bytes) -> None:
    """Make the directories above the workspace passable, and the last one."""
    parts = path.strip(b"/").split(b"/")
    if not path.startswith(b"/") or not all(parts) or {b".", b".."} & {*parts}:
        raise OSError(f"no place for a workspace: {path!r}")
    above = b""
    for part in parts:
        above += b"/" + part
        with suppress(FileExistsError):
            os.mkdir(above, 0o755)
        if above != path and not os.stat(above).st_mode & 0o001:  # /root
            os.chmod(above, os.stat(above).st_mode & 0o777 | 0o001)


current: Workspace | None = None
"""The agent's, and so that of each fork of it."""


def wait() -> None:
    """In a guest kernel: until the agent has shown the workspace, or failed to."""
    if current is not None:
        current.wait()


def rehearsal() -> str:
    """Where a guest kernel of a template in the making may rehearse its `chdir`; "" for nowhere."""
    return REHEARSAL if os.path.ismount(REHEARSAL) else ""
