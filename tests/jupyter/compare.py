"""Where two kernels differ, message by message, when one client runs the same notebook on both.

    python tests/jupyter/compare.py tests/jupyter/notebooks/errors.ipy --kernels plain vmsandbox
    python tests/jupyter/compare.py --all --kernels plain vmsandbox

A notebook is an ``.ipynb`` file, or an ``.ipy`` file: a step after each line that begins with
``# %%``. Such a line may go on with a message type and a JSON object::

    # %%                                          a cell
    # %% {"silent": true, "answers": ["Ada"]}     a cell with options
    # %% complete_request {"cursor_pos": 3}       any request; the step's text is its ``code``

The object's keys are the request's content, except those of `Step`. A kernel's *transcript* is
all messages of all channels in order of arrival. Two transcripts are compared step by step and
channel by channel (what comes first on two sockets is chance). Of a message everything counts
(type, parent header, content, metadata, buffers, the header's names) but what `Normaliser` takes
out. Differences that are known and meant are in `KNOWN`, each with its reason.
"""

from __future__ import annotations

import argparse
import base64
import copy
import json
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import nbformat
from kernel_client import Cell, Kernel, Message

from vmkernel.settings import load_settings

NOTEBOOKS = Path(__file__).parent / "notebooks"
PNG = b"\x89PNG\r\n\x1a\n"
LONG = 120.0
"""Seconds within which every step has ended."""
SETTLE = 0.1
"""Seconds to listen after a step's end; a step whose output comes later says so itself."""

# --- what is run ---

_HEAD = re.compile(r"^# %%(?: +(\w+))?(?: +(\{.*\}))?$", re.MULTILINE)
_WITH_CODE = ("execute_request", "complete_request", "inspect_request", "is_complete_request")


@dataclass
class Step:
    """One request of a notebook."""

    msg_type: str
    content: Message
    channel: str = "shell"
    answers: list[str] = field(default_factory=list)
    """What is typed at each question."""
    interrupt_at: str = ""
    """The kernel is interrupted a moment after the cell has printed this."""
    listen: float = SETTLE
    """Seconds to listen after the end."""
    wait: bool = True
    """False: the next step is sent at once."""
    metadata: Message = field(default_factory=dict)
    """Of the request."""
    header: Message = field(default_factory=dict)
    """What the request's header has besides the usual."""

    def __str__(self) -> str:
        return (
            f"{self.msg_type} {self.content.get('code', '').strip().partition(chr(10))[0][:60]!r}"
        )


_OWN = ("channel", "answers", "interrupt_at", "listen", "wait", "metadata", "header")


def steps_of(path: Path) -> list[Step]:
    """The steps of a notebook file."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        return [
            _step("execute_request", {"metadata": {"cellId": cell.get("id", "")}}, cell.source)
            for cell in cells
            if cell.cell_type == "code"
        ]
    text = path.read_text()
    heads = list(_HEAD.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return [
        _step(head[1] or "execute_request", json.loads(head[2] or "{}"), text[head.end() : end])
        for head, end in zip(heads, ends, strict=True)
    ]


def _step(msg_type: str, options: Message, text: str) -> Step:
    own = {key: options.pop(key) for key in _OWN if key in options}
    if msg_type in _WITH_CODE:
        options.setdefault("code", text.strip("\n"))
    if msg_type == "execute_request":
        usual = {"silent": False, "store_history": True, "user_expressions": {},
                 "allow_stdin": bool(own.get("answers")), "stop_on_error": True}  # fmt: skip
        options = {**usual, **options}
    elif msg_type in ("complete_request", "inspect_request"):
        options.setdefault("cursor_pos", len(options["code"]))
    return Step(msg_type, options, **own)


# --- what came ---


class Recorder(Kernel):
    """A kernel of which every message is kept in order, with its channel."""

    def __init__(self, name: str, **options: Any) -> None:
        self.heard: list[tuple[str, Message]] = []
        super().__init__(name, **options)

    def on_message(self, channel: str, message: Message) -> None:
        """Keep a message."""
        self.heard.append((channel, message))

    def play(self, step: Step) -> Cell:
        """Send a step's request, and see to its questions and its interrupt."""
        message = self.raw.session.msg(step.msg_type, step.content, metadata=step.metadata)
        message["header"].update(step.header)
        cell = self.of(message["header"]["msg_id"])
        cell.request = message
        getattr(self.raw, f"{step.channel}_channel").send(message)
        for number, answer in enumerate(step.answers, 1):
            self.wait(lambda n=number: len(cell.questions) >= n, f"a question in {step}", LONG)
            self.raw.input(answer)
        if step.interrupt_at:
            self.wait_output(cell, step.interrupt_at)
            self.listen(0.5)
            self.manager.interrupt_kernel()
        return cell


@dataclass
class Heard:
    """A message as it is compared."""

    channel: str
    msg_type: str
    parent: str
    body: Message
    """content, metadata, buffers, the header's names, and what is wrong with the parent header."""

    @property
    def key(self) -> tuple[str, str]:
        """By which two transcripts are aligned."""
        return self.msg_type, self.parent

    def __str__(self) -> str:
        body = {key: value for key, value in self.body.items() if value and key != "header"}
        return f"{self.channel} {self.msg_type} (of step {self.parent}) {body}"


Transcript = list[list[Heard]]
"""For each step what came from its sending on until the next one's sending."""


def record(kernel: str, steps: Iterable[Step], env: dict[str, str] | None = None) -> Transcript:
    """Start a kernel by its kernelspec's name, run the steps, shut it down."""
    with tempfile.TemporaryDirectory(prefix="compare-") as directory:
        return _record(kernel, steps, {**_fresh_home(directory), **(env or {})}, directory)


def record_both(kernels: Sequence[str], steps: Sequence[Step]) -> list[Transcript]:
    """The transcripts of two kernels, recorded at the same time."""
    with ThreadPoolExecutor(len(kernels)) as pool:
        return list(pool.map(lambda name: record(name, steps), kernels))


def _fresh_home(directory: str) -> dict[str, str]:
    """The environment of a user who starts the first kernel of a new life, in the home directory:
    that is what a cell finds in a VM."""
    settings = load_settings()
    return {
        "HOME": directory,
        "IPYTHONDIR": f"{directory}/.ipython",
        "VMKERNEL_IMAGES_DIR": str(settings.images_dir),
        "VMKERNEL_CACHE_DIR": str(settings.cache_dir),
        "VMKERNEL_STATE_DIR": str(settings.state_dir),
        "VMKERNEL_HISTORY_FILE": f"{directory}/.history.sqlite",
    }


def _record(
    kernel: str, steps: Iterable[Step], env: dict[str, str], directory: str
) -> Transcript:  # fmt: skip
    # What it says outside of Jupyter's protocol is no part of the comparison.
    recorder = Recorder(
        kernel, env=env, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    # It is in /tmp on the host, and in /home in a VM.
    where = recorder.run("", silent=True, user_expressions={"d": "__import__('os').getcwd()"})
    cwd = where.reply["user_expressions"]["d"]["data"]["text/plain"].strip("'")
    normaliser = Normaliser(cwd)
    transcript: Transcript = []
    cells: list[Cell] = []
    waiting: list[Cell] = []
    try:
        recorder.listen(SETTLE)
        recorder.heard.clear()
        for step in steps:
            cells.append(recorder.play(step))
            waiting.append(cells[-1])
            if step.wait:
                for cell in waiting:
                    _finish(recorder, cell, step)
                waiting.clear()
                recorder.listen(step.listen)
            transcript.append(normaliser.messages(recorder.heard, cells))
            recorder.heard.clear()
        return transcript
    finally:
        recorder.shut_down()


def _finish(recorder: Recorder, cell: Cell, step: Step) -> None:
    comm = cell.request["header"]["msg_type"].startswith("comm_")
    what = f"the end of {step}: {cell}"
    recorder.wait(lambda: cell.idle if comm else cell.done, what, LONG)


# --- what is not compared ---

# A path begins here: at a word's start, or after a colour.
_PATH = r"(?:(?<=\x1b\[\dm)|(?<=\x1b\[\d\dm)|(?<![\w./~-]))[/~][\w./~-]*"
SUBSTITUTIONS = (
    # The host's temporary directory is the test session's own.
    (re.compile(r"/tmp/vmk-test-\w+/tmp(?=/ipykernel_|[^/\w]|$)"), "/tmp"),
    # IPython names a cell's file after the kernel's process and the cell's text.
    (re.compile(r"/tmp/ipykernel_\d+/(\d+)\.py"), r"<process>/\1.py"),
    # Where libraries lie differs between the host's environment and the guest's image.
    (re.compile(rf"{_PATH}/(?:site|dist)-packages/"), "<packages>/"),
    (re.compile(rf"{_PATH}/lib/python3\.\d+/"), "<library>/"),
    # Objects lie elsewhere.
    (re.compile(r"\b0x[0-9a-f]{6,}"), "0x…"),
    # Processes and threads have other numbers, and a kernel has threads of its own.
    (re.compile(r"\b(pid|thread id|thread count)([=:] ?)\d+"), r"\1\2<number>"),
    (re.compile(r"/tmp/ipykernel_\d+/"), "<process>/"),
    # What was measured (%time, %timeit, "ran for …").
    (re.compile(r"\b\d+(?:\.\d+)?(?:e[+-]\d+)? ?(?:ns|[µμu]s|ms|s|min|h)\b"), "<time>"),
    # Moments (reply metadata "started").
    (re.compile(r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[.\d]*(?:Z|[+-]\d\d:\d\d)?"), "<date>"),
)
# A frame of IPython's tracebacks in the standard library: file and function, but not the lines,
# which are another version's.
_LIBRARY_FRAME = re.compile(
    r"^(\x1b\[36mFile \x1b\[39m\x1b\[32m<(?:library|frozen)[^\x1b]+):\d+(.*)\n[\s\S]*"
)
# What newer Pythons underline in more places.
_CARETS = re.compile(r"^[ |+]*[~^]{2,}\n", re.MULTILINE)
_IDENTIFIER = re.compile(
    r"(?<![0-9A-Za-z])(?:[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}(?:_\d+_\d+)?|[0-9a-f]{16})\b",
    re.IGNORECASE,
)


def normal(output: Message) -> Message:
    """An output without what must differ between two kernels that do the same."""
    output = copy.deepcopy(dict(output))
    data = output.get("data", {})
    for mime in data:
        if mime == "image/png" and base64.b64decode(data[mime]).startswith(PNG):
            # The pixels depend on how the libraries were built, down to the fonts.
            data[mime] = "<a picture>"
    result = in_texts(output, _substituted)
    assert isinstance(result, dict)
    return result


def _substituted(text: str) -> str:
    for pattern, replacement in SUBSTITUTIONS:
        text = pattern.sub(replacement, text)
    return _CARETS.sub("", _LIBRARY_FRAME.sub(r"\1\2", text))


def in_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of *value* with each text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): in_texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [in_texts(item, change) for item in value]
    return value


class Normaliser:
    """Takes out of one kernel's messages what differs between any two runs.

    * message ids, dates, sessions, user names of headers; the parent is told by its step;
    * other identifiers (uuids of comms, subshells, engines): numbered as they appear;
    * what `SUBSTITUTIONS` names, the lines of the standard library in tracebacks, and the pixels
      of pictures;
    * the working directory, *cwd*;
    * where a stream is cut: neighbours of one stream and one parent are joined.
    """

    def __init__(self, cwd: str = "/no/such/place") -> None:
        self._cwd = cwd
        self._numbers: dict[str, int] = {}

    def messages(self, heard: list[tuple[str, Message]], cells: list[Cell]) -> list[Heard]:
        """Messages as they are compared; *cells* are all that were sent so far."""
        result: list[Heard] = []
        for channel, message in heard:
            one = self._message(channel, message, cells)
            if one is not None and not _join(result, one):
                result.append(one)
        return result

    def _message(self, channel: str, message: Message, cells: list[Cell]) -> Heard | None:
        header, parent = message["header"], message["parent_header"]
        number, request = next(
            ((str(n), cell.request) for n, cell in enumerate(cells, 1)
             if cell.msg_id == parent.get("msg_id")),
            ("none" if not parent else "unknown", None),
        )  # fmt: skip
        if request is None and parent.get("msg_type") in (
            "interrupt_request",
            "kernel_info_request",
        ):
            return None  # of the tool itself, not of the notebook
        body = normal(message["content"])
        whole = {
            "content": body,
            "metadata": message["metadata"],
            "buffers": [bytes(buffer).hex() for buffer in message.get("buffers", ())],
            "header": sorted(key for key in header if key != "subshell_id" or header[key]),
            "parent header": _wrong_names(parent, request),
        }
        whole = in_texts(whole, self._without_chance)
        return Heard(channel, message["msg_type"], number, whole)

    def _without_chance(self, text: str) -> str:
        text = _substituted(text.replace(self._cwd, "<directory>"))
        return _IDENTIFIER.sub(self._number, text)

    def _number(self, match: re.Match[str]) -> str:
        number = self._numbers.setdefault(match[0].replace("-", "").lower(), len(self._numbers))
        return f"<id {number}>"


def _wrong_names(parent: Message, request: Message | None) -> list[str]:
    """Where a parent header is not the header of the request."""
    if request is None:
        return sorted(parent)
    sent = request["header"]
    return sorted(
        key for key in sent.keys() | parent.keys()
        if key != "date" and sent.get(key) != parent.get(key)
    )  # fmt: skip


def _join(sequence: list[Heard], one: Heard) -> bool:
    """Put a piece of a stream to the last one of its channel, if that is the same stream."""
    last = next((item for item in reversed(sequence) if item.channel == one.channel), None)
    if one.msg_type != "stream" or last is None or last.key != one.key:
        return False
    mine, its = one.body["content"], last.body["content"]
    if mine["name"] != its["name"]:
        return False
    its["text"] += mine["text"]
    return True


# --- the comparison ---


@dataclass
class Difference:
    """Something that is not the same on both kernels."""

    step: int
    """From 1 on."""
    what: str
    """``iopub stream/content/text``, or ``iopub stream`` where a message is missing or too much."""
    one: Any
    other: Any
    """The values; None: not there."""

    def __str__(self) -> str:
        one, other = _around(self.one, self.other)
        return f"step {self.step}: {self.what}\n   one:   {one}\n   other: {other}"


def differences(one: Transcript, other: Transcript) -> list[Difference]:
    """Where two transcripts of the same steps differ."""
    found: list[Difference] = []
    for number, (mine, theirs) in enumerate(zip(one, other, strict=True), 1):
        for channel in ("iopub", "shell", "control", "stdin"):
            found += _channel_differences(
                number, [m for m in mine if m.channel == channel],
                [m for m in theirs if m.channel == channel],
            )  # fmt: skip
    return found


def _channel_differences(
    step: int, mine: list[Heard], theirs: list[Heard]
) -> Iterator[Difference]:  # fmt: skip
    keys = [message.key for message in mine], [message.key for message in theirs]
    matcher = SequenceMatcher(None, *keys, autojunk=False)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag == "equal":
            for a, b in zip(mine[i:i_end], theirs[j:j_end], strict=True):
                for path, left, right in _unequal(a.body, b.body):
                    what = f"{a.channel} {a.msg_type}/{'/'.join(path)}"
                    yield Difference(step, what, left, right)
        else:
            for message in mine[i:i_end]:
                yield Difference(step, f"{message.channel} {message.msg_type}", message, None)
            for message in theirs[j:j_end]:
                yield Difference(step, f"{message.channel} {message.msg_type}", None, message)


def _unequal(one: Any, other: Any) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Paths at which two JSON values differ, and the values there."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            for path, left, right in _unequal(one.get(key), other.get(key)):
                yield (key, *path), left, right
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, (left_item, right_item) in enumerate(zip(one, other, strict=True)):
            for path, left, right in _unequal(left_item, right_item):
                yield (str(index), *path), left, right
    elif one != other or type(one) is not type(other):
        yield (), one, other


def _text(value: Any) -> str:
    return str(value) if isinstance(value, Heard) else repr(value)


def _short(value: Any) -> str:
    return textwrap.shorten(_text(value), 400, placeholder=" …")


def _around(one: Any, other: Any) -> tuple[str, str]:
    """Both values from shortly before the place where they begin to differ."""
    texts = _text(one), _text(other)
    pairs = enumerate(zip(*texts, strict=False))
    begin = max(0, next((i for i, (a, b) in pairs if a != b), 0) - 80)
    first, second = (("… " if begin else "") + text[begin : begin + 1000] for text in texts)
    return first, second


# --- differences that are meant ---


@dataclass(frozen=True)
class Known:
    """A difference that is meant.  ``docs/parity.md`` has each, by its name."""

    name: str
    what: str
    """A regular expression of `Difference.what`."""
    value: str = ""
    """A regular expression that occurs in one of the two values."""

    def covers(self, difference: Difference) -> bool:
        """Whether this is it."""
        values = f"{_text(difference.one)}\n{_text(difference.other)}"
        return bool(re.fullmatch(self.what, difference.what) and re.search(self.value, values))


KNOWN = (
    Known("kernel-info", r"\w+ kernel_info_reply/content/(banner|implementation|protocol_version)"),
    Known("version", r"\w+ kernel_info_reply/content/(language_info/version|help_links/0/url)"),
    Known("usage", r"control usage_reply/content/.+"),
    Known(
        "completion-dot",
        r"shell complete_reply/content/(cursor_start|matches/\d+|metadata/.+/(start|text))",
    ),
    Known("history-session", r"shell history_reply/content/history/\d+/0", r"^0\n"),
    Known("json-nan", r"iopub display_data/content/data/application/json/n", "nan"),
    Known("json-nan", r"iopub stream", "Out of range float values"),
    Known("kernel-log", r"iopub stream", "No such comm"),
    Known("connect-info", r"iopub stream/content/text", "shell_port"),
    Known("vm-magic", r"iopub execute_result/content/data/text/plain", r"%vm "),
    Known("aborted-engine", r"shell execute_reply/metadata/engine"),
    # Links get rel="noopener"; IPython's Code has its style sheet first (docs/outputs.md)
    Known("links", r"iopub execute_result/content/data/text/html", "noopener noreferrer"),
    Known("code", r"iopub execute_result/content/data/text/html", "output_html"),
    Known("svg", r"iopub \w+/content/data/image/svg\+xml", "<svg "),
    Known("input-frame", r".+/traceback/\d+", r"PortKernel\b.+_input_request"),
)


def surprises(found: Iterable[Difference]) -> list[Difference]:
    """The differences that nobody has given a reason for."""
    return [one for one in found if not any(known.covers(one) for known in KNOWN)]


def main() -> int:
    """The command line; 1 when there are differences that are not known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK")
    parser.add_argument("--all", action="store_true", help=f"every notebook in {NOTEBOOKS.name}/")
    parser.add_argument("--kernels", nargs=2, required=True, metavar="KERNEL")
    parser.add_argument("--transcript", action="store_true", help="show what the first one says")
    arguments = parser.parse_args()
    paths = arguments.notebooks + (sorted(NOTEBOOKS.glob("*.ipy")) if arguments.all else [])
    if not paths:
        parser.error("name a notebook, or --all")
    bad = 0
    for path in paths:
        steps = steps_of(path)
        one, other = record_both(arguments.kernels, steps)
        if arguments.transcript:
            for step, messages in zip(steps, one, strict=True):
                print(f"--- {step}", *messages, sep="\n")
        found = differences(one, other)
        unknown = surprises(found)
        bad += len(unknown)
        count = sum(map(len, one))
        print(f"\n{path.name}: {len(steps)} steps, {count} messages, {len(found)} differences, "
              f"{len(unknown)} of them not known")  # fmt: skip
        for difference in unknown:
            print(f" {steps[difference.step - 1]}\n  {difference}", flush=True)
        known = {k.name for d in found for k in KNOWN if k.covers(d)}
        if known:
            print(f"  known: {', '.join(sorted(known))}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
