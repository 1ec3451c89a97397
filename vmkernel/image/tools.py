"""Running the programs that build an image, so that they end with us and say why they failed.

The seam between `image.builder` and its tools (mmdebstrap, tar, pip, mkfs.erofs): everything a
tool says goes into the build's log, a failure becomes an `ImageError` with its telling lines, and
neither an exception nor our own death leaves a tool running.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from vmkernel.errors import ImageError

# Administration tools lie there, and an ordinary user's PATH on Debian lacks both.
_MORE_PATH = ("/usr/local/sbin", "/usr/sbin", "/sbin")

# Debian's (and Ubuntu's) package of each tool.
_PACKAGES = {
    "mmdebstrap": "mmdebstrap",
    "mkfs.erofs": "erofs-utils",
    "newuidmap": "uidmap",
    "apt-config": "apt",
    "dpkg-deb": "dpkg",
    "tar": "tar",
}


class ToolFailed(Exception):  # noqa: N818 - the cause of an ImageError, never seen alone
    """A tool ended with an error: its exit code, and the last lines of what it said."""

    def __init__(self, tool: str, code: int, lines: Sequence[str]) -> None:
        ended = f"ended with {code}" if code >= 0 else f"was ended by signal {-code}"
        super().__init__("\n".join([f"{tool} {ended}", *lines]))
        self.tool = tool
        self.lines = list(lines)


def search_path() -> str:
    """PATH, and the directories of administration tools."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *_MORE_PATH])


def require_tools(names: Sequence[str]) -> None:
    """Check that programs are installed.

    Raises:
        ImageError: some are missing; names all of them and the packages they are in.
    """
    path = search_path()
    missing = [name for name in names if shutil.which(name, path=path) is None]
    if missing:
        packages = " ".join(sorted({_PACKAGES.get(name, name) for name in missing}))
        raise ImageError(
            f"Building an image needs {', '.join(missing)}, not found on this host.",
            hint=f"install it: sudo apt-get install {packages}",
        )


class Tools:
    """Runs tools for one build and writes what they say into *log_path*."""

    def __init__(self, log_path: Path) -> None:
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        # For its owner alone: it shows command lines, and a proxy's address may hold a password.
        # Appending, since several tools write into it at once.
        descriptor = os.open(
            log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        self._log = os.fdopen(descriptor, "a", encoding="utf-8", errors="replace")

    def __enter__(self) -> Tools:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._log.close()

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
        allow_failure: bool = False,
    ) -> None:
        """Run *argv* to its end; *on_line* gets each line of its output and errors.

        Raises:
            ToolFailed: its exit code was not 0 (unless *allow_failure*).
            ImageError: its program is missing.
            OSError: it ran out of disk space.
        """
        tail: deque[str] = deque(maxlen=60)
        process = self._start(argv, env, subprocess.PIPE)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                self._log.write(line)
                tail.append(line.rstrip("\n"))
                if on_line is not None:
                    on_line(line.rstrip("\n"))
            code = process.wait()
        finally:
            _end(process)
            self._log.flush()
        if code != 0 and not allow_failure:
            if any(os.strerror(errno.ENOSPC) in line for line in tail):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise ToolFailed(Path(argv[0]).name, code, tail)

    @contextlib.contextmanager
    def beside(
        self, commands: Sequence[Sequence[str | Path]], *, env: Mapping[str, str] | None = None
    ) -> Iterator[None]:
        """Run *commands* at the same time, beside the body, which then waits for them.

        For helpers whose failure does not matter: they talk to the log only, and their exit code
        is not looked at. When the body raises they are ended.

        Raises:
            ImageError: a program is missing.
            OSError: one ran out of disk space.
        """
        running: list[subprocess.Popen[str]] = []
        said_before = self.log_path.stat().st_size
        try:
            running.extend(self._start(argv, env, self._log.fileno()) for argv in commands)
            yield
            for process in running:
                process.wait()
            with self.log_path.open("rb") as log:
                log.seek(said_before)
                if os.strerror(errno.ENOSPC).encode() in log.read():
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            for process in running:
                _end(process)

    def _start(
        self, argv: Sequence[str | Path], env: Mapping[str, str] | None, output: int
    ) -> subprocess.Popen[str]:
        words = [str(word) for word in argv]
        self._log.write(f"== {shlex.join(words)}\n")
        self._log.flush()
        # setpriv (util-linux) gives the tool a parent-death signal without preexec_fn, which is
        # unsafe beside threads: a builder that is killed takes mmdebstrap with it, and SIGTERM
        # lets that remove its own temporary directory.
        setpriv = shutil.which("setpriv", path=search_path())
        prefix = [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []
        environment = {**os.environ, "PATH": search_path(), "LC_ALL": "C.UTF-8"}
        try:
            return subprocess.Popen(
                prefix + words,
                env=dict(env) if env is not None else environment,
                # The builder's own may be closed to whom mmdebstrap becomes in a user namespace.
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                umask=0o022,
                # Ctrl-C must reach us alone: we then end the tool in good order.
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise ImageError(
                f"{words[0]} is not installed on this host.",
                hint=f"install the package that has it ({_PACKAGES.get(words[0], words[0])})",
            ) from error


def _end(process: subprocess.Popen[str]) -> None:
    """End a tool that still runs, with all that it started; SIGTERM lets it clean up first."""
    if process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20.0)
        _signal_group(process, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _signal_group(process: subprocess.Popen[str], number: int) -> None:
    # The group's id stays taken while anybody is in it, so this reaches nobody else's processes.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
