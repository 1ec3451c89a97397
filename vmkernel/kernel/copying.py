"""``%vm put`` and ``%vm get``: files between the host and the guest, as a cell asks for them.

The cell's code is not trusted, so the host decides by the setting ``files`` what it may have done:
nothing; each copy when the person at the front end has agreed; or, ``on``, what stays below the
kernel's working directory.  Names that are secrets here, or that would be obeyed here, are refused
whatever anybody says.  Where it stands: the commands of ``kernel.questions``, over ``host.copies``;
``kernel.asking`` asks.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vmkernel.errors import VmError, VmFileError
from vmkernel.host import copies, copyplan
from vmkernel.host.copyplan import Plan, in_words
from vmkernel.host.guestfiles import GuestFiles, guest_path
from vmkernel.host.landing import aside, host_errors
from vmkernel.host.private_names import is_private
from vmkernel.host.workspace_names import is_hidden, is_protected
from vmkernel.text import plain_text

if TYPE_CHECKING:
    from vmkernel.host.guest import Guest
    from vmkernel.kernel.asking import Asking
    from vmkernel.kernel.lane import Exchange
    from vmkernel.settings import Settings

GUEST_HOME = "/home/user"
USAGE = {
    "put": "%vm put [--force] LOCAL [PATH]",
    "get": "%vm get [--force] PATH [LOCAL]",
}
YES = ("y", "yes")
LONGEST_SHOWN = 200
"""Characters of a path in a question, which are not to push the question out of sight."""
SHOW_AFTER = 0.5
"""Seconds after which, and in whose intervals, a copy's progress is shown."""

_PLAIN = re.compile(r"[\w./~+@%,:=-]+", re.ASCII)  # some letters look like blanks

Show = Callable[["Exchange", str], None]
"""show(cell, text): into the cell's output, in the host's name"""


class CopyInterruptedError(VmError):
    """The cell was interrupted, and with it what it had asked for."""

    def __init__(self) -> None:
        super().__init__("the copy was interrupted", hint="the same command goes on from there")


class Place(NamedTuple):
    """Where in the guest the code that asks is: names are meant from there."""

    cwd: str
    writable: bool


class _Command(NamedTuple):
    first: str
    second: str
    force: bool


class Copying:
    """One kernel's copies, one at a time."""

    def __init__(
        self, settings: Settings, asking: Asking, show: Show, connection_file: str
    ) -> None:
        self._settings = settings
        self._connection_file = connection_file
        self._asking = asking
        self._show = show
        self._one = asyncio.Lock()
        self._running: dict[asyncio.Task[str], Exchange] = {}
        self._refused: deque[str] = deque(maxlen=64)
        """Cells whose question somebody answered with no"""
        self._landed = [0, 0]
        """Bytes and files that came without anybody being asked"""

    async def serve(
        self, command: str, arguments: Sequence[str], place: Place, guest: Guest, cell: Exchange
    ) -> str:
        """Do a command, and say what was done.  Raises VmError; ended with its cell."""
        asked = _parse(command, arguments)
        if self._settings.files == "off":
            raise VmError(
                f"%vm {command} is switched off here",
                hint="setting files = ask (VMKERNEL_FILES=ask) lets you agree to each copy",
            )
        work = self._put if command == "put" else self._get
        task = asyncio.ensure_future(self._in_turn(work(asked, place, guest, cell)))
        self._running[task] = cell
        end = lambda _: task.cancel()  # noqa: E731 - to be taken back
        cell.done.add_done_callback(end)
        try:
            return await task
        except asyncio.CancelledError:
            own = asyncio.current_task()
            if own is not None and own.cancelling():
                raise
            raise CopyInterruptedError from None
        finally:
            cell.done.remove_done_callback(end)
            del self._running[task]

    def interrupt(self, cell: Exchange) -> None:
        """End what a cell has asked for."""
        for task, whose in self._running.items():
            if whose is cell:
                task.cancel()

    async def _in_turn(self, work: Coroutine[Any, Any, str]) -> str:
        async with self._one:
            return await work

    # --- into the guest ---

    async def _put(self, asked: _Command, place: Place, guest: Guest, cell: Exchange) -> str:
        with host_errors(Path(asked.first)):
            root = Path(os.path.realpath(os.getcwd()))  # noqa: PTH109
            named = Path(os.path.normpath(root / _expanded(asked.first)))
            if self._settings.files == "ask" or not named.is_relative_to(root):
                self._check_asked(cell)  # first: who may not read is not told what there is
            source = Path(os.path.realpath(root / _expanded(asked.first), strict=True))
            self._check_private(source, root)
            with copyplan.opened(source) as fd:
                plan = await aside(copyplan.survey_host, fd, _is_private)
                if self._settings.files == "ask" or not source.is_relative_to(root):
                    await self._agree(
                        cell, f"Copy {_shown(source)} ({_size(plan)}) from this host into the VM?"
                    )
                target = _target(asked.second, os.fsencode(source.name), place)
                call = guest.vm.agent.exchange
                if not target.endswith(b"/") and asked.second and plan.is_file:
                    there = await GuestFiles(call).look(target)
                    if there is not None and there.kind == "directory":
                        target += b"/"
                if target.endswith(b"/"):
                    target += os.fsencode(source.name)
                with self._progress(cell, f"put {_shown(source.name)}") as progress:
                    done = await copies.put(
                        call, fd, plan, target, replace=asked.force, on_progress=progress
                    )
        return _told(source.name, done, f"in the VM as {_shown(os.fsdecode(target))}")

    def _check_private(self, source: Path, root: Path) -> None:
        """Raises VmFileError for what is no guest's business, whoever agrees."""
        below = source.relative_to(root) if source.is_relative_to(root) else source
        names = [name for name in map(os.fsencode, below.parts) if _is_private(name)]
        settings = self._settings
        own: tuple[str | Path, ...] = (
            settings.runtime_dir, settings.state_dir, settings.cache_dir,
            settings.database_file, settings.history_file, settings.semaphore_file,
            *([settings.env_file] if settings.env_file else []),
            *([self._connection_file] if self._connection_file else []),
            *_of_jupyter(),
        )  # fmt: skip
        for path in own:
            real = Path(os.path.realpath(path))
            if source.is_relative_to(real) or real.is_relative_to(source):
                names.append(os.fsencode(path))
        system = any(source.is_relative_to(top) for top in ("/proc", "/sys", "/dev", "/run"))
        if names or system:
            what = os.fsdecode(names[0]) if names else str(source)
            raise VmFileError(
                f"{_shown(what)} stays on the host: it may hold secrets",
                hint="copy what is needed of it to a file of another name, and put that",
            )

    # --- out of the guest ---

    async def _get(self, asked: _Command, place: Place, guest: Guest, cell: Exchange) -> str:
        path = guest_path(_in_guest(asked.first, place)).rstrip(b"/") or b"/"
        own_name = path.rpartition(b"/")[2]
        local = asked.second or os.fsdecode(own_name)
        with host_errors(Path(local)), _below(local, own_name) as (parent, name, target):
            call = guest.vm.agent.exchange
            plan = await copyplan.survey_guest(call, path, is_protected)
            copies.check_free(parent, name, plan, asked.force)
            if self._settings.files == "ask":
                over = ", in place of the file there" if copies.is_there(parent, name) else ""
                await self._agree(
                    cell,
                    f"Copy {_shown(os.fsdecode(path))} ({_size(plan)}) from the VM to "
                    f"{_shown(target)} on this host{over}?",
                )
            else:
                self._charge(plan)
            with self._progress(cell, f"get {_shown(target.name)}") as progress:
                done = await copies.get(
                    call, path, plan, parent, name, replace=asked.force, on_progress=progress
                )
        return _told(os.fsdecode(own_name), done, f"on the host as {_shown(target)}")

    def _charge(self, plan: Plan) -> None:
        """Hold what comes without anybody being asked to the limits of a workspace."""
        most_bytes = self._settings.workspace_size << 20
        most_files = self._settings.workspace_files
        unsized = copies.UNSIZED if any(item.size == 0 for item in plan.items) else 0
        size = self._landed[0] + plan.bytes + unsized
        files = self._landed[1] + len(plan.items)
        if size > most_bytes or files > most_files:
            raise VmFileError(
                f"this kernel may copy {in_words(most_bytes)} and {most_files} files to the host "
                "without asking, and that would be more",
                hint="settings workspace_size and workspace_files; or files = ask",
            )
        self._landed = [size, files]

    # --- people ---

    async def _agree(self, cell: Exchange, question: str) -> None:
        """Raises VmError unless the person says yes."""
        self._check_asked(cell)
        answer = await self._asking.ask(cell, f"{question} [y/N] ")
        if answer.strip().lower() not in YES:
            self._refused.append(cell.request.msg_id)
            self._check_asked(cell)

    def _check_asked(self, cell: Exchange) -> None:
        """Raises VmError where nobody can be asked, or somebody has said no."""
        if cell.request.msg_id in self._refused:
            raise VmError("the copy was not agreed to", hint="run the cell again to be asked again")
        self._asking.check(cell)

    @contextmanager
    def _progress(self, cell: Exchange, what: str) -> Iterator[Callable[[int, int | None], None]]:
        """Shows how far a copy is, when that lasts; and where it was when it was broken off."""
        loop = asyncio.get_running_loop()
        due = loop.time() + SHOW_AFTER
        line, longest, done_so_far = "", 0, 0

        def tell(done: int, total: int | None) -> None:
            nonlocal due, done_so_far
            done_so_far = done
            if loop.time() >= due:
                due = loop.time() + SHOW_AFTER
                say(f"{what}: {in_words(done)} of {in_words(total or done)}")

        def say(text: str, end: str = "") -> None:
            nonlocal line, longest
            line = text
            longest = max(longest, len(text))
            self._show(cell, f"\r{text.ljust(longest)}{end}")

        try:
            yield tell
        except BaseException:
            if done_so_far:
                say(f"{what}: broken off at {in_words(done_so_far)}; the same command goes on "
                    "from there", "\n")  # fmt: skip
            raise
        if line:
            say(f"{what}: {in_words(done_so_far)}", "\n")


# --- words ------------------------------------------------------------------------------


def _parse(command: str, arguments: Sequence[str]) -> _Command:
    names: list[str] = []
    force, options = False, True
    for argument in arguments:
        if options and argument == "--":
            options = False
        elif options and argument in ("--force", "-f"):
            force = True
        elif options and argument.startswith("-") and argument != "-":
            raise VmError(f"there is no option {argument!r}", hint=USAGE[command])
        else:
            names.append(argument)
    if not 1 <= len(names) <= 2 or not all(names) or any("\0" in name for name in names):
        raise VmError(f"%vm {command} takes one name or two", hint=USAGE[command])
    return _Command(names[0], names[1] if len(names) == 2 else "", force)


def _is_private(name: bytes) -> bool:
    """Whether no guest is given what has this name: less than what a workspace shows."""
    return is_private(name) or is_hidden(name)


def _expanded(local: str) -> str:
    return os.path.expanduser(local) if local == "~" or local.startswith("~/") else local  # noqa: PTH111


def _in_guest(path: str, place: Place) -> str:
    if path == "~" or path.startswith("~/"):
        return GUEST_HOME + path[1:]
    return path if path.startswith("/") else f"{place.cwd or GUEST_HOME}/{path}"


def _target(path: str, name: bytes, place: Place) -> bytes:
    """Where a put goes; without a word of it to where the code is, if that can be written to."""
    if path:
        return guest_path(_in_guest(path, place))
    return guest_path(f"{place.cwd if place.cwd and place.writable else GUEST_HOME}/") + name


def _shown(path: str | Path) -> str:
    """A path for a question or an answer: one line, nothing in it that a front end would obey."""
    text = plain_text(str(path)).replace("\n", "?").replace("\t", "?")
    if len(text) > LONGEST_SHOWN:
        text = f"{text[: LONGEST_SHOWN // 2]}…{text[-LONGEST_SHOWN // 2 :]}"
    return text if text == str(path) and _PLAIN.fullmatch(text) else repr(text)


def _size(plan: Plan) -> str:
    files = "" if plan.is_file else f" in {plan.files} files"
    return f"{in_words(plan.bytes)}{files}"


def _told(name: str, done: copies.Copied, where: str) -> str:
    again = f", {in_words(done.resumed)} of it from before" if done.resumed else ""
    text = f"{_shown(name)} ({in_words(done.bytes)}{again}) is {where}"
    if done.skipped:
        names = ", ".join(_shown(path) for path in done.skipped[:5])
        more = f" and {len(done.skipped) - 5} more" if len(done.skipped) > 5 else ""
        text += f"\nLeft out: {names}{more}"
    return text


def _of_jupyter() -> list[str]:
    """Where Jupyter keeps connection files and its configuration."""
    from jupyter_core.paths import jupyter_config_dir, jupyter_runtime_dir

    return [jupyter_runtime_dir(), jupyter_config_dir()]


@contextmanager
def _below(local: str, own_name: bytes) -> Iterator[tuple[int, bytes, Path]]:
    """The directory that a copy goes to, its name there, and the path of both for people.

    Raises VmFileError for a place that is not below the working directory or has a name that is
    refused, and OSError; nothing on the way may be a link.
    """
    root = Path(os.path.realpath(os.getcwd()))  # noqa: PTH109
    text = os.path.normpath(root / _expanded(local))
    target = Path(text)
    inside = target.is_relative_to(root)  # what else is a directory is not told
    if local.endswith("/") or (inside and target.is_dir() and not target.is_symlink()):
        target /= os.fsdecode(own_name)
    if not target.is_relative_to(root) or target == root:
        raise VmFileError(
            f"{_shown(target)} is not below the kernel's working directory, {_shown(root)}",
            hint="`vmkernel cp` in a terminal copies to anywhere",
        )
    parts = target.relative_to(root).parts
    for part in parts:
        if is_protected(os.fsencode(part)):
            raise VmFileError(
                f"The host keeps the name {_shown(part)} to itself: programs here obey such files",
                hint="choose another name; `vmkernel cp` in a terminal takes any",
            )
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(root, flags)
    try:
        for part in parts[:-1]:
            inner = os.open(part, flags, dir_fd=fd)
            os.close(fd)
            fd = inner
        yield fd, os.fsencode(parts[-1]), target
    finally:
        os.close(fd)
