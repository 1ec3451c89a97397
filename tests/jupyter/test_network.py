"""What a notebook does with a network: packages, downloads, connections, and what it is told."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from kernel_client import Kernel, StartKernel

from network_rig import PASSWORD, USER, PackageIndex, Web, say
from vmkernel.host import reaper
from vmkernel.settings import load_settings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

MIB = 1 << 20
BY_THE_PROXY = """
import os, urllib.request
os.environ.pop("no_proxy", None), os.environ.pop("NO_PROXY", None)  # 127.0.0.1 is the host's here
def get(path, data=None):
    return urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", data, timeout=60)
"""


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    block = bytes(MIB)

    def respond(handler: Any) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        if handler.path == "/large":
            handler.send_response(200)
            handler.send_header("Content-Length", handler.headers["X-Size"])
            handler.end_headers()
            for _ in range(int(handler.headers["X-Size"]) // MIB):
                handler.wfile.write(block)
        elif handler.path.startswith("/slow"):
            time.sleep(0.5)
            say(handler, 200, handler.path.encode())
        else:
            say(handler, 200, str(len(body)).encode())

    found = Web(respond)
    yield found
    found.close()


@pytest.fixture(scope="module")
def index() -> Iterator[PackageIndex]:
    found = PackageIndex()
    yield found
    found.close()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("network") / "stderr"


@pytest.fixture(scope="module")
def kernel(
    small_spec: str, start_kernel: StartKernel, web: Web, index: PackageIndex, log: Path
) -> Iterator[Kernel]:
    """One with packages, and one server by its address."""
    with log.open("w") as stderr:
        env = {"VMKERNEL_NETWORK": "allow", "VMKERNEL_NETWORK_ALLOW": f"127.0.0.1:{web.port}"}
        env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": index.url, "PIP_FIND_LINKS": ""}
        with start_kernel(small_spec, env=env, stderr=stderr) as kernel:
            cell = kernel.run(f"PORT = {web.port}\n{BY_THE_PROXY}")
            assert cell.status == "ok", cell.traceback
            yield kernel


def proxy_of(kernel: Kernel) -> psutil.Process:
    """The process of its proxy: the last of the chain."""
    found = [process for process in psutil.Process(kernel.pid).children(recursive=True)
             if any(word.endswith("run_proxy.py") for word in process.cmdline())]  # fmt: skip
    return found[-1]


def test_nothing_runs_until_the_network_is_used(kernel: Kernel) -> None:
    with pytest.raises(IndexError):
        proxy_of(kernel)


def test_clients_of_all_kinds(kernel: Kernel) -> None:
    code = """
import shutil, subprocess
print(get("/").status, get("/", bytes(3 << 20)).read())
from pip._vendor import requests
print(requests.post(f"http://127.0.0.1:{PORT}/x", data=b"12345").text)
if shutil.which("curl"):
    print(subprocess.run(["curl", "-sS", f"http://127.0.0.1:{PORT}/"], capture_output=True).stdout)
"""
    cell = kernel.run(code)
    assert cell.status == "ok", cell.traceback
    assert cell.stdout.splitlines()[:2] == [f"200 b'{3 << 20}'", "5"]


def test_a_refusal_is_told_in_the_cell_and_in_the_log(kernel: Kernel, log: Path) -> None:
    cell = kernel.run("get('/'); urllib.request.urlopen('http://evil.example/data.csv')")
    assert cell.error["ename"] == "HTTPError"
    assert "evil.example:80 refused" in cell.error["evalue"]
    kernel.wait(lambda: "evil.example" in cell.stderr, "the news")
    assert "vmkernel: network: evil.example:80 refused: it is not in network_allow" in cell.stderr
    assert "VMKERNEL_NETWORK_ALLOW=127.0.0.1:" in cell.stderr
    assert "evil.example:80 refused" in log.read_text()
    logs = Path(os.environ["VMKERNEL_STATE_DIR"]) / "logs"
    assert any("evil.example:80" in path.read_text() for path in logs.glob("*/network.log"))
    # A thread that scans does not flood the notebook
    cell = kernel.run(
        "for n in range(40):\n"
        "    try: urllib.request.urlopen(f'http://h{n}.example/')\n"
        "    except OSError: pass"
    )
    kernel.listen(0.5)
    assert 1 <= cell.stderr.count("vmkernel: network:") <= 25


def test_pip_install_in_a_cell(kernel: Kernel, index: PackageIndex) -> None:
    cell = kernel.run("%pip install --no-input vmkpkg\nimport vmkpkg\nprint(vmkpkg.ANSWER)")
    assert cell.status == "ok", cell.traceback + cell.stdout + cell.stderr
    assert cell.stdout.splitlines()[-1] == "42"
    assert "a restart begins a new VM" in cell.stdout
    assert len([line for line, _ in index.requests if ".whl" in line]) == 1
    # The index's password is the host's
    code = "import subprocess; print(dict(os.environ)); print(open('/proc/self/environ').read())"
    said = kernel.run(code).stdout
    assert PASSWORD not in said + cell.stdout + cell.stderr
    assert USER not in said
    assert "http://packages.vmkernel/simple/" in said


def test_fifty_connections_at_once(kernel: Kernel) -> None:
    code = """
import concurrent.futures
with concurrent.futures.ThreadPoolExecutor(50) as pool:
    said = list(pool.map(lambda n: get(f"/slow{n}").read().decode(), range(50)))
print(said == [f"/slow{n}" for n in range(50)])
"""
    cell = kernel.run(code)
    assert cell.stdout == "True\n", cell.traceback


def test_a_large_download_takes_no_memory(kernel: Kernel, rounds: Callable[..., int]) -> None:
    megabytes = rounds(quick=32, full=100)
    process = proxy_of(kernel)
    before = process.memory_info().rss
    cell = kernel.send(
        f"SIZE = {megabytes * MIB}"
        + """
import time
began, size = time.perf_counter(), 0
wanted = urllib.request.Request(f"http://127.0.0.1:{PORT}/large", headers={"X-Size": str(SIZE)})
with urllib.request.urlopen(wanted) as response:
    while data := response.read(1 << 20):
        size += len(data)
        if size == 4 << 20:
            time.sleep(1)
print(size, time.perf_counter() - began)
"""
    )
    most = 0
    while not cell.done:
        kernel.take(0.1)
        most = max(most, process.memory_info().rss)
    size, seconds = map(float, cell.stdout.split())
    print(f"{megabytes} MiB in {seconds:.1f} s; proxy {before >> 20} MiB, at most {most >> 20} MiB")
    assert size == megabytes * MIB
    assert most - before < 16 << 20


def test_a_new_guest_kernel_has_network_and_packages(kernel: Kernel, web: Web) -> None:
    dead = kernel.run("import os; os._exit(3)")
    assert dead.error["ename"] == "VmGuestError"
    cell = kernel.run(f"PORT = {web.port}\n{BY_THE_PROXY}\nimport vmkpkg\nprint(get('/').status)")
    assert cell.stdout == "200\n", cell.traceback


def test_a_proxy_that_is_killed_is_replaced(kernel: Kernel) -> None:
    process = proxy_of(kernel)
    process.kill()
    psutil.wait_procs([process], 10)
    kernel.listen(2)
    cell = kernel.run("print(get('/').status)")
    assert cell.stdout == "200\n", cell.traceback
    assert proxy_of(kernel).pid != process.pid


def test_the_tunnel_of_the_documentation(kernel: Kernel, web: Web) -> None:
    page = (Path(__file__).parents[2] / "docs" / "network.md").read_text()
    code = page.split("```python\n")[1].split("```")[0].partition("port = tunnel(")[0]
    cell = kernel.run(f"""{code}
port = tunnel("127.0.0.1", {web.port})
import http.client
client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
client.request("POST", "/", b"12345")
print(client.getresponse().read())
""")
    assert cell.stdout == "b'5'\n", cell.traceback


def test_what_vm_shows(kernel: Kernel) -> None:
    shown = kernel.run("%vm").stdout
    assert "allow (packages, 127.0.0.1:" in shown


def test_an_entry_that_opens_nothing_is_told(small_spec: str, start_kernel: StartKernel) -> None:
    env = {"VMKERNEL_NETWORK": "allow", "VMKERNEL_NETWORK_ALLOW": "*.com"}
    with start_kernel(small_spec, env=env) as kernel:
        cell = kernel.run("1")
        assert "network_allow" in cell.error["evalue"]
        assert "top-level domain" in cell.error["evalue"]


def test_sigkill_of_the_kernel_leaves_no_proxy(
    small_spec: str, start_kernel: StartKernel, index: PackageIndex
) -> None:
    env = {"VMKERNEL_NETWORK": "packages", "PIP_CONFIG_FILE": os.devnull}
    with start_kernel(small_spec, env={**env, "PIP_INDEX_URL": index.url}) as kernel:
        code = "import urllib.request as u; u.urlopen('http://packages.vmkernel/simple/vmkpkg/')"
        assert kernel.run(code).status == "ok"
        chain = [process for process in psutil.Process(kernel.pid).children(recursive=True)
                 if any("run_proxy.py" in word for word in process.cmdline())]  # fmt: skip
        assert chain
        os.kill(kernel.pid, signal.SIGKILL)
        assert not psutil.wait_procs(chain, 10)[1]
    reaper.sweep(load_settings())  # as the next start of a VM would


def test_a_real_package_from_this_machines_index(
    small_spec: str, start_kernel: StartKernel, tmp_path: Path
) -> None:
    words = ["pip", "download", "--no-deps", "--no-input", "-q", "-d", str(tmp_path), "six"]
    try:
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, timeout=60)
    except subprocess.TimeoutExpired:
        pytest.skip("the index that pip is configured for did not answer in 60 s")
    if done.returncode:
        pytest.skip(f"pip on this host finds no index: {done.stderr.decode()[-300:]}")
    with start_kernel(small_spec, env={"VMKERNEL_NETWORK": "packages"}) as kernel:
        cell = kernel.run("%pip install --no-input six\nimport six\nprint(six.__version__)")
        assert cell.status == "ok", cell.traceback + cell.stdout + cell.stderr
        assert ast.literal_eval(cell.stdout.splitlines()[-1].split(".")[0]) >= 1
        cell = kernel.run("import urllib.request as u; u.urlopen('https://pypi.org/simple/')")
        assert "refused" in cell.error["evalue"]  # the index, and nothing else
