"""How many VMs may run at once on this host: a counting semaphore in a file, with a queue.

A slot lives exactly as long as its VM. It is an open-file-description lock whose descriptor the
caller hands to the VM's QEMU (``pass_fds``, and to nothing else), closing its own copy with
``Slot.handed_over``; so the kernel frees the slot when QEMU dies, whoever killed it, and nothing
can leak or needs cleaning. What the bytes of the file mean is told in ``slotfile.py``.

    slots = vm_slots(settings)
    slot = await slots.acquire(on_wait=lambda place: print(place.text), timeout=30)
    process = await asyncio.create_subprocess_exec("qemu…", pass_fds=[slot.fd])
    slot.handed_over()

Where a user may have so many VMs only (``max_vms_per_user``), he takes one of that number first,
in a queue of its own, so that somebody who waits for a VM of his to end keeps nobody else waiting.
Both locks are on the one descriptor, in the one file.

The queue is served strictly in order of arrival: only the first in line takes a free slot, and a
newcomer takes one at once only when nobody waits. An exception keeps the queue alive: when a slot
stays free for seconds while those in front do not move (stopped by a debugger, or under a lower
limit of their own), the next one passes them; they keep their place.

Each process goes by the limit of its own settings; a slot that another holds under a higher limit
counts as used. One file serves one host: an administrator who wants a limit over all users puts
``semaphore_file`` into /etc/vmkernel/config.toml and makes that file writable for all (mode 0666,
in a directory that users cannot write to, or anyone may remove it: VMs already running then count
for the processes that knew the old file, and for nobody else).

A process that forks *without* exec while it holds a slot (multiprocessing's fork method) shares
the slot with its child; spawn QEMU with subprocess, which closes what is not in ``pass_fds``.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vmkernel.errors import SettingsError, VmCapacityError
from vmkernel.host.slotfile import HOST, MAX_SLOTS, SlotFile, realm_of

if TYPE_CHECKING:
    import asyncio  # else only by who waits: a kernel may start its VM before it imports this

    from vmkernel.host.inotify import FileWatch
    from vmkernel.settings import Settings

POLL_SECONDS = 1.0  # the safety net under inotify
POLL_ALONE_SECONDS = 0.1  # when inotify is not to be had
# After a close, look again soon: inotify tells it before the kernel drops the locks (40 µs here,
# or as long as the dying process does not get the processor back).
AGAIN_SECONDS = (0.0, 0.001, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256)
# Each close wakes every waiter, of which one gets a slot; the others count queue and slots (tens of
# system calls) no more often than this.
_COUNT_SECONDS = 0.2
# How long a slot stays free before a waiter passes those in front, and more for each of them, so
# that of several who could pass the first one does.
_STALL_SECONDS = 3.0
_STALL_STEP_SECONDS = 0.1


OF_A_USER = "VM slot of yours"
"""`QueuePosition.what` of who waits at his own limit."""


class QueuePosition(NamedTuple):
    """Where a waiter stands: how many wait before it, and the use of the slots."""

    ahead: int
    used: int
    limit: int
    what: str = "VM slot"

    @property
    def text(self) -> str:
        """One line for a person, without a full stop."""
        if self.what == OF_A_USER:
            return f"{_reached(self.limit)}: waiting until one of them ends" + (
                f", {self.ahead} ahead" if self.ahead else ""
            )
        if self.ahead == 0:
            return f"waiting for a {self.what}: next in line, {self.used} of {self.limit} in use"
        kernels = "kernel" if self.ahead == 1 else "kernels"
        return f"waiting for a {self.what}: {self.ahead} {kernels} ahead"


class Holder(NamedTuple):
    """Who took a slot: a hint for people, since a taker may be dead and its VM alive."""

    slot: int
    pid: int | None
    name: str

    def __str__(self) -> str:
        pid = "unknown process" if self.pid is None else f"pid {self.pid}"
        return f"{pid} ({self.name})" if self.name else pid


class Statistics(NamedTuple):
    """The semaphore at one moment; ``used`` may exceed ``limit`` when others have a higher one."""

    limit: int
    used: int
    free: int
    waiting: int


class Slot:
    """One slot, held by its descriptor ``fd`` and by every process that inherited it."""

    def __init__(self, file: SlotFile, descriptor: int, index: int, lease: int, label: str) -> None:
        self.index = index
        self.label = label
        self._file = file
        self._descriptor = descriptor
        self._lease = lease
        self._ended = False

    @classmethod
    def adopt(cls, path: Path, descriptor: int, index: int, lease: int) -> Slot:
        """A slot whose descriptor this process inherited.  Raises VmCapacityError."""
        return cls(SlotFile(path), descriptor, index, lease, "")

    @property
    def lease(self) -> int:
        """A number that tells this taking of the slot from all later ones."""
        return self._lease

    @property
    def fd(self) -> int:
        """The descriptor that carries the lock, for ``pass_fds``; ValueError once closed."""
        if self._descriptor < 0:
            raise ValueError(f"the descriptor of slot {self.index} is closed")
        return self._descriptor

    @property
    def holds(self) -> bool:
        """Whether this slot is held *now*, by us or by the process it was handed to."""
        if not self._ended:
            # Asks for this very taking: byte ``index`` may belong to a successor by now.
            self._ended = not self._file.lease_holds(self._lease)
        return not self._ended

    def handed_over(self) -> None:
        """Close our copy: from now on the child alone holds the slot. Again is harmless."""
        self.release()

    def release(self) -> None:
        """Close our copy; the slot is free unless a child still holds it. Again is harmless.

        Never an explicit unlock: that would free the slot under a VM that lives.
        """
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def is_on(self, file: SlotFile) -> bool:
        """Whether the lock is on this very file, and the descriptor ours."""
        return self._descriptor >= 0 and self._file.inode == file.inode

    def give_descriptor(self) -> int:
        """The descriptor, which is the caller's from now on, with the lock on it."""
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        # A slot that nobody refers to (its waiter was cancelled at the last moment) frees itself.
        if getattr(self, "_descriptor", -1) >= 0:
            self.release()

    def __repr__(self) -> str:
        state = "ours" if self._descriptor >= 0 else "handed over" if self.holds else "free"
        return f"<Slot {self.index} {self.label!r} {state}>"


class Semaphore:
    """At most ``limit`` slots at once, over all processes that use the file ``path``.

    ``setting`` and ``what`` name the limit in messages; ``name_of`` may name a holder by the pid
    that took the slot, and the lease.
    Raises SettingsError for a limit outside 1…16384. Nothing is opened before the first use.
    """

    def __init__(
        self,
        path: Path | str,
        limit: int,
        *,
        what: str = "VM slot",
        setting: str = "max_concurrent_vms",
        name_of: Callable[[int, int], str] | None = None,
        user: int | None = None,
        within: Semaphore | None = None,
    ) -> None:
        """``user``: his slots, not the host's.  ``within``: whose slot it takes one of, as well."""
        if not 1 <= limit <= MAX_SLOTS:
            raise SettingsError(
                f"{setting} is {limit}",
                hint=f"set {setting} to a whole number from 1 to {MAX_SLOTS}",
            )
        self.path = Path(path)
        self.limit = limit
        self._what = what
        self._setting = setting
        self._name_of = name_of
        self.within = within
        self._realm = HOST if user is None else realm_of(user)
        self._file: SlotFile | None = None
        self._replaced: list[SlotFile] = []  # removed under us, with slots still held
        self._watches: dict[asyncio.AbstractEventLoop, FileWatch] = {}

    def acquire_nowait(self, *, label: str = "") -> Slot | None:
        """Take a slot if one is free and nobody waits, else None; needs no event loop.

        Raises VmCapacityError when the semaphore file cannot be used.
        """
        file = self._current()
        if file.anyone_waits():
            return None
        if self.within is None:
            return self._take(file, label)
        own = self.within.acquire_nowait(label=label)
        if own is None:
            return None
        with own:
            return self._take(file, label, own)

    async def acquire(
        self,
        *,
        on_wait: Callable[[QueuePosition], None] | None = None,
        timeout: float | None = None,
        label: str = "",
    ) -> Slot:
        """Take a slot, waiting in order of arrival for one; cancelling it leaves nothing held.

        ``on_wait`` hears the place in the queue, at once and when it changes; never, if a slot is
        free. ``timeout`` is in seconds: None waits for ever, 0 not at all. Raises VmCapacityError
        when the time is over or the semaphore file cannot be used.
        """
        if slot := self.acquire_nowait(label=label):
            return slot
        if self.within is None:
            return await self._wait(None, on_wait, timeout, timeout, label)
        began = time.monotonic()
        with await self.within.acquire(on_wait=on_wait, timeout=timeout, label=label) as own:
            left = None if timeout is None else max(0.0, timeout - (time.monotonic() - began))
            return await self._wait(own, on_wait, left, timeout, label)

    async def _wait(
        self,
        own: Slot | None,
        on_wait: Callable[[QueuePosition], None] | None,
        left: float | None,
        timeout: float | None,
        label: str,
    ) -> Slot:
        """Queue for a slot, for as long as is ``left`` of ``timeout``."""
        import asyncio

        loop = asyncio.get_running_loop()
        deadline = None if left is None else loop.time() + left
        with self._watch(loop) as watch, contextlib.closing(_Waiter(self)) as waiter:
            again = len(AGAIN_SECONDS)
            told = None
            while True:
                # Watch before looking: what happens after the look then wakes the sleep.
                file = waiter.file
                watched = watch.follow(file.fileno())
                now = loop.time()
                if waiter.may_take(now) and (slot := waiter.take(label, own)):
                    return slot
                if waiter.file is not file:  # it went over to a new file: watch that, look again
                    continue
                place = waiter.place
                if on_wait and place.ahead != told:
                    told = place.ahead
                    on_wait(place)
                if deadline is not None and now >= deadline:
                    raise self._too_late(timeout or 0.0, place)
                pause = POLL_SECONDS if watched else POLL_ALONE_SECONDS
                if again < len(AGAIN_SECONDS) and place.ahead <= 1:
                    pause = AGAIN_SECONDS[again]
                elif not waiter.counted:
                    pause = _COUNT_SECONDS
                if deadline is not None:
                    pause = min(pause, deadline - now)
                again = 0 if await watch.sleep(pause) else again + 1

    def statistics(self) -> Statistics:
        """Limit, used, free and waiting, now; VmCapacityError when the file cannot be used.

        Free are those that this user could take; of who waits at a user's limit, this user's count.
        """
        file = self._current()
        used = len(file.held()) + self._elsewhere()
        waiting = file.waiting() + sum(old.waiting() for old in self._replaced)
        free = max(0, self.limit - used)
        if self.within is not None:
            own = self.within.statistics()
            free, waiting = min(free, own.free), waiting + own.waiting
        return Statistics(self.limit, used, free, waiting)

    def holders(self) -> list[Holder]:
        """Who holds the slots, in the order of the slots."""
        found = []
        for file in (self._current(), *self._replaced):
            for index in file.held():
                pid, lease = file.taker(index)
                found.append(Holder(index, pid, "" if pid is None else self._name(pid, lease)))
        return found

    def follow(self, watch: FileWatch) -> bool:
        """Let ``watch`` tell of this semaphore's file; to be asked before each look at it.

        False when the file cannot be watched; VmCapacityError when it cannot be used.
        """
        return watch.follow(self._current().fileno())

    def lease_holds(self, lease: int) -> bool:
        """Whether this taking of a slot (`Slot.lease`) is still alive, in whatever process."""
        return any(file.lease_holds(lease) for file in (self._current(), *self._replaced))

    def check(self) -> None:
        """Prove that slots can be taken (file, permission, locks); VmCapacityError if not."""
        os.close(self._current().open_lockable())
        self.statistics()

    def __repr__(self) -> str:
        try:
            now = self.statistics()
        except VmCapacityError as error:
            return f"<Semaphore {self.path} limit={self.limit} unusable: {error}>"
        return f"<Semaphore {self.path} limit={now.limit} used={now.used} waiting={now.waiting}>"

    def _current(self) -> SlotFile:
        """The file now under the path. One that was replaced is kept while slots are held on it."""
        if self._file is None or not self._file.is_current():
            newest = SlotFile(self.path, self._realm)
            known = [] if self._file is None else [self._file, *self._replaced]
            same = next((file for file in known if file.inode == newest.inode), newest)
            self._file = same  # the old one may have been moved back: never count it twice
            self._replaced = [file for file in known if file is not same]
        if self._replaced:
            self._replaced = [file for file in self._replaced if file.held() or file.anyone_waits()]
        return self._file

    def _elsewhere(self) -> int:
        return sum(len(file.held()) for file in self._replaced)

    def _take(self, file: SlotFile, label: str, own: Slot | None = None) -> Slot | None:
        """``own``: the user's, whose descriptor then carries both locks, and is the slot's."""
        joined = own is not None and own.is_on(file)
        descriptor = own.fd if own is not None and joined else file.open_lockable()
        try:
            if taken := file.take(descriptor, self.limit, self._elsewhere()):
                if own is not None and joined:
                    own.give_descriptor()
                elif self.within is not None:  # the file was replaced meanwhile
                    self.within._current().take(descriptor, self.within.limit)
                index, lease = taken
                slot = Slot(file, descriptor, index, lease, label)
                descriptor = -1  # the slot's now
                return slot
            return None
        finally:
            if descriptor >= 0 and not joined:
                os.close(descriptor)

    @contextlib.contextmanager
    def _watch(self, loop: asyncio.AbstractEventLoop) -> Iterator[FileWatch]:
        from vmkernel.host.inotify import FileWatch  # only who waits pays for ctypes

        watch = self._watches.get(loop)
        if watch is None:
            watch = self._watches[loop] = FileWatch()
        watch.users += 1
        try:
            yield watch
        finally:
            watch.users -= 1
            if watch.users == 0:
                del self._watches[loop]
                watch.close()

    def _name(self, pid: int, lease: int) -> str:
        name = self._name_of(pid, lease) if self._name_of else ""
        if not name:
            from vmkernel.host.processes import describe

            name = describe(pid)
        return name

    def _too_late(self, timeout: float, place: QueuePosition) -> VmCapacityError:
        if place.what == OF_A_USER:
            return VmCapacityError(
                f"{_reached(self.limit)}, and none of them ended within {timeout:g} s; "
                f"place in the queue: {place.ahead + 1}",
                hint="shut down a kernel of yours (`vmkernel ps` lists them; `vmkernel pool stop` "
                "ends those that wait), raise queue_timeout, or ask the administrator",
            )
        holders = ", ".join(str(holder) for holder in self.holders()) or "nobody any more"
        return VmCapacityError(
            f"no {self._what} became free within {timeout:g} s: {place.used} in use, "
            f"{self._setting} is {self.limit}; held by {holders}; "
            f"place in the queue: {place.ahead + 1}",
            hint=f"shut down a kernel (`vmkernel ps` lists them), or raise {self._setting} "
            "or queue_timeout",
        )


class _Waiter:
    """One place in the queue, and the decision when it is its turn."""

    def __init__(self, semaphore: Semaphore) -> None:
        self._semaphore = semaphore
        self.file = semaphore._current()
        self._ticket = self.file.queue()
        self.place = QueuePosition(0, 0, semaphore.limit, semaphore._what)
        self.counted = False  # whether the last look told all, or only that others are ahead
        self._counted_at = float("-inf")
        self._seen: tuple[int, bool] | None = None
        self._since = 0.0

    def close(self) -> None:
        self._ticket.close()

    def may_take(self, now: float) -> bool:
        """Look at queue and slots, follow the path to a new file, and tell whose turn it is."""
        soon = now - self._counted_at < _COUNT_SECONDS
        self.counted = not (soon and self.file.anyone_waits(before=self._ticket.number))
        if not self.counted:
            return False
        self._counted_at = now
        semaphore = self._semaphore
        ahead = self.file.waiting(before=self._ticket.number)
        newest = semaphore._current()
        moved = newest is not self.file
        used = len(newest.held()) + semaphore._elsewhere()
        self.place = self.place._replace(ahead=ahead, used=used)
        free = moved or used < semaphore.limit
        if self._seen != (ahead, free):
            self._seen, self._since = (ahead, free), now
        stalled = now - self._since >= _STALL_SECONDS + _STALL_STEP_SECONDS * ahead
        turn = free and (ahead == 0 or stalled)
        if turn and moved:  # the queue moves to the new file one by one, in its order
            ticket = newest.queue()
            self._ticket.close()
            self.file, self._ticket, self._seen = newest, ticket, None
            self._counted_at = float("-inf")
            return self.may_take(now)
        return turn

    def take(self, label: str, own: Slot | None) -> Slot | None:
        return self._semaphore._take(self.file, label, own)


def _reached(limit: int) -> str:
    return f"your limit of {limit} VM{'' if limit == 1 else 's'} is reached (max_vms_per_user)"


def vm_slots(settings: Settings) -> Semaphore:
    """The host's VM slots, as the settings say; its messages name holders by their VM record.

    Raises SettingsError when the file lies in ``runtime_dir`` and that is not private to the user.
    """

    def name_of(pid: int, lease: int) -> str:
        from vmkernel.host.registry import name_of_runner

        return name_of_runner(settings, pid, lease)

    path = _semaphore_file(settings)
    within = None
    if settings.max_vms_per_user is not None:
        within = Semaphore(
            path,
            settings.max_vms_per_user,
            what=OF_A_USER,
            setting="max_vms_per_user",
            user=os.geteuid(),
        )
    return Semaphore(path, settings.max_concurrent_vms, name_of=name_of, within=within)


def boot_slots(settings: Settings) -> Semaphore:
    """The smaller limit on VMs that boot at once (building templates), in a file beside it.

    Raises SettingsError as ``vm_slots`` does.
    """
    path = _semaphore_file(settings)
    return Semaphore(
        path.with_name(path.name + ".boots"),
        settings.max_concurrent_boots,
        what="boot slot",
        setting="max_concurrent_boots",
    )


def _semaphore_file(settings: Settings) -> Path:
    path = settings.semaphore_file
    if path.parent == settings.runtime_dir:
        from vmkernel.settings import ensure_private_dir

        ensure_private_dir(settings.runtime_dir)
    return path
