"""The short way of an ordinary cell, from its request to its reply.

Where it stands: ``guest.kernel`` asks it for each execute_request, ``guest.engine`` builds it.  On
the long way, through ipykernel's ``execute_request`` and ``do_execute`` and IPython's ``run_cell``,
a cell costs a thousand calls of Python functions, in an emulated VM some 10 µs each, and most of
them hand on what is known, or ask what nobody has changed.

The short way does the same in the same order: hooks, history, ``_`` and ``Out``, traps, what is
recorded of the output.  It is written after those functions, without what is the same each time, so
it is taken only

* with an IPython and an ipykernel whose functions are, to the letter, those it was written after,
* as long as nobody has replaced one of them,
* for a cell that awaits nothing, in the main shell, that is not silent.

All else goes the long way, which is in no way changed.
"""

from __future__ import annotations

import ast
import builtins
import getpass
import hashlib
import inspect
import os
import re
import sys
import threading
from functools import partial
from typing import Any

from ipykernel.compiler import XCachingCompiler
from ipykernel.displayhook import ZMQShellDisplayHook
from ipykernel.ipkernel import IPythonKernel
from ipykernel.jsonutil import json_clean
from ipykernel.kernelbase import Kernel
from ipykernel.zmqshell import ZMQInteractiveShell
from IPython.core.compilerop import CachingCompiler
from IPython.core.displayhook import DisplayHook
from IPython.core.error import InputRejected
from IPython.core.history import HistoryManager, HistoryOutput
from IPython.core.interactiveshell import (
    ExecutionInfo,
    ExecutionResult,
    InteractiveShell,
    softspace,
)
from IPython.core.payload import PayloadManager
from traitlets import All

from vmkernel.guest.streams import PortStream
from vmkernel.guest.tee import Tee

COPIED = (
    Kernel.execute_request, Kernel.init_metadata, Kernel._publish_execute_input,
    IPythonKernel.execute_request, IPythonKernel.do_execute, IPythonKernel.finish_metadata,
    IPythonKernel._forward_input, IPythonKernel._restore_input,
    ZMQInteractiveShell.run_cell, InteractiveShell.run_cell, InteractiveShell._tee,
    InteractiveShell._run_cell, InteractiveShell.run_cell_async, InteractiveShell.run_ast_nodes,
    InteractiveShell.transform_ast, InteractiveShell.push, InteractiveShell.user_expressions,
    HistoryManager.store_inputs, HistoryManager.store_output,
    CachingCompiler.ast_parse, CachingCompiler.extra_flags,
    DisplayHook.__call__, DisplayHook.update_user_ns, DisplayHook.log_output,
    ZMQShellDisplayHook.finish_displayhook, PayloadManager.read_payload,
    PayloadManager.clear_payload,
)  # fmt: skip
KNOWN = "57104d3b2e30b054aec843ce656d34e3"
"""`fingerprint` of IPython 9.18 and ipykernel 7.4."""

_WATCHED = (
    "run_cell", "_run_cell", "run_cell_async", "run_ast_nodes", "run_code", "transform_ast", "push",
    "_tee", "transform_cell", "should_run_async", "user_expressions", "compiler_class",
)  # fmt: skip
_WATCHED_KERNEL = (
    "do_execute", "init_metadata", "finish_metadata", "_publish_execute_input", "_forward_input",
    "_restore_input",
)  # fmt: skip
_AWAITS = re.compile("await|async")
# One simple statement on one line, or no Python at all: no suite, in which results are not shown
_SIMPLE = re.compile(
    r"(?!(?:async|case|class|def|for|if|match|try|while|with)\b)(?!.*__future__)"
    r"[^\s@;][^;\n\r\f]*\n?"
)
_TOP_LEVEL_AWAIT = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT


def fingerprint() -> str:
    """Of the functions that the short way was written after, as they stand."""
    digest = hashlib.sha256()
    for function in COPIED:
        digest.update(inspect.getsource(inspect.unwrap(function)).encode())
    return digest.hexdigest()[:32]


def find_express(kernel: Any) -> Express | None:
    """The short way of this kernel; None where it is not known to be the same."""
    try:
        if fingerprint() != KNOWN:
            return None
    except (OSError, TypeError):  # no source to compare
        return None
    return Express(kernel)


class Express:
    """The short way of one kernel's cells."""

    def __init__(self, kernel: Any) -> None:
        shell = self._shell = kernel.shell
        self._kernel = kernel
        self._pump = kernel.session.pump
        self._main = threading.main_thread().ident
        self._usual: list[tuple[Any, str, Any]] = []
        self._tee: Tee
        hook = shell.displayhook
        if type(hook) is ZMQShellDisplayHook:
            self._hook = hook
            hook.update_user_ns = self._update_user_ns
            hook.log_output = self._log_output
            hook.finish_displayhook = self._finish_displayhook

    def watch(self, tee: Tee) -> None:
        """The shell is as it is to be: from now on the short way is for one that nobody changes."""
        self._tee = tee
        kernel, shell = self._kernel, self._shell
        self._usual = [
            *((shell, name, getattr(shell, name)) for name in _WATCHED),
            *((kernel, name, getattr(kernel, name)) for name in _WATCHED_KERNEL),
            (type(shell.compile), "ast_parse", type(shell.compile).ast_parse),
            (type(shell.compile), "extra_flags", type(shell.compile).extra_flags),
            (HistoryManager, "store_inputs", HistoryManager.store_inputs),
            (HistoryManager, "store_output", HistoryManager.store_output),
            (type(shell.payload_manager), "clear_payload", PayloadManager.clear_payload),
        ]

    def fits(self, parent: dict[str, Any]) -> bool:
        """Whether this request may go the short way."""
        content = parent["content"]
        code = content.get("code")
        if (
            type(code) is not str
            or content.get("silent", False) is not False
            or type(content.get("store_history", True)) is not bool
            or content.get("user_expressions")
            or type(content.get("allow_stdin", False)) is not bool
            or _AWAITS.search(code)
            or threading.get_ident() != self._main
        ):
            return False
        for owner, name, usual in self._usual:
            if getattr(owner, name, None) != usual:
                return False
        shell = self._shell
        return (
            type(shell.history_manager) is HistoryManager
            and type(shell.compile) is XCachingCompiler
            and "ast_parse" not in vars(shell.compile)
            and "store_inputs" not in vars(shell.history_manager)
            and shell.trio_runner is None
        )

    async def execute(self, stream: Any, parent: dict[str, Any]) -> None:
        """Kernel.execute_request of ipykernel, for a request that fits."""
        kernel, shell = self._kernel, self._shell
        content = parent["content"]
        code = content["code"]
        options = {
            "store_history": content.get("store_history", True),
            "user_expressions": content.get("user_expressions", {}),
            "allow_stdin": content.get("allow_stdin", False),
            "cell_meta": parent["metadata"],
            "cell_id": parent["metadata"].get("cellId"),
        }
        metadata = kernel.init_metadata(parent)
        kernel.session.send(
            "iopub",
            "execute_input",
            {"code": code, "execution_count": shell.execution_count},
            parent,
        )
        try:
            cell = shell.transform_cell(code)
        except Exception:
            cell = None  # the long way tells of it
        if cell is None or _AWAITS.search(cell):
            reply = json_clean(await kernel.do_execute(code, False, **options))
        else:
            reply = self._do_execute(code, cell, options)
        # What came out by the descriptors, too, goes before the reply
        self._flush()
        kernel.finish_metadata(parent, metadata, reply)
        kernel.session.send(stream, "execute_reply", reply, parent, metadata=metadata)

    def _flush(self) -> None:
        """``sys.stdout.flush()`` and ``sys.stderr.flush()``, which look at the same descriptors."""
        out: Any = sys.stdout
        err: Any = sys.stderr
        if _is_ours(out) and _is_ours(err) and os.getpid() == out._master_pid:
            self._pump.drain()
            if out.holds():
                out.flush()
            if err.holds():
                err.flush()
            return
        if out is not None:
            out.flush()
        if err is not None:
            err.flush()

    # --- ipykernel's do_execute, IPython's run_cell ---

    def _do_execute(self, code: str, cell: str, options: dict[str, Any]) -> dict[str, Any]:
        kernel, shell, pump = self._kernel, self._shell, self._pump
        pump.running += 1
        put(kernel, "_allow_stdin", options["allow_stdin"])
        kernel._sys_raw_input, builtins.input = builtins.input, kernel.raw_input
        kernel._save_getpass, getpass.getpass = getpass.getpass, kernel.getpass
        try:
            shell._last_traceback = None
            shell._last_traceback_during_displayhook = False
            result = self._run_cell(code, cell, options)
        finally:
            builtins.input = kernel._sys_raw_input
            getpass.getpass = kernel._save_getpass
            pump.running -= 1
        if (
            result.error_before_exec is None
            and result.error_in_exec is None
            and not shell._last_traceback_during_displayhook
        ):
            reply = {
                "status": "ok",
                "execution_count": shell.execution_count - 1,
                "user_expressions": {},
            }
        else:
            error = result.error_before_exec
            error = result.error_in_exec if error is None else error
            reply = {
                "status": "error",
                "traceback": shell._last_traceback or [],
                "ename": str(type(error).__name__),
                "evalue": str(error),
                "engine_info": {
                    "engine_uuid": kernel.ident, "engine_id": kernel.int_id, "method": "execute",
                },
                "execution_count": shell.execution_count - 1,
                "user_expressions": {},
            }  # fmt: skip
            kernel.log.info("Exception in execute request:\n%s", "\n".join(reply["traceback"]))
        payload = shell.payload_manager.read_payload()
        reply["payload"] = payload
        if payload or reply["status"] == "error":
            shell.payload_manager.clear_payload()
            reply = json_clean(reply)
        return reply

    def _run_cell(self, code: str, cell: str, options: dict[str, Any]) -> Any:
        shell = self._shell
        info = ExecutionInfo(
            code,
            options["store_history"],
            False,
            True,
            options["cell_id"],
            options["cell_meta"],
            transformed_cell=cell,
        )
        out: Any = sys.stdout
        err: Any = sys.stderr
        if type(out) is not PortStream or type(err) is not PortStream:  # the user's
            with shell._tee(channel="stdout"), shell._tee(channel="stderr"):
                return self._run_hooked(info)
        keep, count = self._tee.keep, shell.execution_count
        before = out.keep(partial(keep, "stdout", count)), err.keep(partial(keep, "stderr", count))
        try:
            return self._run_hooked(info)
        finally:
            err.keep(before[1])
            out.keep(before[0])

    def _run_hooked(self, info: Any) -> Any:
        shell = self._shell
        result = None
        try:
            try:
                result = self._run(info)
            except BaseException as error:
                try:
                    result = ExecutionResult(info)
                    result.error_in_exec = error
                    shell.showtraceback(running_compiled_code=True)
                except:  # noqa: E722, S110 - as IPython has it
                    pass
        finally:
            shell.events.trigger("post_execute")
            shell.events.trigger("post_run_cell", result)
        return result

    def _run(self, info: Any) -> Any:
        """InteractiveShell.run_cell_async, for such a cell."""
        shell = self._shell
        code, cell = info.raw_cell, info.transformed_cell
        result = ExecutionResult(info)
        if not code or code.isspace():
            put(shell, "last_execution_succeeded", True)
            put(shell, "last_execution_result", result)
            return result
        count = result.execution_count = shell.execution_count
        store = info.store_history
        if store:
            put(shell, "execution_count", count + 1)
        history = shell.history_manager

        def error_before_exec(error: BaseException) -> Any:
            if store:
                history.exceptions[count] = shell._format_exception_for_storage(error)
            result.error_before_exec = error
            shell.last_execution_succeeded = False
            shell.last_execution_result = result
            return result

        shell.events.trigger("pre_execute")
        shell.events.trigger("pre_run_cell", info)
        if "get_ipython().run_line_magic(" in cell and "paste" in cell:
            store = False
        if store:
            self._store_inputs(history, count, cell, code)
        if shell.logger.log_active:
            shell.logger.log(cell, code)
        compiler = shell.compile
        with shell.builtin_trap:
            name = compiler.cache(cell, count, raw_code=code)
            with shell.display_trap:
                hook = shell.displayhook
                single = self._compile_simple(cell, name)
                if single is None:
                    try:
                        tree = compiler.ast_parse(cell, filename=name)
                    except shell.custom_exceptions as error:
                        shell.CustomTB(*sys.exc_info())
                        return error_before_exec(error)
                    except IndentationError as error:
                        shell.showindentationerror()
                        return error_before_exec(error)
                    except (
                        OverflowError,
                        SyntaxError,
                        ValueError,
                        TypeError,
                        MemoryError,
                    ) as error:
                        shell.showsyntaxerror()
                        return error_before_exec(error)
                    try:
                        tree = shell.transform_ast(tree)
                    except InputRejected as error:
                        shell.showtraceback()
                        return error_before_exec(error)
                put(hook, "exec_result", result)
                if single is not None:
                    raised = _finish(shell.run_code(single, result, async_=False))
                    if not raised and softspace(sys.stdout, 0):
                        print()
                else:
                    raised = _finish(
                        shell.run_ast_nodes(
                            tree.body,
                            name,
                            interactivity=shell.ast_node_interactivity,
                            compiler=compiler,
                            result=result,
                        )
                    )
                put(shell, "last_execution_succeeded", not raised)
                put(shell, "last_execution_result", result)
                put(hook, "exec_result", None)
        if store:
            if history.db_log_output:
                history.store_output(count)
            if result.error_in_exec:
                history.exceptions[count] = shell._format_exception_for_storage(
                    result.error_in_exec
                )
        return result

    def _compile_simple(self, cell: str, name: str) -> Any:
        """A cell of one simple statement as run_ast_nodes would compile it; None: it has to.

        There it goes from text to a tree of Python objects, and from that to code.
        """
        shell = self._shell
        if (
            shell.ast_transformers
            or shell.ast_node_interactivity not in ("last_expr", "last", "all")
            or not _SIMPLE.fullmatch(cell)
        ):
            return None
        flags = _TOP_LEVEL_AWAIT if shell.autoawait else 0
        try:
            return compile(cell, name, "single", shell.compile.flags | flags, True)
        except Exception:  # tells of it the usual way
            return None

    def _store_inputs(self, history: Any, count: int, source: str, raw: str) -> None:
        """HistoryManager.store_inputs."""
        source, raw = source.rstrip("\n"), raw.rstrip("\n")
        if history._exit_re.match(raw.strip()):
            return
        history.input_hist_parsed.append(source)
        history.input_hist_raw.append(raw)
        with history.db_input_cache_lock:
            cache = history.db_input_cache
            cache.append((count, source, raw))
            if history.using_thread and len(cache) >= history.db_cache_size:
                history._restart_thread_if_stopped()
                if history.save_flag is not None:
                    history.save_flag.set()
        known = history._ii, history._i, history._i00
        for trait, value in zip(("_iii", "_ii", "_i", "_i00"), (*known, raw), strict=True):
            put(history, trait, value)
        names = {"_i": known[2], "_ii": known[1], "_iii": known[0], f"_i{count}": raw}
        self._push(names)

    def _push(self, names: dict[str, Any]) -> None:
        """InteractiveShell.push, of what is not the user's own."""
        self._shell.user_ns.update(names)
        self._shell.user_ns_hidden.update(names)

    # --- what a result goes through ---

    def _update_user_ns(self, result: Any) -> None:
        """DisplayHook.update_user_ns."""
        hook, shell = self._hook, self._shell
        names = shell.user_ns
        kept = names["_oh"]
        if not hook.cache_size or result is kept:
            return
        if len(kept) >= hook.cache_size and hook.do_full_cache:
            hook.cull_cache()
        hidden = shell.user_ns_hidden
        ours = True
        for under in ("_", "__", "___"):
            if under not in names:
                continue
            if under in hidden:
                if hidden[under] is names[under]:
                    continue
            elif getattr(hook, under) is names[under]:
                continue
            ours = False
        hook.___, hook.__, hook._ = hook.__, hook._, result
        if "_" not in vars(builtins) and ours:
            self._push({"_": hook._, "__": hook.__, "___": hook.___})
        if hook.do_full_cache:
            count = shell.execution_count - 1
            self._push({f"_{count}": result})
            names["_oh"][count] = result

    def _log_output(self, format_dict: dict[str, Any]) -> None:
        """DisplayHook.log_output."""
        shell = self._shell
        count = shell.execution_count - 1
        history = shell.history_manager
        history.outputs[count].append(
            HistoryOutput(output_type="execute_result", bundle=format_dict)
        )
        if "text/plain" in format_dict:
            if shell.logger.log_output:
                shell.logger.log_write(format_dict["text/plain"], "output")
            history.output_hist_reprs[count] = format_dict["text/plain"]

    def _finish_displayhook(self) -> None:
        """ZMQShellDisplayHook.finish_displayhook."""
        hook = self._hook
        self._flush()
        message = hook.msg
        if message and message["content"]["data"] and hook.session:
            for change in hook._hooks:
                message = change(message)
                if message is None:
                    hook.msg = None
                    return
            hook.session.send(hook.pub_socket, message, ident=hook.topic)
        hook.msg = None


def _is_ours(stream: Any) -> bool:
    return type(stream) is PortStream and "flush" not in vars(stream)


def put(owner: Any, name: str, value: Any) -> None:
    """``setattr(owner, name, value)``, where nobody watches the trait and the value fits it."""
    watchers = owner._trait_notifiers
    if (
        name in watchers
        or name in owner._trait_validators
        or any(watchers.get(All, _NONE).values())
    ):
        setattr(owner, name, value)
    else:
        owner._trait_values[name] = value


_NONE: dict[Any, Any] = {}


def _finish(steps: Any) -> Any:
    """Run a coroutine that waits for nothing; as IPython's ``_pseudo_sync_runner``."""
    try:
        steps.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError(f"{steps.__name__!r} needs a real async loop")
