"""Inside the VM: cells are an ordinary user's, and whatever they do the agent lives and answers.

All in one VM.  The first part asks once for everything that no cell may do; the second brings the
guest down by what any user of a machine can do: fork, fill, spin.  After each of those the agent
answers, the guest kernel ends and is replaced in the same VM, and nothing of the bomb is left.

tests/jupyter/test_guest.py has more of the first part: memory, signals and descriptors of the
agent, and the deaths of a guest kernel.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from errno import EACCES, EIO, ENOENT, ENOSPC, ENOSYS, EPERM
from pathlib import Path
from typing import Any

import pytest

# The client of the Jupyter tests; --import-mode=importlib makes no directory importable.
sys.path.insert(0, str(Path(__file__).parent.parent / "jupyter"))

from kernel_client import Kernel

from vmkernel.guest.guard import RUN_SIZE

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

SLOW = 60.0
"""Seconds for what takes one or two on a machine that has nothing else to do."""


@pytest.fixture(scope="module")
def kernel(template: str) -> Iterator[Kernel]:
    """A kernel in a VM of 512 MiB."""
    from vmkernel.cli.install import install_kernelspec

    kernels = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels"
    name = "vmsandbox-hardening"
    install_kernelspec(kernels, name=name, options={"recipe": template, "memory": "512M"})
    kernel = Kernel(name)
    yield kernel
    kernel.shut_down()


def value(kernel: Kernel, code: str) -> Any:
    """What the code prints, as JSON."""
    cell = kernel.run(code, seconds=SLOW)
    assert cell.status == "ok", cell.traceback
    return json.loads(cell.stdout)


# --- what no cell may do ---

# Each is one attempt; a raised OSError (errno) is the refusal, anything else is a success
ATTEMPTS = """
import ctypes, errno, fcntl, glob, json, mmap, os, resource, signal, socket, struct, subprocess
import tempfile, termios, time

libc = ctypes.CDLL(None, use_errno=True)

def call(function, *arguments):
    result = function(*arguments)
    if result == -1:
        raise OSError(ctypes.get_errno(), "")
    return result

def syscall(number, *arguments):
    return call(libc.syscall, ctypes.c_long(number), *(
        ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))

def write(path, data=b"1"):
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, data)

def buffer(size=256, data=b""):
    return ctypes.create_string_buffer(data, size)

def raised_limit():
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.prlimit(0, resource.RLIMIT_NPROC, (hard + 1, hard + 1))

def setuid_program():
    # A copy of a program with the bit that its owner may set: it runs as the owner, who is us
    shell = tempfile.mkdtemp() + "/id"
    subprocess.check_call(["cp", "/usr/bin/id", shell])
    os.chmod(shell, 0o6755)
    said = subprocess.check_output([shell, "-u"])
    os.remove(shell)
    if said.strip() != b"0":
        raise OSError(errno.EPERM, "")

def su(*command):
    if subprocess.run(command, input=b"\\n", capture_output=True).stdout.strip() != b"0":
        raise OSError(errno.EPERM, "")

def hide_from_oom():
    write("/proc/self/oom_score_adj", b"-1000")

def pidfd_of_agent():
    return os.pidfd_open(1)

def clock():
    time.clock_settime(time.CLOCK_REALTIME, 0)

def entropy(request, data):
    with open("/dev/urandom", "rb") as device:
        fcntl.ioctl(device, request, data)

def push_input():
    leader, follower = os.openpty()
    if os.fork() == 0:
        os._exit(0)
    fcntl.ioctl(follower, termios.TIOCSTI, b"x")

iov = lambda: buffer(16, struct.pack("QQ", ctypes.addressof(target), 8))
target = buffer(64)

ATTEMPTS = {
    # exploits' favourite tools
    "bpf": lambda: syscall(321, 0, buffer(128, struct.pack("IIII", 2, 4, 4, 1)), 128),
    "bpf program": lambda: syscall(321, 5, buffer(128, struct.pack("II", 1, 2)), 128),
    "userfaultfd": lambda: syscall(323, 0),
    "userfaultfd device": lambda: os.open("/dev/userfaultfd", os.O_RDWR),
    "io_uring": lambda: syscall(425, 8, buffer(256)),
    "perf_event_open": lambda: syscall(298, buffer(128, struct.pack("II", 1, 128)), 0, -1, -1, 0),
    "user namespace": lambda: call(libc.unshare, 0x10000000),
    "network namespace": lambda: call(libc.unshare, 0x40000000),
    "mount namespace": lambda: call(libc.unshare, 0x20000),
    "kernel module": lambda: syscall(175, buffer(64), 64, b""),
    "kernel module from file": lambda: syscall(313, 0, b"", 0),
    "kexec": lambda: syscall(246, 0, 0, 0, 0),
    "kernel log": lambda: call(libc.klogctl, 3, buffer(256), 256),
    "kernel log device": lambda: os.read(os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK), 8192),
    "write to the kernel log": lambda: os.open("/dev/kmsg", os.O_WRONLY),
    "sysrq": lambda: write("/proc/sysrq-trigger", b"c"),
    "core pattern": lambda: write("/proc/sys/kernel/core_pattern", b"|/home/user/x"),
    "modprobe path": lambda: write("/proc/sys/kernel/modprobe", b"/home/user/x"),
    "sysctl": lambda: write("/proc/sys/user/max_user_namespaces", b"1"),
    "input of a terminal": push_input,
    "io ports": lambda: call(libc.iopl, 3),
    "one io port": lambda: call(libc.ioperm, 0x3F8, 8, 1),
    # root's business
    "mount": lambda: call(libc.mount, b"x", b"/mnt", b"tmpfs", ctypes.c_ulong(0), None),
    "mount again": lambda: call(libc.mount, None, b"/", None, ctypes.c_ulong(32), None),
    "fsopen": lambda: syscall(430, b"tmpfs", 0),
    "chroot": lambda: os.chroot("/home/user"),
    "pivot_root": lambda: syscall(155, b"/", b"/mnt"),
    "swapon": lambda: syscall(167, b"/home/user/x", 0),
    "reboot": lambda: syscall(169, 0xFEE1DEAD, 672274793, 0x1234567, 0),
    "clock": clock,
    "host name": lambda: socket.sethostname("x"),
    "claim entropy": lambda: entropy(0x40085203, struct.pack("ii8s", 64, 8, b"x" * 8)),
    "reseed": lambda: entropy(0x5207, 0),
    "packet socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "raw socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
    "network card": lambda: write("/sys/class/net/lo/mtu"),
    "device node": lambda: os.mknod("/home/user/vda", 0o60600, os.makedev(254, 0)),
    "become root": lambda: os.setresuid(0, 0, 0),
    "groups": lambda: os.setgroups([0]),
    "setuid program": setuid_program,
    "su": lambda: su("su", "-c", "id -u"),
    "su to oneself first": lambda: su("setsid", "su", "root", "-c", "id -u"),
    "shadow": lambda: open("/etc/shadow"),
    # limits
    "more processes": raised_limit,
    "unkillable by the OOM killer": hide_from_oom,
    "higher priority": lambda: os.nice(-1),
    "real time": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
    # the agent
    "signal by pidfd": lambda: signal.pidfd_send_signal(pidfd_of_agent(), signal.SIGKILL),
    "descriptor of the agent's": lambda: syscall(438, pidfd_of_agent(), 3, 0),
    "every descriptor of the agent's": lambda: os.listdir("/proc/1/task/1/fd"),
    "read the agent's memory": lambda: syscall(310, 1, iov(), 1, iov(), 1, 0),
    "write the agent's memory": lambda: syscall(311, 1, iov(), 1, iov(), 1, 0),
    "advise on the agent's memory": lambda: syscall(440, pidfd_of_agent(), iov(), 1, 20, 0),
    "compare with the agent": lambda: syscall(312, os.getpid(), 1, 0, 0, 0),
    "agent's limits": lambda: resource.prlimit(1, resource.RLIMIT_NOFILE, (3, 3)),
    "agent's priority": lambda: os.setpriority(os.PRIO_PROCESS, 1, 19),
    "agent's scheduling": lambda: os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0)),
    "agent's OOM score": lambda: write("/proc/1/oom_score_adj", b"1000"),
    "agent's address space": lambda: open("/proc/1/maps").read(),
    "agent's working directory": lambda: os.readlink("/proc/1/cwd"),
    "agent's stack": lambda: open("/proc/1/stack").read(),
    "agent's namespaces": lambda: os.readlink("/proc/1/ns/mnt"),
    "agent's configuration": lambda: write("/run/vmkernel/config.json", b"{}"),
    "agent's bytecode": lambda: os.mkdir("/run/vmkernel/vmkernel/guest/other"),
    "machine-id": lambda: write("/run/vmkernel/machine-id"),
    "a serial line": lambda: os.open("/dev/ttyS0", os.O_WRONLY | os.O_NOCTTY),
}

told = {}
for name, attempt in ATTEMPTS.items():
    child = os.fork()
    if child == 0:  # what works changes a process that is thrown away
        code = 0
        try:
            attempt()
        except OSError as error:
            code = error.errno
        except BaseException:
            code = 255
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    told[name] = os.waitstatus_to_exitcode(status)
print(json.dumps(told))
"""
NAMES = [
    line.strip().split('"')[1]
    for line in ATTEMPTS.partition("ATTEMPTS = {")[2].partition("\n}")[0].splitlines()
    if line.startswith('    "')
]
REFUSALS = {EPERM, EACCES}
OTHER_REFUSALS = {
    "user namespace": {ENOSPC},  # user.max_user_namespaces(7)
    "setuid program": {EPERM},
    "kexec": {EPERM, ENOSYS},
    "io_uring": {EPERM, ENOSYS},
    "userfaultfd device": {EACCES, ENOENT},
    "input of a terminal": {EIO},  # dev.tty.legacy_tiocsti
}


@pytest.fixture(scope="module")
def refusals(kernel: Kernel) -> dict[str, int]:
    """The errno of every attempt; 0 where one succeeded."""
    found: dict[str, int] = value(kernel, ATTEMPTS)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_no_cell_may(refusals: dict[str, int], name: str) -> None:
    assert refusals[name] in OTHER_REFUSALS.get(name, REFUSALS), os.strerror(refusals[name])


def test_nothing_in_the_whole_image_raises_privileges_or_is_open_to_writing(kernel: Kernel) -> None:
    """Nor is anything writable that root might run, import or read its settings from."""
    look = [
        *("find", "/", "/dev", "/run", "-xdev"),
        *("(", "-perm", "/6000", "-printf", r"privileged %p\n"),
        *("-o", "-writable", "!", "-type", "l", "-printf", r"writable %p\n", ")"),
    ]
    own = ("writable /home/user", "writable /tmp/", "writable /dev/shm/")
    found = value(
        kernel,
        "import json, subprocess\n"
        f"said = subprocess.run({look}, capture_output=True, text=True).stdout\n"
        "lines = {line for line in said.splitlines()"
        f" if not line.startswith({own})}}\n"
        "print(json.dumps(sorted(lines)))",
    )
    devices = {"full", "null", "ptmx", "random", "tty", "urandom", "zero", "shm", "pts/ptmx"}
    places = {"/tmp", "/var/tmp", "/run/lock", *(f"/dev/{name}" for name in devices)}
    assert {line for line in found if line.startswith("privileged")} == set()
    assert {line.partition(" ")[2] for line in found} <= places
    assert "writable /dev/null" in found  # it did look


def test_no_file_system_honours_setuid_or_device_files(kernel: Kernel) -> None:
    mounts = value(
        kernel,
        "import json\nprint(json.dumps([line.split()[1:4] for line in open('/proc/mounts')]))",
    )
    assert len(mounts) >= 7
    for place, _, options in mounts:
        assert "nosuid" in options.split(","), place
        assert "nodev" in options.split(",") or place in ("/dev", "/dev/pts"), place


def test_privileges_cannot_come_back(kernel: Kernel) -> None:
    status = value(
        kernel,
        "import json, subprocess\n"
        "text = subprocess.check_output(['cat', '/proc/self/status'], text=True)\n"
        "print(json.dumps(dict(line.split(':', 1) for line in text.splitlines())))",
    )
    assert status["NoNewPrivs"].strip() == "1"
    assert status["Groups"].split() == []
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}


def test_the_kernels_addresses_are_not_told(kernel: Kernel) -> None:
    addresses = value(
        kernel,
        "import json\n"
        "print(json.dumps(sorted({line.split()[0] for line in open('/proc/kallsyms')})[-1]))",
    )
    assert int(addresses, 16) == 0


def test_what_python_users_do_still_works(kernel: Kernel) -> None:
    """Debuggers attach, memory is shared, processes speak over loopback; no core lies about."""
    found = value(
        kernel,
        """
import asyncio, ctypes, json, multiprocessing, os, resource, signal, subprocess, sys
from multiprocessing import shared_memory
found = {}
sleeper = subprocess.Popen(["sleep", "60"], start_new_session=True)
tracer = "import ctypes, os, sys; pid = int(sys.argv[1]); libc = ctypes.CDLL(None);" \\
         "print(libc.ptrace(16, pid, 0, 0), os.waitpid(pid, 0x40000000)[0] == pid)"
found["attach to a stranger"] = subprocess.check_output(
    [sys.executable, "-c", tracer, str(sleeper.pid)], text=True)
sleeper.kill()
sleeper.wait()
memory = shared_memory.SharedMemory(create=True, size=1 << 20)
context = multiprocessing.get_context("spawn")
with context.Pool(2) as pool:
    found["spawned"] = pool.map(abs, [-1, -2])
memory.close()
memory.unlink()
with context.Manager() as manager:
    found["manager"] = list(manager.list([1]))

async def echo(reader, writer):
    writer.write(await reader.readline())
    await writer.drain()
    writer.close()

async def loopback():
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"ping\\n")
    answer = await reader.readline()
    writer.close()
    server.close()
    return answer.decode()

found["loopback"] = await loopback()
found["core"] = resource.getrlimit(resource.RLIMIT_CORE)[0]
crash = subprocess.run([sys.executable, "-c", "import os; os.abort()"])
found["crash"] = [crash.returncode, [name for name in os.listdir() if name.startswith("core")]]
print(json.dumps(found))
""",
    )
    assert found == {
        "attach to a stranger": "0 True\n",
        "spawned": [1, 2],
        "manager": [1],
        "loopback": "ping\n",
        "core": 0,
        "crash": [-6, []],
    }


def test_a_child_of_a_cells_fork_ends_with_the_cell(kernel: Kernel) -> None:
    """And takes no request of the front end's from its parent."""
    cell = kernel.run("import os\nchild = os.fork()\nprint('here', flush=True)")
    assert cell.status == "ok"
    kernel.wait(lambda: cell.stdout.count("here") == 2, "both", SLOW)
    assert [kernel.run(f"{n} + 1").result for n in range(4)] == ["1", "2", "3", "4"]
    assert kernel.run("os.waitpid(child, 0)[1]").result == "0"


# --- bombs ---

CROWD = 100
"""Processes from which on a machine of one processor is crowded."""


def agent_answers(kernel: Kernel) -> float:
    """Seconds until the agent told what the machine uses."""
    began = time.monotonic()
    while time.monotonic() - began < SLOW:
        reply = kernel.request("usage_request", channel="control", seconds=SLOW).reply
        if "(" not in reply["hostname"]:  # "(does not answer)": it has five seconds
            return time.monotonic() - began
    pytest.fail(f"the agent did not answer within {SLOW:g} s")


FACTS = (
    "import json, os\n"
    "print(json.dumps([open('/proc/sys/kernel/random/boot_id').read(), open('kept').read(),"
    " sum(os.stat(f'/proc/{p}').st_uid == os.getuid()"
    " for p in os.listdir('/proc') if p.isdigit())]))"
)


def mark(kernel: Kernel) -> str:
    """Something by which the VM is known again, and its identity."""
    code = "with open('kept', 'w') as file: _ = file.write('words')\n" + FACTS
    boot_id, _, _ = value(kernel, code)
    return str(boot_id)


def bring_down(kernel: Kernel, code: str, *, ends: bool) -> None:
    """Run a bomb, see the agent answer, then have the guest kernel replaced.

    ``ends``: the cell is over while its bomb goes on; else it runs until it is interrupted, twice
    if need be, as the notebook says.
    """
    boot_id = mark(kernel)
    cell = kernel.send(code, allow_stdin=False)
    if ends:
        kernel.finish(cell, SLOW)
        kernel.listen(1.0)
    else:
        kernel.wait_output(cell, "begin")
        kernel.listen(2.0)
    assert agent_answers(kernel) < SLOW
    if ends:
        cell = kernel.send("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    else:
        kernel.interrupt()
    warned = False
    deadline = time.monotonic() + 2 * SLOW
    while not cell.done:
        assert time.monotonic() < deadline, cell
        kernel.take(0.5)
        if not warned and "Interrupt it once more" in cell.stderr:
            warned = True
            kernel.interrupt()
    assert cell.status == "error"
    if cell.error["ename"] == "VmGuestError":
        assert "the VM's files are still there" in cell.error["evalue"]
    else:  # the interrupt was enough for the cell; not for what it has started
        end = kernel.run("import os; os._exit(1)", seconds=SLOW)
        assert end.error["ename"] == "VmGuestError"
    alive(kernel, boot_id)


def alive(kernel: Kernel, boot_id: str) -> None:
    """The kernel answers in the same VM, and is alone there with its clerk at most."""
    same, kept, processes = value(kernel, FACTS)
    assert (same, kept) == (boot_id, "words")
    assert processes <= 2


def test_descriptors_run_out_for_the_cell_only(kernel: Kernel) -> None:
    boot_id = mark(kernel)
    cell = kernel.run("import os\nheld = []\nwhile True: held.append(os.open('/', os.O_RDONLY))")
    assert cell.error["ename"] == "OSError"
    assert "Too many open files" in cell.error["evalue"]
    assert kernel.run("for fd in held: os.close(fd)").status == "ok"
    alive(kernel, boot_id)


BACKGROUND = {
    "a fork bomb of the shell": (
        "import subprocess\n"
        "p = subprocess.Popen(['bash', '-c', ':(){ :|:& };:'], start_new_session=True)"
    ),
    "two hundred busy loops": (
        "import subprocess\n"
        "busy = ['bash', '-c', 'for i in {1..200}; do while :; do :; done & done; wait']\n"
        "p = subprocess.Popen(busy, start_new_session=True)"
    ),
    "a storm of orphans": (
        "import os\n"
        "for _ in range(4):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        while True:\n"
        "            try:\n"
        "                if os.fork() == 0:\n"
        "                    if os.fork() == 0: os._exit(0)\n"
        "                    os._exit(0)\n"
        "                os.wait()\n"
        "            except OSError: pass\n"
    ),
    "processes that hear no signal": (
        "import subprocess\n"
        "deaf = 'trap \"\" INT TERM HUP QUIT; while :; do sleep 1; done'\n"
        "p = [subprocess.Popen(['setsid', '-f', 'bash', '-c', deaf]) for _ in range(5)]"
    ),
    "hogs of memory": (
        "import subprocess, sys\n"
        "hog = 'x = []\\nwhile True: x.append(b\"x\" * 4096)'\n"
        "p = [subprocess.Popen([sys.executable, '-c', hog], start_new_session=True)\n"
        "     for _ in range(3)]"
    ),
}
FOREGROUND = {
    "a fork bomb of Python": (
        "import os\nprint('begin', flush=True)\n"
        "while True:\n"
        "    try: os.fork()\n"
        "    except OSError: pass"
    ),
    "a bomb of threads": (
        "import threading, time\nprint('begin', flush=True)\n"
        "while True:\n"
        "    try: threading.Thread(target=time.sleep, args=[300], daemon=True).start()\n"
        "    except RuntimeError: pass"
    ),
    "just too little memory": (
        "import mmap, time\nprint('begin', flush=True)\n"
        "held = []\n"
        "while True:\n"
        "    free = int(open('/proc/meminfo').read().split()[7])\n"
        "    if free < 5000: time.sleep(0.02)\n"
        "    else:\n"
        "        held.append(mmap.mmap(-1, 1 << 18))\n"
        "        held[-1].write(b'x' * (1 << 18))"
    ),
}


@pytest.mark.parametrize("bomb", BACKGROUND)
def test_the_agent_answers_beside(kernel: Kernel, bomb: str) -> None:
    bring_down(kernel, BACKGROUND[bomb], ends=True)


@pytest.mark.parametrize("bomb", FOREGROUND)
def test_the_agent_answers_and_interrupts(kernel: Kernel, bomb: str) -> None:
    bring_down(kernel, FOREGROUND[bomb], ends=False)


def test_all_places_in_memory_full_leave_room_for_a_kernel(kernel: Kernel) -> None:
    """What lies in them outlives who wrote it."""
    boot_id = mark(kernel)
    filled = value(
        kernel,
        "import json, os\n"
        "filled = []\n"
        "for place in ('/run/lock', '/dev/shm'):\n"
        "    try:\n"
        "        with open(place + '/full', 'wb', buffering=0) as file:\n"
        "            while True: file.write(bytes(1 << 20))\n"
        "    except OSError as error: filled.append(error.errno)\n"
        "filled.append(os.path.getsize('/run/lock/full'))\n"
        "print(json.dumps(filled))",
    )
    assert filled[:2] == [ENOSPC, ENOSPC]
    assert filled[2] <= RUN_SIZE
    eat = "held = []\nwhile True: held.append(bytes(1 << 20).replace(b'\\0', b'x'))"
    cell = kernel.run(eat, seconds=SLOW)
    assert cell.error["ename"] == "VmGuestError"
    assert "out of memory" in cell.error["evalue"]
    assert "VMKERNEL_MEMORY" in cell.traceback
    alive(kernel, boot_id)
    assert kernel.run("import os; os.remove('/run/lock/full'); os.remove('/dev/shm/full')"
                      ).status == "ok"  # fmt: skip


def test_no_memory_is_lost_that_no_process_holds(kernel: Kernel) -> None:
    """System V's segments and queues stay when their maker is gone."""
    boot_id = mark(kernel)
    made = value(
        kernel,
        """
import ctypes, json, os
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
segment = libc.shmget(0, 50 << 20, 0o1600)
ctypes.memset(libc.shmat(segment, None, 0), 1, 50 << 20)
queues = 0
message = ctypes.create_string_buffer(16384)
message[0] = 1
while (queue := libc.msgget(0, 0o1600)) >= 0:
    queues += 1
    while libc.msgsnd(queue, message, 8000, 0o4000) == 0: pass
print(json.dumps([segment >= 0, queues]))
""",
    )
    assert made[0]
    assert 1 <= made[1] <= 64
    kernel.run("import os; os._exit(1)")
    left = value(
        kernel,
        "import json\nprint(json.dumps(sum(1 for line in open('/proc/sysvipc/shm')) - 1))",
    )
    assert left == 0
    alive(kernel, boot_id)


def test_a_full_disk_keeps_no_new_kernel_from_starting(kernel: Kernel) -> None:
    boot_id = mark(kernel)
    cell = kernel.run(
        "import os, shutil\n"
        "free = shutil.disk_usage('.').free\n"
        "with open('full', 'wb', buffering=0) as file:\n"
        "    try:\n"
        "        os.posix_fallocate(file.fileno(), 0, free - (1 << 20))\n"
        "        file.seek(0, 2)\n"
        "        while True: file.write(bytes(1 << 16))\n"
        "    except OSError as error: print(error.errno)",
        seconds=SLOW,
    )
    assert cell.stdout == f"{ENOSPC}\n"
    cell = kernel.run("import os; os._exit(1)", seconds=SLOW)
    assert cell.error["ename"] == "VmGuestError"
    alive(kernel, boot_id)
    assert kernel.run("import os; os.remove('full')").status == "ok"


LIAR = """
import os
for fd in range(3, 64):
    try:
        if "pipe" in os.readlink(f"/proc/self/fd/{fd}"):
            os.set_blocking(fd, False)
            os.write(fd, b"[" * 60000)
    except OSError:
        pass
os._exit(0)
"""


def test_a_new_kernel_that_lies_about_itself_costs_its_vm(kernel: Kernel) -> None:
    """The user's own packages are looked at before it is ready: code of his, with its pipe open.

    The agent outlives the nonsense and says what happened; the VM is given up, and the next cell
    has a new one.  (Last here, for that reason.)
    """
    boot_id = mark(kernel)
    kernel.run(
        "import os, site\n"
        "place = site.getusersitepackages()\n"
        f"with open(place + '/liar.py', 'w') as file: _ = file.write({LIAR!r})\n"
        "with open(place + '/liar.pth', 'w') as file: _ = file.write('import liar\\n')"
    )
    kernel.run("import os; os._exit(1)", seconds=SLOW)
    cell = kernel.run("1 + 1", seconds=SLOW)
    if cell.status == "error":  # who asks while the start fails is told of it
        assert "it did not say how it is" in cell.error["evalue"]
    assert kernel.run("1 + 1", seconds=SLOW).result == "2"
    code = "import json\nprint(json.dumps(open('/proc/sys/kernel/random/boot_id').read()))"
    assert value(kernel, code) != boot_id
