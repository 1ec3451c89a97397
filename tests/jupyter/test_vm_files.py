"""``%vm put`` and ``%vm get``: what a person agreed to is copied, and nothing that nobody may."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_client import Cell, Kernel, StartKernel

from vmkernel.settings import load_settings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels' working directory on the host."""
    return tmp_path_factory.mktemp("notebooks")


def started(start: StartKernel, spec: str, here: Path, files: str) -> Iterator[Kernel]:
    env = {"VMKERNEL_FILES": files, "VMKERNEL_WORKSPACE": "none", "VMKERNEL_WORKSPACE_SIZE": "40M"}
    with start(spec, cwd=str(here), env=env) as kernel:
        kernel.run("import os, pathlib, hashlib; os.chdir('/home/user')")
        yield kernel


@pytest.fixture(scope="module")
def asks(small_spec: str, start_kernel: StartKernel, here: Path) -> Iterator[Kernel]:
    yield from started(start_kernel, small_spec, here, "ask")


@pytest.fixture(scope="module")
def copies(small_spec: str, start_kernel: StartKernel, here: Path) -> Iterator[Kernel]:
    yield from started(start_kernel, small_spec, here, "on")


def answered(kernel: Kernel, code: str, *answers: str) -> Cell:
    cell = kernel.send(code, allow_stdin=True)
    for number, answer in enumerate(answers, 1):
        kernel.wait_question(cell, number)
        kernel.raw.input(answer)
    return kernel.finish(cell)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- ask ---


def test_a_file_is_put_when_the_person_agrees(asks: Kernel, here: Path) -> None:
    (here / "data é.csv").write_text("a,b\n1,2\n")
    cell = answered(asks, "%vm put 'data é.csv'\nprint(open('data é.csv').read())", "y")
    (question,) = cell.questions
    assert question["content"]["prompt"] == (
        f"Copy '{here}/data é.csv' (8 bytes) from this host into the VM? [y/N] "
    )
    assert question["content"]["password"] is False
    assert "(8 bytes) is in the VM as '/home/user/data é.csv'" in cell.stdout
    assert cell.stdout.endswith("a,b\n1,2\n\n")


def test_a_result_is_got_when_the_person_agrees(asks: Kernel, here: Path) -> None:
    asks.run("_ = open('result.txt', 'w').write('42')")
    cell = answered(asks, "%vm get result.txt 'the result.txt'", "yes")
    assert cell.questions[0]["content"]["prompt"] == (
        f"Copy /home/user/result.txt (2 bytes) from the VM to '{here}/the result.txt' on this "
        "host? [y/N] "
    )
    assert (here / "the result.txt").read_text() == "42"


@pytest.mark.parametrize("word", ["", "n", "maybe"])
def test_after_a_no_the_cell_asks_no_more(asks: Kernel, here: Path, word: str) -> None:
    (here / "no.txt").write_text("no")
    code = "for i in range(3):\n    get_ipython().run_line_magic('vm', 'put no.txt')"
    cell = answered(
        asks, code.replace("    get", "    try: get", 1) + "\n    except Exception as e: print(e)",
        word,
    )  # fmt: skip
    assert len(cell.questions) == 1
    assert cell.stdout.count("was not agreed to") == 3
    assert asks.run("os.path.exists('no.txt')").result == "False"


def test_a_front_end_that_answers_nothing_is_told(asks: Kernel, here: Path) -> None:
    (here / "no.txt").write_text("no")
    cell = asks.run("%vm put no.txt", allow_stdin=False)
    assert cell.questions == []
    assert "this front end asks nobody" in cell.stderr
    assert "VMKERNEL_FILES=on" in cell.stderr


def test_the_guest_asks_after_us_and_gets_no_answer_of_ours(asks: Kernel, here: Path) -> None:
    (here / "own.txt").write_text("own")
    cell = asks.send(
        "import threading, time\n"
        "def ask():\n    time.sleep(1)\n    print('heard', input('really? '))\n"
        "t = threading.Thread(target=ask); t.start()\n"
        "%vm put own.txt\nt.join()",
        allow_stdin=True,
    )
    asks.wait_question(cell)
    asks.listen(2)
    assert len(cell.questions) == 1  # the thread's waits
    asks.raw.input("y")
    assert asks.wait_question(cell, 2)["prompt"] == "really? "
    asks.raw.input("no")
    asks.finish(cell)
    assert "own.txt (3 bytes) is in the VM" in cell.stdout
    assert "heard no" in cell.stdout


def test_while_the_guest_asks_we_do_not(asks: Kernel, here: Path) -> None:
    (here / "own.txt").write_text("own")
    cell = asks.send(
        "import threading\n"
        "def copy():\n"
        "    try: get_ipython().run_line_magic('vm', 'put own.txt trick')\n"
        "    except Exception as error: print('refused:', error)\n"
        "t = threading.Timer(3, copy); t.start()\n"
        "answer = input('continue? '); t.join(); print(answer, os.path.exists('trick'))",
        allow_stdin=True,
    )
    asks.wait_question(cell)
    asks.wait_output(cell, "refused: another question waits")
    asks.raw.input("y")
    asks.finish(cell)
    assert len(cell.questions) == 1
    assert cell.stdout.endswith("y False\n")


def test_an_answer_to_one_of_two_questions_of_the_guest_is_not_ours(
    asks: Kernel, here: Path
) -> None:
    """A client that names no question answers the guest's second one; we have not asked by then."""
    (here / "own.txt").write_text("own")
    cell = asks.send(
        "import threading, time\n"
        "def ask(n):\n"
        "    try: input(f'continue {n}? ')\n"
        "    except Exception: pass\n"
        "for n in (1, 2): threading.Thread(target=ask, args=(n,), daemon=True).start()\n"
        "time.sleep(6)\n"
        "try: get_ipython().run_line_magic('vm', 'put own.txt stolen')\n"
        "except Exception as error: print('refused:', error)\n"
        "print(os.path.exists('stolen'))",
        allow_stdin=True,
    )
    asks.wait_question(cell, 2)
    asks.raw.input("y")
    asks.wait(lambda: len(cell.questions) > 2 or cell.done, "what becomes of the put")
    asks.raw.input("y")  # to the guest's second question, which is still seen
    asks.finish(cell)
    assert "refused: another question waits" in cell.stdout
    assert cell.stdout.endswith("False\n")


def test_the_question_says_what_would_be_replaced(asks: Kernel, here: Path) -> None:
    (here / "report.ipynb").write_text("mine")
    asks.run("_ = open('report.ipynb', 'w').write('theirs')")
    cell = answered(asks, "%vm get --force report.ipynb", "n")
    assert (
        "report.ipynb on this host, in place of the file there?"
        in (cell.questions[0]["content"]["prompt"])
    )
    assert (here / "report.ipynb").read_text() == "mine"
    blank = "a\u3164to\u3164b"  # a letter that looks like a blank
    asks.run(f"_ = open('{blank}', 'w').write('x')")
    cell = answered(asks, f"%vm get {blank}", "n")
    assert f"/{blank}' on this host?" in cell.questions[0]["content"]["prompt"]


def test_who_may_not_read_is_not_told_what_there_is(asks: Kernel) -> None:
    asks.run("_ = open('x', 'w').write('x')")
    for there, none in (("put /etc/passwd", "put /etc/none"), ("get x /etc", "get x /none")):
        told = [asks.run(f"%vm {line}").stderr.splitlines()[0] for line in (there, none)]
        assert told[0].replace("/etc", "/none") == told[1].replace("/etc", "/none")


def test_stop_ends_the_question(asks: Kernel, here: Path) -> None:
    (here / "own.txt").write_text("own")
    cell = asks.send("%vm put own.txt late", allow_stdin=True)
    asks.wait_question(cell)
    asks.interrupt()
    asks.finish(cell)
    assert cell.error["ename"] == "KeyboardInterrupt"
    asks.raw.input("y")  # an answer to what is not asked any more
    assert asks.run("os.path.exists('late')").result == "False"


# --- on ---


def test_on_asks_nobody_below_the_directory(copies: Kernel, here: Path) -> None:
    (here / "sub").mkdir()
    (here / "sub" / "a").write_text("A")
    (here / "sub" / ".secret").write_text("S")
    (here / "sub" / "link").symlink_to("/etc/passwd")
    cell = copies.run("%vm put sub\n%vm get sub 'sub 2'\n%vm get sub/a a.txt")
    assert cell.questions == []
    assert cell.stdout.count("Left out: .secret, link") == 1
    assert names(here / "sub 2") == ["a"]
    assert (here / "a.txt").read_text() == "A"


def test_what_is_outside_asks_though(copies: Kernel, here: Path) -> None:
    outside = here.parent / "outside.txt"
    outside.write_text("far")
    (here / "way").symlink_to(here.parent)
    cell = answered(copies, "%vm put ../outside.txt\nopen('outside.txt').read()", "y")
    assert f"Copy {outside} (3 bytes)" in cell.questions[0]["content"]["prompt"]
    assert cell.result == "'far'"
    cell = copies.run("%vm put way/outside.txt again")
    assert "this front end asks nobody" in cell.stderr


@pytest.mark.parametrize(
    "name",
    [".ssh/id", ".env", "id_ed25519", "tls/server.KEY", "kernel-1.json", "/proc/self/environ"],
)
def test_secrets_stay_even_if_somebody_agreed(asks: Kernel, here: Path, name: str) -> None:
    path = here / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text("secret")
    cell = answered(asks, f"%vm put {name} got")
    assert "stays on the host: it may hold secrets" in cell.stderr
    assert asks.run("os.path.exists('got')").result == "False"


def test_our_own_and_jupyters_files_stay(asks: Kernel, here: Path) -> None:
    connection = Path(asks.manager.connection_file)
    places = (connection, connection.parent, load_settings().state_dir, Path("/"))
    for path in places:
        cell = answered(asks, f"%vm put {path} got")
        assert "stays on the host" in cell.stderr, path
        assert cell.questions == []


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../up", "not below the kernel's working directory"),
        ("/tmp/up", "not below the kernel's working directory"),
        ("~/up", "not below the kernel's working directory"),
        (".git/hooks/pre-commit", "keeps the name .git to itself"),
        ("__pycache__/x.pyc", "keeps the name __pycache__ to itself"),
        ("jupyter_server_config.py", "to itself"),
        ("way/in", "Not a directory"),
        ("none/in", "No such file"),
        ("a.txt", "is there already"),
    ],
)
def test_get_writes_nowhere_else(copies: Kernel, here: Path, name: str, why: str) -> None:
    (here / "a.txt").write_text("A")
    if not (here / "way").is_symlink():
        (here / "way").symlink_to(here.parent)
    before = sorted(map(str, here.parent.rglob("*")))
    cell = copies.run(f"_ = open('x', 'w').write('trap')\n%vm get x {name}")
    assert why in cell.stderr
    assert sorted(map(str, here.parent.rglob("*"))) == before
    assert (here / "a.txt").read_text() == "A"


def test_traps_in_a_directory_are_left_out(copies: Kernel, here: Path) -> None:
    cell = copies.run(
        "for name in ('repo/.git/hooks/pre-commit', 'repo/x.pth', 'repo/good'):\n"
        "    path = pathlib.Path(name); path.parent.mkdir(parents=True, exist_ok=True)\n"
        "    _ = path.write_text('x')\n"
        "os.symlink('/etc/passwd', 'repo/link')\n%vm get repo"
    )
    assert names(here / "repo") == ["good"]
    assert "Left out: " in cell.stdout


def test_force_replaces_a_file_and_a_link_not_what_it_leads_to(copies: Kernel, here: Path) -> None:
    victim = here.parent / "victim"
    victim.write_text("mine")
    (here / "l").symlink_to(victim)
    copies.run("_ = open('l', 'w').write('new')\n%vm get --force l")
    assert victim.read_text() == "mine"
    assert (here / "l").read_text() == "new"
    assert not (here / "l").is_symlink()
    (here / "d").mkdir()
    (here / "d" / "one").write_text("1")
    assert "is there already" not in copies.run("%vm put d").stderr
    (here / "d" / "one").write_text("2")
    assert "is there already" in copies.run("%vm put d").stderr
    copies.run("%vm put -f d")
    assert copies.run("open('d/one').read(), os.listdir('d')").result == "('2', ['one'])"


def test_without_asking_a_kernel_copies_so_much_and_no_more(copies: Kernel, here: Path) -> None:
    cell = copies.run("f = open('big', 'wb'); f.truncate(60 << 20); f.close()\n%vm get big")
    assert "without asking" in cell.stderr
    assert not (here / "big").exists()


def test_stop_leaves_a_part_that_is_gone_on_with(asks: Kernel, here: Path) -> None:
    data = os.urandom(1 << 20) * 64
    (here / "large.bin").write_bytes(data)
    found = "[]"
    for _ in range(5):
        cell = asks.send("%vm put --force large.bin", allow_stdin=True)
        asks.wait_question(cell)
        asks.raw.input("y")
        asks.wait(lambda cell=cell: "put large.bin" in cell.stderr or cell.done, "progress")  # type: ignore[misc]
        asks.interrupt()
        asks.finish(cell)
        found = asks.run("sorted(n for n in os.listdir() if n.startswith('large'))").result
        if found != "['large.bin']":  # else it was quicker than the interrupt
            break
        asks.run("os.remove('large.bin')")
    assert cell.error["ename"] == "KeyboardInterrupt"
    assert re.fullmatch(r"\['large.bin.[0-9a-f]{8}.part'\]", found), found
    cell = answered(asks, "%vm put large.bin", "y")
    assert re.search(r"\d MiB of it from before", cell.stdout), cell.stdout
    import hashlib

    code = "hashlib.sha256(open('large.bin', 'rb').read()).hexdigest()"
    assert asks.run(code).result == repr(hashlib.sha256(data).hexdigest())
    assert asks.run("[n for n in os.listdir() if n.endswith('part')]").result == "[]"


def test_wrong_words_are_explained(copies: Kernel) -> None:
    for line, words in (
        ("put", "takes one name or two"),
        ("put --wrong a", "there is no option '--wrong'"),
        ("put 'a", "No closing quotation"),
        ("get none.txt", "there is no such file"),
        ("put none.txt", "No such file"),
        ("get /dev/null", "neither a file nor a directory"),
    ):
        assert words in copies.run(f"%vm {line}").stderr, line
    cell = copies.run("get_ipython().run_line_magic('vm', 'get \\ud800')")  # no UTF-8
    assert cell.stderr or cell.error["ename"]
    assert copies.run("1 + 1").result == "2"


def test_off_is_off(small_spec: str, start_kernel: StartKernel, here: Path) -> None:
    with start_kernel(small_spec, cwd=str(here), env={"VMKERNEL_FILES": "off"}) as kernel:
        assert "%vm put is switched off here" in kernel.run("%vm put a.txt").stderr


def test_beside_a_workspace_that_can_only_be_read(
    small_spec: str, start_kernel: StartKernel, here: Path
) -> None:
    """The cell's directory is the host's: a put goes to the user's home, and says so."""
    (here / "side.txt").write_text("side")
    env = {"VMKERNEL_FILES": "on", "VMKERNEL_WORKSPACE": "ro"}
    with start_kernel(small_spec, cwd=str(here), env=env) as kernel:
        cell = kernel.run("import os\n%vm put side.txt\nos.getcwd(), open('side.txt').read()")
        assert "side.txt (4 bytes) is in the VM as /home/user/side.txt" in cell.stdout, cell.stderr
        assert cell.result == repr((str(here), "side"))
        cell = kernel.run("%vm put side.txt other.txt")
        assert "the guest's user may not do that" in cell.stderr
        cell = kernel.run("_ = open('/tmp/o', 'w').write('x')\n%vm get /tmp/o got.txt")
        assert (here / "got.txt").read_text() == "x"
        assert kernel.run("open('got.txt').read()").result == "'x'"  # live
