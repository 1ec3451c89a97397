"""What a QEMU that was broken out of would try: run in its place, by the system's own Python.

A program by itself, of the standard library alone; ``test_wall.py`` starts it as QEMU is started,
behind the wall and without.  Its one argument is JSON: what there is to be attacked.  It writes
JSON to the descriptor ``answer``: for each attack whether it went well, and what was seen.
"""

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import resource
import signal
import socket
import struct
import sys

target = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
attacks = {}


def open_descriptors():
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own
    return found


GIVEN = open_descriptors()


def attack(function):
    attacks[function.__name__] = function
    return function


def call(number, *arguments):
    """A system call by its number; raises OSError."""
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def read(path):
    with open(path, "rb") as file:
        return file.read(64)


# --- files of the host ---


@attack
def read_the_home():
    return os.listdir(target["home"])


@attack
def read_a_private_key():
    return read(target["home"] + "/.ssh/id_ed25519")


@attack
def read_the_passwords():
    return read("/etc/shadow")


@attack
def read_the_users():
    return read("/etc/passwd")


@attack
def list_tmp():
    return target["mark"] in os.listdir("/tmp")


@attack
def list_run():
    return os.listdir("/run")


@attack
def list_the_cache():
    return "manifest.json" in os.listdir(target["template"])


@attack
def read_the_manifest():
    return read(target["template"] + "/manifest.json")


@attack
def read_another_vms_log():
    return read(target["log"])


# --- the template and the image ---


def write_through(fd):
    """Whether a byte of the file can be changed by this descriptor, in any way."""
    try:
        return os.pwrite(fd, b"!", 0) == 1
    except OSError:
        with mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as shared:
            shared[0] = 33
            return True


@attack
def write_the_ram():
    return write_through(os.open(target["ram"], os.O_RDWR))


@attack
def write_the_ram_by_a_reading_descriptor():
    fd = os.open(target["ram"], os.O_RDONLY)
    for reopened in (fd, *[int(name) for name in os.listdir("/proc/self/fd")]):
        try:
            if not os.readlink(f"/proc/self/fd/{reopened}").endswith("/ram"):
                continue
        except OSError:
            continue
        with contextlib.suppress(OSError):
            os.fchmod(reopened, 0o666)
        try:
            return write_through(os.open(f"/proc/self/fd/{reopened}", os.O_RDWR))
        except OSError:
            continue
    return False


@attack
def cut_the_ram():
    os.truncate(target["ram"], 4096)
    return True


@attack
def date_the_ram_back():
    os.utime(target["ram"], (0, 0))
    return True


@attack
def make_the_ram_writable():
    os.chmod(target["ram"], 0o666)
    return True


@attack
def write_the_root_image():
    os.chmod(target["rootfs"], 0o666)
    return write_through(os.open(target["rootfs"], os.O_RDWR))


@attack
def remove_the_template():
    os.rename(target["template"] + "/state", target["template"] + "/gone")
    return True


@attack
def link_the_ram_elsewhere():
    os.link(target["ram"], target["home"] + "/ram")
    return True


# --- the network ---


@attack
def connect_to_the_host():
    with socket.create_connection(("127.0.0.1", target["port"]), 2):
        return True


@attack
def connect_to_an_abstract_socket():
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("\0" + target["abstract"])
        return True


@attack
def connect_to_a_named_socket():
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(target["socket"])
        return True


@attack
def open_a_netlink_socket():
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()
    return True


@attack
def send_a_datagram():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return sock.sendto(b"!", ("127.0.0.1", target["port"]))


# --- other processes ---


@attack
def see_processes():
    return str(target["pid"]) in os.listdir("/proc")


@attack
def signal_a_process():
    os.kill(target["pid"], signal.SIGCONT)
    return True


@attack
def read_an_environment():
    return b"SECRET" in read(f"/proc/{target['pid']}/environ")


@attack
def read_anothers_memory():
    with open(f"/proc/{target['pid']}/mem", "rb", 0) as memory:
        memory.seek(target["address"])
        return memory.read(8)


@attack
def read_anothers_memory_by_a_call():
    buffer = ctypes.create_string_buffer(8)
    local = struct.pack("QQ", ctypes.addressof(buffer), 8)
    remote = struct.pack("QQ", target["address"], 8)
    return call(310, target["pid"], local, 1, remote, 1, 0)  # process_vm_readv


@attack
def trace_a_process():
    call(101, 0x4206, target["pid"], 0, 0)  # PTRACE_SEIZE
    return True


@attack
def take_a_pidfd():
    os.close(os.pidfd_open(target["pid"]))
    return True


@attack
def start_a_process():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return True


@attack
def run_a_setuid_program():
    import subprocess

    done = subprocess.run([target["setuid"], "-u"], stdout=subprocess.PIPE)
    return done.stdout.strip() == b"0"


# --- privileges, namespaces, and the kernel's corners ---


@attack
def become_root():
    os.setuid(0)
    return os.getuid() == 0


@attack
def mount_something():
    if libc.mount(b"none", b"/mnt", b"tmpfs", 0, None):
        raise OSError(ctypes.get_errno(), "mount")
    libc.umount2(b"/mnt", 2)
    return True


@attack
def leave_for_another_user_namespace():
    # In a child where there can be one, as there is no way back
    code = "import os,ctypes,sys; sys.exit(ctypes.CDLL(None).unshare(0x10000000) != 0)"
    return os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-I", "-S", "-c", code]) == 0


@attack
def write_a_sysctl():
    path = "/proc/sys/kernel/core_pattern"
    with open(path, "r+b", 0) as file:
        file.write(file.read())
    return True


@attack
def look_into_sys():
    return os.listdir("/sys/class")


@attack
def open_another_device():
    return os.open("/dev/full", os.O_RDONLY)


@attack
def find_devices():
    return set(os.listdir("/dev")) - {"null", "urandom", "kvm"}


@attack
def load_bpf():
    return call(321, 0, struct.pack("IIII", 2, 4, 8, 1) + bytes(100), 72)  # BPF_MAP_CREATE


@attack
def keep_a_key():
    return call(248, b"user", b"vmkernel-test", b"secret", 6, -2)  # add_key, process keyring


@attack
def watch_performance():
    return call(298, struct.pack("IIQ", 1, 112, 0) + bytes(96), 0, -1, -1, 0)


@attack
def handle_page_faults():
    return call(323, 1)  # UFFD_USER_MODE_ONLY


@attack
def set_up_io_uring():
    return call(425, 4, ctypes.create_string_buffer(120))


@attack
def read_the_kernels_log():
    return call(103, 10, 0, 0) >= 0  # SYSLOG_ACTION_SIZE_BUFFER


@attack
def raise_a_limit():
    resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))
    return True


# --- filling the host up ---


@attack
def write_anywhere():
    """A file in some directory of its file system."""
    found = []
    for top, directories, _ in os.walk("/"):
        directories[:] = [name for name in directories if os.path.join(top, name) != "/proc"]
        if top.count("/") > 3:
            directories.clear()
        path = os.path.join(top, "vmkernel-test")
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            os.unlink(path)
            found.append(top)
            break
        except OSError:
            continue
    return found


@attack
def make_memory_files():
    os.close(os.memfd_create("x"))
    return True


@attack
def share_system_v_memory():
    return call(29, 0, 4096, 0o1600) >= 0  # shmget


@attack
def start_many_threads():
    import threading

    threading.stack_size(64 << 10)  # else the limit on memory comes first
    over = threading.Event()
    threads = [threading.Thread(target=over.wait, daemon=True) for _ in range(400)]
    started = 0
    try:
        for thread in threads:
            thread.start()
            started += 1
    except RuntimeError:
        pass
    over.set()
    return started == 400


# --- what it was given ---


@attack
def find_more_descriptors():
    mine = (0, 1, 2, *target["fds"])
    sealed = [f"/memfd:vmkernel-{name} (deleted)" for name in ("shim", "script", "absent")]
    names = ("/ram", "/rootfs", "/scratch.raw", *sealed)
    return {
        fd: there for fd, there in GIVEN.items() if fd not in mine and not there.endswith(names)
    }


@attack
def take_another_slot():
    fcntl.fcntl(target["slot"], 37, struct.pack("hhqqi", fcntl.F_WRLCK, 0, 7, 1, 0))  # F_OFD_SETLK
    return True


@attack
def give_its_slot_back():
    fcntl.fcntl(target["slot"], 37, struct.pack("hhqqi", fcntl.F_UNLCK, 0, 0, 1, 0))
    return True


@attack
def change_the_state():
    return write_through(target["state"])


@attack
def find_words_in_the_environment():
    return set(os.environ) - {"LC_ALL", "LD_LIBRARY_PATH", "LD_PRELOAD", "PWD", "LC_CTYPE"}


@attack
def learn_the_hosts_name():
    return os.uname().nodename == target["hostname"]


@attack
def leave_a_core_dump():
    return resource.getrlimit(resource.RLIMIT_CORE)[0]


results = {}
for name, function in attacks.items():
    try:
        seen = function()
        results[name] = [bool(seen), repr(seen)[:200]]
    except Exception as error:
        results[name] = [False, f"{type(error).__name__}: {error}"]
with os.fdopen(target["answer"], "w") as answer:
    json.dump(results, answer)
