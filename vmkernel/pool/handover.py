"""What the launcher does: hands its kernel's place to a pool member, if there is one.

The pool's server gets this process's arguments, environment, working directory and stdio; a member
says that it takes them; then a shell of 0.7 MiB takes this process's place and stands for the
kernel: it passes SIGINT and SIGTERM on, ends with the kernel's exit status, and when it is killed,
the kernel ends.  No pool, no answer in `PATIENCE`, or anything unusual: the kernel starts here.

Nothing is imported but what is built into Python or a C module: every import would be on the way
of each kernel's start.  Where it stands: alone, imported by ``launcher`` as a module of its own;
server and clients import it, too, as what both ends agree on.
"""

import posix
import sys

PROTOCOL = b"vmkernel pool 2"
PATIENCE = 1.0
"""Seconds for each step with a server that may hang."""
KERNEL, WANTED, STATUS, STOP = b"K", b"W", b"S", b"Q"
"""First byte to the server: a kernel starts; one like this is wanted soon; what is there; end."""
PORTS = (b"shell", b"control", b"stdin", b"iopub", b"hb")
PLAIN = frozenset(b"PATH HOME USER LOGNAME SHELL LANG TMPDIR DBUS_SESSION_BUS_ADDRESS".split())
PLAIN_PREFIXES = (b"VMKERNEL_", b"XDG_", b"LC_", b"PYTHON", b"LD_")
"""Variables that the server may have; the same as `vmkernel.environment` has."""
HEADER = len(PROTOCOL) + 18
"""Bytes at the beginning of a request: the protocol, and how many follow that the server reads."""
TAKEN, REFUSED, CONFIRMED = b"T", b"N", b"G"
INTERRUPT, TERMINATE = b"i", b"t"

# Stands for the kernel once a member has it.  Descriptor 3 is the member's; a trapped signal ends
# `read` without a line, as does the end of the connection, so a flag tells one from the other.
SHELL = """\
trap 'g=1; echo i >&3' INT
trap 'g=1; echo t >&3' TERM
while :; do
    g=
    if read -r s <&3; then exit "$s"; fi
    [ "$g" ] || break
done 2>/dev/null
echo "vmkernel: the kernel's process has died, and its VM with it" >&2
exit 1
"""


def place(environ: dict[bytes, bytes], executable: str, launcher: str) -> bytes:
    """The path of the pool's socket, b"" where there can be none.

    It follows from the environment alone, as the default of ``runtime_dir`` does.  Each combination
    of a Python and a copy of vmkernel has a pool of its own.
    """
    directory = environ.get(b"VMKERNEL_RUNTIME_DIR", b"")
    if not directory:
        directory = environ.get(b"XDG_RUNTIME_DIR", b"")
        if directory[:1] == b"/":
            directory += b"/vmkernel"
        else:
            directory = b"/tmp/vmkernel-%d" % posix.getuid()
    number = 0xCBF29CE484222325  # FNV-1a; hash() differs in each process, hashlib costs 2 ms
    for part in (executable.encode(errors="surrogateescape"), environ.get(b"PYTHONPATH", b""),
                 launcher.encode(errors="surrogateescape")):  # fmt: skip
        for byte in part + b"\0":
            number = (number ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    path = b"%s/pool-%016x" % (directory, number)
    return path if path[:1] == b"/" and len(path) < 100 else b""  # unix(7): 108 at most


def is_private(path: bytes) -> bool:
    """Whether socket and directory are ours and nobody else can get in."""
    directory = posix.lstat(path.rpartition(b"/")[0])
    sock = posix.lstat(path)
    mine = directory.st_uid == sock.st_uid == posix.geteuid()
    # S_IFDIR without any right for others; S_IFSOCK
    return mine and directory.st_mode & 0o170077 == 0o040000 and sock.st_mode & 0o170000 == 0o140000


def pack(arguments: list[str], environ: dict[bytes, bytes]) -> int:
    """A descriptor of a file in memory with all that a kernel's start depends on.

    Variables of which the server has no need come last, and it does not read so far: they may be
    secrets, and it lives longer than the kernel, and forks others.
    """
    umask = posix.umask(0o077)
    posix.umask(umask)
    words = [argument.encode(errors="surrogateescape") for argument in arguments]
    parts = [
        b"%d" % umask,
        posix.getcwdb(),
        b"%d" % len(words),
        *words,
    ]
    rest: list[bytes] = []
    for name, value in environ.items():
        is_plain = name in PLAIN or name.startswith(PLAIN_PREFIXES)
        (parts if is_plain else rest).append(name + b"=" + value)
    data = b"\0".join(parts)
    data = PROTOCOL + b"\0%016d\0" % len(data) + b"\0".join([data, *rest])
    fd = posix.memfd_create("vmkernel-request")
    while data:
        data = data[posix.write(fd, data) :]
    return fd


def connect(path: bytes):  # type: ignore[no-untyped-def]
    """A connection to the server that has this socket; OSError when there is none of ours."""
    import _socket

    if not is_private(path):
        raise OSError("not private")
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    sock.settimeout(PATIENCE)
    sock.connect(path)
    peer = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)  # pid, uid, gid
    if int.from_bytes(peer[4:8], sys.byteorder) != posix.geteuid():
        raise OSError("somebody else's")
    return sock


def send(sock, kind: bytes, fds: list[int]) -> None:  # type: ignore[no-untyped-def]
    """Send a request with descriptors."""
    import _socket

    packed = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
    sock.sendmsg([kind], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)] if fds else [])


def listen(arguments: list[str]) -> list[int]:
    """Sockets that listen on the kernel's five ports (in the order of `PORTS`), or none.

    The front end connects some 12 ms after it has started us, and ZeroMQ tries a connection that
    was refused again only after 100 ms: so this comes first.  What goes wrong is found again, and
    told, by who takes the kernel over.
    """
    paths = sys.path
    sys.path = [path for path in paths if path.endswith("lib-dynload")]  # the rest takes time
    try:
        import _socket
    except ImportError:
        return []
    finally:
        sys.path = paths
    fds: list[int] = []
    try:
        path = arguments[arguments.index("-f") + 1]
        fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
        data = posix.read(fd, 65536)
        posix.close(fd)
        ip = _value(data, b"ip").strip(b'"').decode()
        if _value(data, b"transport") != b'"tcp"' or not ip.replace(".", "").isdigit():
            return []
        for name in PORTS:
            sock = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
            fds.append(sock.detach())
            sock = _socket.socket(fileno=fds[-1])
            try:
                sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)  # as ZeroMQ does
                sock.bind((ip, int(_value(data, name + b"_port"))))
                sock.listen(100)
            finally:
                sock.detach()
    except (OSError, ValueError, LookupError):
        for fd in fds:
            posix.close(fd)
        return []
    return fds


def _value(data: bytes, name: bytes) -> bytes:
    """A plain value of the connection file's JSON, as it stands there."""
    rest = data.split(b'"%s"' % name, 1)[1].lstrip()
    return rest[1:].replace(b"}", b",").split(b",", 1)[0].strip()


def _hand_over(path: bytes, listeners: list[int]) -> None:
    """Let a pool member be the kernel; returns when there is none that would."""
    import _signal  # type: ignore[import-not-found]

    sock = connect(path)
    send(sock, KERNEL, [pack(sys.argv[1:], posix.environ), 0, 1, 2])
    if sock.recv(1) != TAKEN or not posix.access("/bin/sh", posix.X_OK):
        return
    # Only now: who has not answered must not have our ports, or no later kernel would get them
    send(sock, CONFIRMED, listeners)
    try:  # from here on the kernel is the member's
        if sock.fileno() == 3:
            posix.set_inheritable(3, True)
        else:
            posix.dup2(sock.fileno(), 3)
        sock.settimeout(None)  # it is the shell's open file, too
        for number in (_signal.SIGINT, _signal.SIGTERM):
            _signal.signal(number, _signal.SIG_DFL)  # no shell can trap what it finds ignored
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, [_signal.SIGINT, _signal.SIGTERM])
        posix.execve("/bin/sh", ["sh", "-c", SHELL, "vmkernel", *sys.argv[1:]], {})
    finally:  # the kernel ends with this process
        posix.write(2, b"vmkernel: no shell could be started to stand for the kernel\n")
        posix._exit(1)


def main(launcher: str) -> None:
    """Be a kernel, one way or the other; never returns."""
    import _signal

    # An interrupt has nothing to interrupt yet
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
    while (fd := posix.open("/dev/null", posix.O_RDWR)) < 3:  # where stdio is closed
        posix.set_inheritable(fd, True)
    posix.close(fd)
    path = b""
    listeners = listen(sys.argv)
    try:
        if posix.environ.get(b"VMKERNEL_POOL_SIZE") != b"0":
            path = place(posix.environ, sys.executable, launcher)
        if path:
            _hand_over(path, listeners)
    except (OSError, ValueError):
        pass
    import site

    site.main()
    from vmkernel.kernel.launch import main as start

    start(path.decode(errors="surrogateescape"), listeners)
