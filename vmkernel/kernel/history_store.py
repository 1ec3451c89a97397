"""The history file and one kernel's session in it, by IPython's HistoryManager.

Only :mod:`vmkernel.kernel.history_process` imports this: IPython is heavy.

The file is IPython's: its tables, SQLite's default journal.  (Write-ahead logging would be
quicker, and corrupts a file on a network file system, where home directories may well lie.)
What the HistoryManager would do and must not: write from a thread of its own, which drops lines
when the file is locked; take a file that is locked for longer than its time-out for a damaged one,
and move it away; go on in memory without a word.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import msgspec
from IPython.core.history import HistoryManager
from IPython.core.inputtransformer2 import TransformerManager
from traitlets import Any as AnyTrait
from traitlets import TraitError
from traitlets.config import Config
from traitlets.config.loader import DeferredConfigString

PATIENCE = 30.0
"""Seconds that SQLite waits for a lock of another process."""
QUICK = 3.0
"""The same, where a front end waits for the answer."""

log = logging.getLogger("vmkernel.history")


class Trouble(Exception):  # noqa: N818 - what the wrapper is told
    """The file cannot be used now, or (``final``) at all."""

    def __init__(self, text: str, final: bool = False) -> None:
        super().__init__(text)
        self.final = final


Number = Annotated[int, msgspec.Meta(ge=-(1 << 62), le=1 << 62)]


class Query(msgspec.Struct):
    """The content of a ``history_request``.

    Strict, since the HistoryManager takes SQLite's complaint about a strange value for damage, too:
    it would move the file away.  (A pattern may have 50,000 bytes: SQLite, Implementation Limits.)
    """

    hist_access_type: str = ""
    raw: bool = True
    output: bool = False
    session: Number = 0
    start: Number = 0
    stop: Number | None = None
    n: Number | None = None
    pattern: Annotated[str, msgspec.Meta(max_length=10_000)] | None = None
    unique: bool = False


class SessionManager(HistoryManager):  # type: ignore[misc] # untyped
    """A HistoryManager without a shell, which can go on with a session of the file."""

    shell = AnyTrait()  # there is no namespace for _i and its friends
    resumed = AnyTrait()

    def new_session(self, conn: Any = None) -> None:
        """As the base class; the first time, go on with the session that ``resumed`` names."""
        self.forget()
        wanted, self.resumed = self.resumed, None
        if wanted is None or wanted != self.describe_session(wanted[0]):
            super().new_session(conn)
            return
        self.session_number = wanted[0]
        sql = "SELECT source, source_raw FROM history WHERE session = ? ORDER BY line"
        for source, raw in self.db.execute(sql, wanted[:1]):
            self.input_hist_parsed.append(source)
            self.input_hist_raw.append(raw)

    def forget(self) -> None:
        """Start with empty lists, as a session does."""
        self.input_hist_parsed[:] = [""]
        self.input_hist_raw[:] = [""]
        self.output_hist_reprs.clear()
        self.db_input_cache.clear()
        self.db_output_cache.clear()

    def describe_session(self, number: int) -> list[Any] | None:
        """Number and start of a session, by which it is known again in another file, too."""
        sql = "SELECT session, CAST(start AS TEXT) FROM sessions WHERE session = ?"
        found = self.db.execute(sql, (number,)).fetchone()
        return None if found is None else list(found)


class Store:
    """The history file and this kernel's session in it.  Raises Trouble."""

    def __init__(self, file: str, options: Iterable[str], session: Any, outputs: Any) -> None:
        config = Config()
        config.HistoryManager.hist_file = file
        config.HistoryManager.connection_options = {"timeout": PATIENCE}
        for option in options:
            name, _, value = option.lstrip("-").partition("=")
            config.HistoryManager[name.rpartition(".")[2]] = DeferredConfigString(value)
        path = Path(str(config.HistoryManager.hist_file))
        config.HistoryManager.hist_file = path  # moving a damaged one away fails with a str
        config.HistoryManager.db_cache_size = sys.maxsize  # we write, its thread never does
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(0o600)
            _check_free(path)
            self.manager = SessionManager(None, config=config, log=log, resumed=session)
        except (OSError, sqlite3.OperationalError) as error:
            raise Trouble(f"it cannot be written: {error}") from error
        except TraitError as error:
            raise Trouble(str(error), final=True) from error
        if self.manager.hist_file != path:  # it fell back to memory
            raise Trouble("it cannot be written")
        if self.session == session:
            self.manager.output_hist_reprs.update(dict(outputs))
        self._transformer = TransformerManager()

    @property
    def session(self) -> list[Any]:
        """Number and start of the session; a new one where the file lost it (it was damaged)."""
        found = self.manager.describe_session(self.manager.session_number)
        if found is None:
            self.manager.new_session()
            found = self.manager.describe_session(self.manager.session_number)
        assert found is not None
        return found

    def store(self, items: list[list[Any]]) -> None:
        """Write these to disk."""
        try:
            try:
                self._store(items)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:
                list(self.manager.get_tail(1))  # it sees the damage, and moves the file away
                self.manager.new_session()
                self._store(items)
        except sqlite3.OperationalError as error:
            raise Trouble(f"it cannot be written: {error}") from error
        except sqlite3.DatabaseError as error:
            raise Trouble(f"it is damaged, move it away: {error}", final=True) from error

    def _store(self, items: list[list[Any]]) -> None:
        manager = self.manager
        number, _ = self.session
        for what, *values in items:
            if what == "session":
                manager.end_session()  # writes what there is
                manager.new_session()
                number = manager.session_number
            elif what == "line":
                line, code = values
                sql = "SELECT 1 FROM history WHERE session = ? AND line = ?"
                # There already: from a process that died before it could say so
                if not manager.db.execute(sql, (number, line)).fetchone():
                    self._add_line(line, code)
            else:
                line, text = values
                manager.output_hist_reprs[line] = text
                manager.store_output(line)
        manager.writeout_cache()

    def _add_line(self, line: int, code: str) -> None:
        try:
            with warnings.catch_warnings(action="ignore"):
                source = self._transformer.transform_cell(code)
        except Exception:  # as run_cell does: then it is an error to run, and kept as it is
            source = code
        if "get_ipython().run_line_magic(" in source and "paste" in source:
            return  # IPython does not keep %paste
        self.manager.store_inputs(line, source, code)

    def find(self, content: Any) -> dict[str, Any]:
        """The reply to a ``history_request``: what ipykernel's do_history makes of it."""
        manager = self.manager
        try:
            query = msgspec.convert(content, Query)
            _check_free(manager.hist_file, QUICK)
            options = {"raw": query.raw, "output": query.output}
            match query.hist_access_type:
                case "tail":
                    n = 10 if query.n is None else query.n
                    found = manager.get_tail(n, include_latest=True, **options)
                case "range":
                    # From the end, as far as this session goes: further is an IndexError
                    start = max(query.start, 1 - len(manager.input_hist_raw))
                    found = manager.get_range(query.session, start, query.stop, **options)
                case "search":
                    found = manager.search(query.pattern, n=query.n, unique=query.unique, **options)
                case _:
                    found = []
            current = manager.session_number
            return {
                "status": "ok",
                "history": [(session or current, *rest) for session, *rest in found],
            }
        except sqlite3.OperationalError as error:
            log.warning("the history (%s) cannot be read: %s", manager.hist_file, error)
            return {"status": "ok", "history": []}
        except msgspec.ValidationError as error:
            return {"status": "error", "ename": "ValueError", "evalue": str(error), "traceback": []}

    def close(self) -> None:
        """Note the session's end."""
        with contextlib.suppress(sqlite3.Error):
            self.manager.end_session()


def _check_free(path: Path | str, patience: float = PATIENCE) -> None:
    """Wait until no other process has the file locked.  Raises sqlite3.OperationalError.

    The HistoryManager takes a lock that lasts for damage.
    """
    with contextlib.closing(sqlite3.connect(path, timeout=patience)) as db:
        try:
            db.execute("SELECT 1 FROM sqlite_master").fetchone()
            if patience == PATIENCE:
                db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            return  # damaged: the HistoryManager says so, and puts it aside
