"""What is known of a run at its end: the JSON document of ``run`` and ``exec``. Floor 5."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmkernel.errors import VmError
    from vmkernel.host.registry import VmRecord
    from vmkernel.models import Output, RunResult


class Account:
    """Filled in as the run goes on; printed once."""

    def __init__(self) -> None:
        self.vm: dict[str, Any] | None = None
        self.result: RunResult | None = None
        self.files: dict[str, list[dict[str, Any]]] = {"in": [], "out": []}
        self.room = 0
        """Bytes of output to be kept of a run that does not come to its end"""
        self._heard: dict[str, list[str]] = {"stdout": [], "stderr": []}

    def hear(self, output: Output) -> None:
        """Remember what was said: a run that is cut off has no result to tell it."""
        if output.msg_type == "stream" and self.room > 0:
            text = str(output.content.get("text", ""))[: self.room]
            self.room -= len(text)
            name = "stderr" if output.content.get("name") == "stderr" else "stdout"
            self._heard[name].append(text)

    def print(self, exit_code: int, error: VmError | None = None) -> None:
        """Print the document; *error* is vmkernel's own."""
        from vmkernel.cli.output import print_json
        from vmkernel.text import plain_text

        result = self.result
        said = {name: "".join(parts) for name, parts in self._heard.items()}
        code_error = None
        if result is not None:
            said = {"stdout": result.stdout, "stderr": result.stderr}
            if result.error is not None:
                code_error = {
                    "name": result.error.name,
                    "value": result.error.value,
                    "traceback": plain_text("\n".join(result.error.traceback)),
                }
        print_json(
            {
                "exit_code": exit_code,
                **said,
                "results": [] if result is None else result.results,
                "error": code_error,
                "duration": None if result is None else result.duration,
                "truncated": self.room <= 0 if result is None else result.truncated,
                "vm": self.vm,
                "files": self.files,
                "failure": None if error is None else _failure(error),
            }
        )


def describe(record: VmRecord) -> dict[str, Any]:
    """A VM that runs, for programs."""
    return {
        "id": record.vm_id,
        "name": record.name,
        "state": record.state,
        "recipe": record.recipe,
        "language": record.language,
        "accelerator": record.accelerator,
        "template": record.template,
        "memory_limit": record.memory << 20,
        "vcpus": record.vcpus,
        "pid": record.qemu_pid,
        "runner_pid": record.runner_pid,
        "log_dir": record.log_dir,
    }


def _failure(error: VmError) -> dict[str, Any]:
    return {
        "kind": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "log_path": error.log_path,
        "code_ran": error.code_ran,
    }
