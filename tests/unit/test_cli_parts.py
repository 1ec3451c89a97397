"""The parts of the command that need no VM: words, streams, input, options, what gc finds."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from vmkernel.cli import gc, logs, options, script, stdin, streams
from vmkernel.cli.copy import Place, place
from vmkernel.errors import VmError
from vmkernel.host.registry import Registry
from vmkernel.models import Output, RunError, VmState
from vmkernel.settings import Settings, load_settings

COMMAND = str(Path(sys.executable).with_name("vmkernel"))


# --- options -----------------------------------------------------------------------------


def test_options_of_the_command_line_come_before_the_environment(monkeypatch):
    monkeypatch.setenv("VMKERNEL_MEMORY", "1G")
    assert load_settings(options={"memory": "512M"}).memory == 512
    with pytest.raises(VmError, match=r"from option --cpu-quota"):
        load_settings(options={"cpu_quota": "lots"})


def test_the_language_of_the_code_chooses_the_recipe_unless_one_is_named(monkeypatch):
    def recipe(language: str, **settings: str) -> str:
        vm = options.VmOptions(settings, {}, None, "", "")
        return vm.load(language).recipe

    monkeypatch.setenv("VMKERNEL_RECIPE", "minimal")
    assert recipe("python") == "minimal"
    assert recipe("bash") == "bash"
    assert recipe("bash", recipe="minimal") == "minimal"


@pytest.mark.parametrize(
    ("text", "transfer"),
    [
        ("data.csv", ("data.csv", "data.csv")),
        ("/a/b/data", ("/a/b/data", "data")),
        ("data.csv:in/", ("data.csv", "in/data.csv")),
        ("data.csv:/tmp/x", ("data.csv", "/tmp/x")),
    ],
)
def test_what_goes_in(text, transfer):
    assert options.transfer_in(text) == transfer


def test_a_name_with_a_colon_that_exists_is_a_name(tmp_path):
    file = tmp_path / "a:b"
    file.touch()
    assert options.transfer_in(str(file)) == (str(file), "a:b")


def test_what_comes_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert options.transfer_out("result.csv") == ("result.csv", "result.csv")
    assert options.transfer_out("/tmp/plots/") == ("/tmp/plots/", "plots")
    assert options.transfer_out("a/b:there") == ("a/b", "there/b")
    assert options.transfer_out("a/b:new") == ("a/b", "new")
    with pytest.raises(click.UsageError):
        options.transfer_out("..")


def test_places_of_cp():
    assert place("vm-1:x") == Place("vm-1", "x")
    assert place("./vm-1:x") == Place("", "./vm-1:x")
    assert place(":x") == Place("", ":x")
    assert place("x") == Place("", "x")


# --- scripts -----------------------------------------------------------------------------


def test_the_language_of_a_file(tmp_path):
    def language(name: str, text: str = "") -> str | None:
        path = tmp_path / name
        path.write_text(text)
        return script.read_source(str(path), None, ()).language

    assert language("a.py") == "python"
    assert language("b.sh") == "bash"
    assert language("c", "#!/usr/bin/env bash\n") == "bash"
    assert language("d", "#!/usr/bin/python3\n") == "python"
    assert language("e", "#!") is None
    assert language("f", "#!/usr/bin/perl\n") is None
    assert script.read_source(None, "1", ()).language is None


def test_code_is_read_as_python_reads_it(tmp_path):
    path = tmp_path / "a.py"
    path.write_bytes(b"\xef\xbb\xbfprint(1)\r\nx = 2\r")
    assert script.read_source(str(path), None, ()).code == "print(1)\nx = 2\n"
    path.write_bytes(b"\xff")
    with pytest.raises(VmError, match="no text in UTF-8"):
        script.read_source(str(path), None, ())
    with pytest.raises(VmError, match="No such file"):
        script.read_source(str(tmp_path / "none"), None, ())


def test_a_bash_script_is_a_script_of_its_own():
    source = script.Source("exit 3", "x.sh", Path("dir/x.sh"), ("a b",))
    plan = source.plan("bash", engine=False)
    assert (plan.file, plan.code) == ("x.sh", "bash -- x.sh 'a b' </dev/null")
    plan = script.Source("echo $1", "-c", None, ("z",)).plan("bash", engine=False)
    assert (plan.file, plan.code) == ("", "bash -c 'echo $1' bash z </dev/null")


def test_other_languages_get_code_but_no_arguments():
    assert script.Source("1", "-c", None, ()).plan("r", engine=False).code == "1"
    with pytest.raises(VmError, match="cannot be given arguments"):
        script.Source("1", "-c", None, ("a",)).plan("r", engine=False)


# --- streams -----------------------------------------------------------------------------


class Written:
    """What `Streams` writes, by pipes in the place of our own stdout and stderr."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **kinds: bool) -> None:
        self.pipes = {name: os.pipe() for name in ("stdout", "stderr")}
        monkeypatch.setattr(streams, "_STDOUT", self.pipes["stdout"][1])
        monkeypatch.setattr(streams, "_STDERR", self.pipes["stderr"][1])
        self.failures: list[OSError] = []
        self.streams = streams.Streams(self.failures.append, **kinds)

    def show(self, kind: str, **content: object) -> None:
        self.streams.show(Output(kind, dict(content)))

    def said(self) -> tuple[str, str]:
        found = []
        for reader, writer in self.pipes.values():
            os.close(writer)
            with open(reader) as file:
                found.append(file.read())
        return found[0], found[1]


def test_outputs_go_where_they_belong(monkeypatch):
    written = Written(monkeypatch)
    written.show("stream", name="stdout", text="ä\n")
    written.show("stream", name="stderr", text="e\n")
    written.show("display_data", data={"text/plain": "<Figure>", "image/png": "…"})
    written.show("display_data", data={"text/html": "x"})
    written.show("execute_result", data={"text/plain": "42"})
    written.show("clear_output", wait=True)
    written.show("error", ename="E", evalue="v", traceback=["\x1b[31mE\x1b[0m: v", "at 1"])
    assert written.said() == ("ä\n<Figure>\n", "e\nE: v\nat 1\n")


def test_a_cells_value_is_shown_where_it_is_asked_for(monkeypatch):
    written = Written(monkeypatch, results=True)
    written.show("execute_result", data={"text/plain": ["4", "2"]})
    assert written.said() == ("42\n", "")


def test_how_an_exit_is_told(monkeypatch):
    written = Written(monkeypatch)
    for value in ("3", "None", "", "True", "-1"):
        written.show("error", ename="SystemExit", evalue=value, traceback=["…"])
    written.show("error", ename="SystemExit", evalue="why", traceback=["…"])
    written.streams.show_end(RunError("SystemExit", "why"), 1)  # told already
    assert written.said() == ("", "why\n")


def test_a_status_of_its_own_is_no_news_and_a_signal_is(monkeypatch):
    written = Written(monkeypatch)
    written.streams.show_end(RunError("GuestKernelDied", "exit status 3"), 3)
    written.streams.show_end(RunError("GuestKernelDied", "killed by SIGSEGV"), 139)
    assert written.said() == ("", "vmkernel: killed by SIGSEGV\n")


def test_a_reader_that_is_gone_is_told_once_and_nothing_is_written_any_more(monkeypatch):
    written = Written(monkeypatch)
    os.close(written.pipes["stdout"][0])
    written.show("stream", name="stdout", text="x")
    written.show("stream", name="stdout", text="y")
    assert [type(error) for error in written.failures] == [BrokenPipeError]
    for fd in (written.pipes["stdout"][1], *written.pipes["stderr"]):
        os.close(fd)


# --- standard input ----------------------------------------------------------------------


def test_lines_bytes_and_the_end_of_input():
    reader, writer = os.pipe()
    prompts: list[str] = []
    source = stdin.Stdin(prompts.append, reader)
    os.write(writer, b"one\ntwo\n\xff\x00rest")
    assert source("name? ", False) == "one"
    assert source("", False) == "two"
    assert source(stdin._ASKS_FOR_BYTES, False).encode("latin-1") == b"=\xff\x00rest"
    os.write(writer, b"last")
    os.close(writer)
    assert source("", True) == "last"
    assert source("", False) == stdin.END
    assert source(stdin._ASKS_FOR_BYTES, False) == "="
    assert prompts == ["name? "]
    source.close()
    os.close(reader)


def test_a_wait_for_input_can_be_given_up():
    reader, writer = os.pipe()
    source = stdin.Stdin(lambda text: None, reader)
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(source("", False)))
    thread.start()
    time.sleep(0.05)
    assert thread.is_alive()
    source.give_up()
    thread.join(5)
    assert answers == [stdin.END]
    assert source("", False) == stdin.END
    source.close()
    os.close(reader)
    os.close(writer)


# --- logs --------------------------------------------------------------------------------


def test_a_log_is_followed_through_its_parts(tmp_path):
    """As `vm.console.ConsoleLog` writes them: a head, then a newest part that is renamed."""
    from vmkernel.vm.console import ConsoleLog

    path = tmp_path / "console.log"
    log, follower = ConsoleLog(path, 64), logs._Log(path)
    seen = b""
    for number in range(10):
        log.feed(f"line {number:04d}\n".encode())
        seen += b"".join(follower.news())
    assert seen.split(b"\n") == [f"line {number:04d}".encode() for number in range(10)] + [b""]
    assert follower.read().startswith(b"line 0000")
    log.close()
    assert b"".join(follower.news()) == b""


# --- gc ----------------------------------------------------------------------------------


@pytest.fixture
def place_of_its_own(tmp_path, monkeypatch) -> Settings:
    """A host where gc may remove what it likes: the session's templates are the user's."""
    for name in ("cache", "state", "images", "runtime"):
        directory = tmp_path / name
        directory.mkdir(mode=0o700)
        monkeypatch.setenv(f"VMKERNEL_{name.upper()}_DIR", str(directory))
    settings = load_settings()
    assert settings.cache_dir == tmp_path / "cache"
    return settings


def _collect(*words: str) -> dict[str, object]:
    done = CliRunner().invoke(gc.gc, ["--json", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def _age(path: Path, seconds: float = 4000) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def _litter(settings: Settings) -> tuple[set[str], set[str]]:
    """Make what killed processes leave, and beside it what is in use; both by name."""
    templates = settings.cache_dir / "templates"
    templates.mkdir()
    left, used = set(), set()
    dead, alive = "a" * 32, "b" * 32
    for key, names in ((dead, left), (alive, used)):
        for name in (f".lock-{key}", f".progress-{key}", f".progress-{key}.new"):
            (templates / name).touch()
            names.add(name)
        work = templates / f".tmp-{key}-123"
        work.mkdir()
        (work / "ram").write_bytes(b"x" * 8192)
        names.add(work.name)
    damaged = templates / ("c" * 32)
    damaged.mkdir()
    (damaged / "manifest.json").write_text("{")
    left.add(damaged.name)
    for name, names in (("x-y", left), ("z", used)):
        (settings.images_dir / f".tmp-{name}-99").mkdir()
        (settings.images_dir / f".lock-{name}").touch()
        names.add(f".tmp-{name}-99")
    for name in ("scratch-00ff", ".probe-x"):
        path = settings.cache_dir / name
        path.touch()
        _age(path)
        left.add(name)
    (settings.cache_dir / "scratch-young").touch()
    used |= {"scratch-young"}
    logs_dir = settings.state_dir / "logs"
    for number in range(25):
        directory = logs_dir / f"vm-{number:08x}"
        directory.mkdir(parents=True)
        (directory / "qemu.log").write_text("…")
        _age(directory, 10000 - number)
        (left if number < 5 else used).add(directory.name)
    return left, used


def test_gc_removes_what_was_left_and_nothing_else(place_of_its_own):
    settings = place_of_its_own
    left, used = _litter(settings)
    held = [
        settings.cache_dir / "templates" / f".lock-{'b' * 32}",
        settings.images_dir / ".lock-z",
    ]
    with contextlib.ExitStack() as locks:
        for path in held:
            fcntl.flock(locks.enter_context(path.open()), fcntl.LOCK_EX)
        _collect_and_look(settings, left, used)


def _collect_and_look(settings: Settings, left: set[str], used: set[str]) -> None:
    told = _collect("--dry-run")
    assert {item["what"] for item in told["removed"]} == left
    assert told["bytes"] >= 8192
    everything = {path.name for path in settings.cache_dir.parent.rglob("*")}
    assert left | used <= everything

    done = _collect()
    assert {item["what"] for item in done["removed"]} == left
    assert done["bytes"] == told["bytes"]
    now = {path.name for path in settings.cache_dir.parent.rglob("*")}
    assert not left & now
    assert used <= now
    assert _collect()["removed"] == []


def test_gc_forgets_vms_that_have_ended(place_of_its_own):
    settings = place_of_its_own
    with Registry(settings) as registry:
        kept = registry.new(kept=True, name="mine")
        gone = [registry.new() for _ in range(3)]
        for record in (kept, *gone):
            registry.update(record.vm_id, state=VmState.STOPPED, ended=1.0)
        assert _collect()["removed"] == []
        told = _collect("--all", "--dry-run")["removed"]
        assert [item["what"] for item in told] == ["3 on the record of VMs"]
        assert len(registry.list(ended=True)) == 4
        assert _collect("--all")["removed"] == told
        assert [status.record.name for status in registry.list(ended=True)] == ["mine"]


def test_gc_settles_a_vm_whose_runner_is_dead(place_of_its_own):
    settings = place_of_its_own
    with Registry(settings) as registry:
        record = registry.new()
        registry.update(record.vm_id, state=VmState.STARTING, runner_start=1)
        for words in (("--dry-run",), ()):
            found = _collect(*words)["removed"]
            assert [(item["kind"], item["what"]) for item in found] == [("vm", record.vm_id)]
        assert registry.get(record.vm_id).state is VmState.FAILED


def test_gc_removes_templates_whose_image_is_gone_or_that_nobody_uses(place_of_its_own):
    from vmkernel.vm.template import KEEP_UNUSED, FileRecord, Manifest

    settings = place_of_its_own

    def template(key: str, image: str) -> Path:
        import msgspec

        directory = settings.cache_dir / "templates" / key
        directory.mkdir(parents=True)
        files = {}
        for name in ("ram", "state", "scratch.raw", "scratch.qcow2"):
            (directory / name).touch()
            found = (directory / name).stat()
            files[name] = FileRecord(found.st_size, found.st_ino, found.st_mtime_ns, "")
        manifest = Manifest(1, key, "minimal", 0.0, {"image": image}, files, {})
        (directory / "manifest.json").write_bytes(msgspec.json.encode(manifest))
        (directory / "used").touch()
        return directory

    real = load_settings(environ={"HOME": os.path.expanduser("~")}).images_dir / "minimal"
    if not real.is_dir():
        pytest.skip("there is no image 'minimal'")
    (settings.images_dir / "minimal").symlink_to(real)
    from vmkernel.image.store import find_image

    digest = find_image("minimal", settings).digest
    fresh, orphan, old = (
        template("1" * 32, digest),
        template("2" * 32, "-"),
        template("3" * 32, digest),
    )
    for path in (old, old / "used"):
        _age(path, KEEP_UNUSED + 100)
    found = {item["what"]: item["why"] for item in _collect()["removed"]}
    assert found == {
        orphan.name: "the image 'minimal' of it is gone",
        old.name: "not used for 14 days",
    }
    assert fresh.is_dir()
    assert not orphan.exists()
    assert gc._size(fresh) > 0


# --- completion --------------------------------------------------------------------------


def _complete(*words: str) -> list[str]:
    """What a real bash offers for the last word, by its own completion machinery."""
    line = " ".join(words)
    program = f"""
        eval "$(vmkernel completion bash)"
        COMP_WORDS=({" ".join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}
        COMP_LINE={line!r}; COMP_POINT={len(line)}
        complete -p vmkernel >/dev/null || exit 9
        _vmkernel_completion vmkernel
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", program], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PATH": f"{Path(COMMAND).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_real_bash_completes_commands_options_vms_and_recipes(place_of_its_own):
    with Registry(place_of_its_own) as registry:
        registry.new(kept=True, name="workbench")
        gone = registry.new()
        registry.update(gone.vm_id, state=VmState.FAILED)
    assert _complete("vmkernel", "st") == ["start", "stop"]
    assert _complete("vmkernel", "run", "--ti") == ["--timeout"]
    assert _complete("vmkernel", "exec", "work") == ["workbench"]
    assert gone.vm_id not in _complete("vmkernel", "rm", "")
    assert _complete("vmkernel", "run", "--recipe", "mini") == ["minimal"]
    assert _complete("vmkernel", "start", "--set", "queue") == ["queue_timeout="]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shells_script_names_the_variable(shell):
    done = subprocess.run([COMMAND, "completion", shell], capture_output=True, timeout=60)
    assert done.returncode == 0
    assert f"_VMKERNEL_COMPLETE={shell}_complete".encode() in done.stdout
