"""What a cell sees is the guest; and what it can break there it breaks for itself only.

The second half is about the guest kernel's own death: it is told at once and by its cause, the next
cell works, and the VM's files are still there.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from kernel_client import Cell, Kernel

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

REPOSITORY = Path(__file__).resolve().parents[2]


def value(kernel: Kernel, code: str) -> str:
    """What the code prints, which runs without an error."""
    cell = kernel.run(code)
    assert cell.status == "ok", cell.traceback
    return cell.stdout.strip()


# --- what a cell sees ---


def test_the_kernel_is_the_guests(kernel: Kernel) -> None:
    ours = Path("/proc/version").read_text().strip()
    theirs = value(kernel, "print(open('/proc/version').read())")
    assert theirs.startswith("Linux version ")
    assert theirs != ours
    assert value(kernel, "import os; print(os.uname().nodename)") != os.uname().nodename
    assert "vmkernel" not in value(kernel, "print(open('/proc/1/comm').read())")
    machine = value(kernel, "print(open('/proc/cpuinfo').read())")
    assert machine.count("processor") == 1


def test_there_is_no_network(kernel: Kernel) -> None:
    assert value(kernel, "import os; print(os.listdir('/sys/class/net'))") == "['lo']"
    cell = kernel.run(
        "import socket\n"
        "for target in (('192.0.2.1', 80), ('10.0.2.2', 22), ('127.0.0.1', 22)):\n"
        "    try:\n        socket.create_connection(target, timeout=5)\n"
        "    except OSError as error:\n        print('refused')\n"
    )
    assert cell.stdout == "refused\n" * 3
    # Another way to the host that QEMU may offer; the device node is in Debian's kernel anyway.
    vsock = (
        "import socket\ns = socket.socket(socket.AF_VSOCK)\ns.settimeout(5)\n"
        "try:\n    s.connect((2, 1024))\nexcept OSError as error: print('refused')"
    )
    assert kernel.run(vsock).stdout == "refused\n" or kernel.run(vsock).status == "error"


def test_the_hosts_files_are_not_there(kernel: Kernel, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("xyzzy")
    for path in (secret, Path(__file__).resolve(), REPOSITORY / "pyproject.toml"):
        assert path.exists()
        cell = kernel.run(f"open({str(path)!r})")
        assert cell.error["ename"] == "FileNotFoundError", path
    # nor a mount, a block device or a shared directory that leads to them
    mounts = value(kernel, "print(open('/proc/mounts').read())")
    # sshfs waits for a workspace where only root may go, and nothing of the host's serves it
    lines = [line for line in mounts.splitlines() if " /run/vmkernel-workspace/" not in line]
    assert not re.search(r"9p|virtiofs|nfs|fuse|cifs", "\n".join(lines))
    assert kernel.run("open('/run/vmkernel-workspace/mount')").error["ename"] == "PermissionError"
    disks = value(kernel, "import os; print(sorted(os.listdir('/sys/block')))")
    assert set(re.findall(r"'(\D+?)\d*'", disks)) <= {"loop", "vda", "vdb", "ram", "zram"}


def test_the_hosts_environment_and_processes_are_not_there(kernel: Kernel) -> None:
    os_environ = value(kernel, "import os; print(dict(os.environ))")
    assert str(os.getpid()) not in value(
        kernel, "import os; print(os.environ.get('JPY_PARENT_PID'))"
    )
    for name in ("VMKERNEL_", "JUPYTER_", "PYTEST_"):
        assert name not in os_environ
    commands = value(
        kernel,
        "import glob\n"
        "for path in glob.glob('/proc/[0-9]*/cmdline'):\n"
        "    print(open(path).read().replace('\\0', ' '))",
    )
    assert "qemu" not in commands
    assert "pytest" not in commands


def test_cells_run_as_an_ordinary_user(kernel: Kernel) -> None:
    assert value(kernel, "import os; print(os.getresuid(), os.getresgid())") == (
        "(1000, 1000, 1000) (1000, 1000, 1000)"
    )
    assert value(kernel, "import os; print(os.getgroups())") in ("[]", "[1000]")
    assert value(kernel, "import getpass, os; print(getpass.getuser(), os.getcwd())") == (
        "user /home/user"
    )
    capabilities = value(
        kernel,
        "for line in open('/proc/self/status'):\n"
        "    if line.startswith(('CapPrm', 'CapEff', 'CapAmb')): print(int(line.split()[1], 16))",
    )
    assert capabilities.split() == ["0", "0", "0"]
    for code in ("os.setuid(0)", "os.sethostname" if False else "os.chown('/etc/passwd', 1000, 0)"):
        assert kernel.run(f"import os; {code}").error["ename"] == "PermissionError"


AGENT = {
    "kill": "os.kill(1, 9)",
    "terminate": "os.kill(1, 15)",
    "memory": "open('/proc/1/mem', 'rb')",
    "environment": "open('/proc/1/environ', 'rb').read()",
    "descriptors": "os.listdir('/proc/1/fd')",
    "root directory": "os.listdir('/proc/1/root')",
    "console": "open('/dev/console', 'wb')",
    "serial port": "open('/dev/ttyS0', 'wb')",
    "memory of the machine": "open('/dev/mem', 'rb')",
    "disk": "open('/dev/vda', 'rb')",
    "its code": "open('/run/vmkernel/vmkernel/guest/agent.py', 'a')",
    "its place": "os.rename('/run/vmkernel', '/run/other')",
}


@pytest.mark.parametrize("what", AGENT)
def test_the_agent_is_out_of_reach(kernel: Kernel, what: str) -> None:
    cell = kernel.run(f"import os\n{AGENT[what]}")
    assert cell.error["ename"] == "PermissionError"
    assert kernel.run("1 + 1").result == "2"


def test_the_agent_cannot_be_traced(kernel: Kernel) -> None:
    attach = "import ctypes; ctypes.CDLL(None, use_errno=True).ptrace({}, 1, 0, 0)"
    for request in (16, 0x4206):  # PTRACE_ATTACH, PTRACE_SEIZE
        assert kernel.run(attach.format(request)).result == "-1"


def test_the_agents_port_is_out_of_reach(kernel: Kernel) -> None:
    """Neither to be opened nor inherited: what comes through it the host takes for the agent's."""
    open_all = (
        "import glob\n"
        "for path in glob.glob('/dev/vport*'):\n"
        "    try: open(path, 'rb')\n"
        "    except OSError as error: print(type(error).__name__)"
    )
    assert set(value(kernel, open_all).split()) == {"PermissionError"}
    inherited = value(
        kernel,
        "import os\n"
        "for fd in os.listdir('/proc/self/fd'):\n"
        "    try: print(fd, os.readlink(f'/proc/self/fd/{fd}'))\n"
        "    except OSError: pass",
    )
    assert len(re.findall("vport", inherited)) == 2, inherited  # the kernel's own two
    assert "console" not in inherited
    child = value(kernel, "import subprocess\n"
                          "print(subprocess.run('ls -l /proc/self/fd', shell=True, "
                          "capture_output=True, text=True).stdout)")  # fmt: skip
    assert "vport" not in child


def test_a_forged_message_ends_the_vm_at_most(kernel: Kernel) -> None:
    """The kernel's port is the user's own: nonsense on it costs the user's own VM."""
    cell = kernel.run(
        "import os\n"
        "for fd in os.listdir('/proc/self/fd'):\n"
        "    try: target = os.readlink(f'/proc/self/fd/{fd}')\n"
        "    except OSError: continue\n"
        "    if 'vport' in target: os.write(int(fd), b'\\xff' * 64)"
    )
    assert cell.error["ename"] == "VmGuestError"
    assert "state is lost" in cell.error["evalue"]
    assert kernel.run("1 + 1").result == "2"


# --- the death of the guest kernel ---

LOST = "The variables are lost; the VM's files are still there"


def run_fatal(kernel: Kernel, code: str) -> Cell:
    """Run a cell that kills the guest kernel, and see that the next one works in the same VM."""
    boot = value(kernel, "print(open('/proc/sys/kernel/random/boot_id').read())\n"
                         "held = 1\nwith open('kept', 'w') as f: _ = f.write('words')")  # fmt: skip
    cell = kernel.run(code)
    assert cell.status == "error"
    assert cell.error["ename"] == "VmGuestError"
    assert LOST in cell.error["evalue"]
    assert cell.reply["ename"] == "VmGuestError"
    following = kernel.run(
        "print('held' in globals(), open('kept').read(), "
        "open('/proc/sys/kernel/random/boot_id').read())"
    )
    assert following.status == "ok"
    assert following.stdout.split() == ["False", "words", boot]
    assert following.reply["execution_count"] == 1
    assert kernel.run("import os; os.getuid()").result == "1000"
    return cell


def test_os_exit(kernel: Kernel) -> None:
    cell = run_fatal(kernel, "import os; os._exit(7)")
    assert "exit status 7" in cell.error["evalue"]
    assert "os._exit" in cell.traceback


def test_os_exit_with_success_is_a_death_too(kernel: Kernel) -> None:
    cell = run_fatal(kernel, "import os; print('last words'); os._exit(0)")
    assert "exit status 0" in cell.error["evalue"]


def test_a_crash_in_native_code(kernel: Kernel) -> None:
    cell = run_fatal(kernel, "import ctypes; ctypes.string_at(0)")
    assert "SIGSEGV" in cell.error["evalue"]
    assert "string_at" in cell.error["evalue"]  # faulthandler's last words


def test_an_abort(kernel: Kernel) -> None:
    assert "SIGABRT" in run_fatal(kernel, "import os; os.abort()").error["evalue"]


def test_out_of_memory(kernel: Kernel) -> None:
    cell = run_fatal(
        kernel,
        "held = []\n"
        "while True:\n"
        "    held.append(b'x' * (16 << 20))",
    )  # fmt: skip
    assert "out of memory" in cell.error["evalue"]
    assert "VMKERNEL_MEMORY" in cell.traceback


def test_killing_everything_that_one_may(kernel: Kernel) -> None:
    cell = run_fatal(kernel, "import os, signal\nos.kill(-1, 9); os.kill(os.getpid(), 9)")
    assert "SIGKILL" in cell.error["evalue"]


def test_a_fork_bomb_of_sleepers_is_survived(kernel: Kernel) -> None:
    """Children that outlive the guest kernel do not keep the next one from running."""
    run_fatal(
        kernel,
        "import os, time\n"
        "for _ in range(20):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid(); time.sleep(300); os._exit(0)\n"
        "os._exit(1)",
    )
    kernel.run("import os; os.kill(-1, 9)")
    assert kernel.run("1 + 1").result == "2"


def test_queued_cells_do_not_run_on_a_lost_state(kernel: Kernel) -> None:
    fatal = kernel.send("import os, time; time.sleep(0.5); os._exit(1)")
    queued = [kernel.send("print('ran')") for _ in range(3)]
    assert kernel.finish(fatal).status == "error"
    for cell in queued:
        assert kernel.finish(cell).status == "aborted"
    assert kernel.run("print('after')").stdout == "after\n"


def test_a_death_between_cells_is_told_with_the_next(kernel: Kernel) -> None:
    kernel.run("import threading, os; threading.Timer(0.5, os._exit, [3]).start(); held = 1")
    kernel.listen(2)
    cell = kernel.run("print('held' in globals())")
    assert cell.stdout == "False\n"
    assert "exit status 3" in cell.stderr
    assert "variables are lost" in cell.stderr


def test_output_before_the_death_is_not_lost(kernel: Kernel) -> None:
    cell = kernel.run("import os\nprint('seen', flush=True)\nos._exit(1)")
    assert cell.stdout == "seen\n"
    cell = kernel.run("import os\nfor i in range(9): print(i, flush=True)\nos._exit(1)")
    assert cell.stdout == "".join(f"{i}\n" for i in range(9))


def test_an_interrupt_and_input_after_a_death(kernel: Kernel) -> None:
    kernel.run("import os; os._exit(1)")
    cell = kernel.send("print('begin')\nwhile True: pass")
    kernel.wait_output(cell, "begin")
    kernel.interrupt()
    assert kernel.finish(cell).error["ename"] == "KeyboardInterrupt"
    cell = kernel.send("input('? ')", allow_stdin=True)
    kernel.wait_question(cell)
    kernel.raw.input("typed")
    assert kernel.finish(cell).result == "'typed'"


def test_a_full_disk_is_the_cells_error(kernel: Kernel) -> None:
    cell = kernel.run(
        "import os\n"
        "with open('big', 'wb') as f:\n"
        "    os.posix_fallocate(f.fileno(), 0, 64 << 30)"
    )  # fmt: skip
    assert cell.error["ename"] == "OSError"
    assert kernel.run("import os; os.remove('big'); 1 + 1").result == "2"


def test_modules_are_looked_for_in_a_plain_kernels_order(kernel: Kernel) -> None:
    """The library, the working directory, the user's own packages, the image's."""
    code = "import json, site, sys; print(json.dumps([sys.path, site.getusersitepackages()]))"
    path, user_site = json.loads(kernel.run(code).stdout)
    assert path[-1].endswith("dist-packages")
    assert user_site in path
    here = path.index("")
    assert all("-packages" not in entry for entry in path[:here])
    assert all("-packages" in entry for entry in path[here + 1 :])
    assert path[here + 1] == user_site
    assert not any("vmkernel" in entry for entry in path)


def test_a_cell_that_kills_its_kernel_at_once_was_shown_as_input(kernel: Kernel) -> None:
    """execute_input comes before the error, also when the guest had no time to say it."""
    code = "import os; os._exit(1)"
    cell = kernel.run(code)
    assert cell.types == ["execute_input", "error"]
    (content,) = cell.contents("execute_input")
    assert content["code"] == code
    assert content["execution_count"] > 0
