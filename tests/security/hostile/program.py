"""PID 1 of a VM whose image belongs to the attacker: root, and it knows our source.

``image.py`` puts it into the initial RAM disk in place of the agent.  It plays agent and guest
kernel faithfully, so that a template is made of it, until it is told what to do: a cell that begins
with `ATTACK` is run in here, as root, with this `Guest` at hand; so is the variable
JPY_SESSION_NAME of the wake-up, for attacks that come before the guest is awake.  Every other cell
is echoed.

Where an attack wants another answer to something, it puts a function into `Guest.on`.
"""

from __future__ import annotations

import base64
import json
import os
import select
import signal
import sys
import time
import traceback

sys.path.insert(0, "/run/vmkernel")

from vmkernel.protocol import frames

ATTACK = "# attack\n"
MIB = 1 << 20
KERNEL_INFO = {}
if os.path.exists("/run/hostile.json"):  # in the guest
    with open("/run/hostile.json") as file:
        KERNEL_INFO = json.load(file)


class Guest:
    """Agent and guest kernel in one process and thread."""

    def __init__(self):
        self.ports = {name: open_port(name) for name in ("agent", "kernel", "control")}
        self.readers = {name: frames.FrameReader() for name in self.ports}
        self.on = {}
        """What is done with a command, request or stage of that name, instead: f(guest, message)"""
        self.msg_id = ""
        """The request that is being served"""
        self.count = 0
        self.heard = []
        """Names of all that came in"""
        self.deaf = set()
        """Ports that are not read"""
        self.answer = True
        """Whether the cell that runs is replied to in the end"""

    # --- what an attack says ---

    def raw(self, port, data):
        """Bytes as they are; waits while the host does not read."""
        view = memoryview(data)
        while view:
            view = view[os.write(self.ports[port], view[:MIB]) :]

    def message(self, port, body, buffers=()):
        """A well framed message with whatever body."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.raw(port, b"".join(frames.encode(body, buffers)))

    def say(self, msg_type, content, parent=None, channel="iopub", metadata=None, buffers=()):
        """What a guest kernel says."""
        parent = self.msg_id if parent is None else parent
        self.message("kernel", [channel, msg_type, parent, metadata or {}, content], buffers)

    def agent(self, kind, **fields):
        """What an agent says."""
        self.message("agent", {"type": kind, **fields})

    def show(self, text, parent=None):
        """Print something."""
        self.say("stream", {"name": "stdout", "text": text}, parent)

    def reply(self, content=None, parent=None, msg_type="execute_reply", channel="shell"):
        """End a cell's work; by default well."""
        if content is None:
            content = {
                "status": "ok",
                "execution_count": self.count,
                "user_expressions": {},
                "payload": [],
            }
        self.say(msg_type, content, parent, channel)

    def idle(self, parent=None):
        """The last word about a request."""
        self.say("status", {"execution_state": "idle"}, parent)

    def died(self, **how):
        """The agent's word that the guest kernel ended."""
        how = {"exit_code": None, "signal": 9, "oom": False, "output": "", **how}
        self.deaf |= {"kernel", "control"}  # nobody is there, until there is another one
        self.agent("kernel_died", **how)

    def flood(self, seconds, make, limit=1 << 60):
        """Send what ``make(i)`` gives (bytes) as fast as it goes; how many."""
        end, i = time.monotonic() + seconds, 0
        while time.monotonic() < end and i < limit:
            self.raw("kernel", make(i))
            i += 1
        return i

    def framed(self, msg_type, content, times=1, channel="iopub", metadata=None):
        """Bytes of so many equal messages about this cell."""
        body = json.dumps([channel, msg_type, self.msg_id, metadata or {}, content]).encode()
        return b"".join(frames.encode(body)) * times

    # --- the faithful part ---

    def serve(self, seconds=None):
        """Be a good guest: for ever, or for so many seconds."""
        end = None if seconds is None else time.monotonic() + seconds
        while end is None or time.monotonic() < end:
            poll = select.poll()
            for name, fd in self.ports.items():
                if name not in self.deaf:
                    poll.register(fd, select.POLLIN)
            left = 3600 if end is None else max(0, end - time.monotonic())
            by_fd = {fd: name for name, fd in self.ports.items()}
            # The agent's first, as with a real one
            for fd, events in sorted(poll.poll(left * 1000)):
                if events & select.POLLIN:
                    self.receive(by_fd[fd])
                else:
                    time.sleep(0.01)  # the host's end is closed: a template is being saved

    def receive(self, port):
        """Take what came in on a port."""
        data = os.read(self.ports[port], 256 << 10)
        for message in self.readers[port].feed(data):
            body, buffers = frames.split(message)
            body = json.loads(bytes(body))
            if port == "agent":
                self.command(body["id"], body["command"], buffers)
            else:
                self.requested(*body)

    def command(self, number, command, buffers):
        """A command to the agent."""
        kind = command["type"]
        self.heard.append(kind)
        if kind in self.on:
            self.on[kind](self, {"id": number, **command})
            return
        if kind == "start_kernel":
            marker = base64.b64decode(command["marker"])
            for port in ("kernel", "control"):
                self.readers[port].resync(marker)
            self.deaf.clear()
            self.answer_command(number)
            self.raw("kernel", marker)
            self.raw("control", marker)
            self.agent("ready", kernel_info=KERNEL_INFO)
            return
        self.answer_command(number)
        if kind == "interrupt" and command["kill"]:
            self.died()

    def answer_command(self, number, result=None, error="", buffers=()):
        """The agent's reply."""
        body = {"type": "reply", "id": number, "error": error, "result": result or {}}
        self.message("agent", body, buffers)

    def requested(self, channel, msg_id, msg_type, header, metadata, content):
        """A request to the guest kernel."""
        self.heard.append(msg_type)
        if msg_type in self.on:
            self.on[msg_type](self, {"msg_id": msg_id, "channel": channel, "content": content})
        elif msg_type == "wake_request":
            code = content["env"].get("JPY_SESSION_NAME", "")
            if code.startswith(ATTACK):
                self.attack(code)
            self.wake_reply()
        elif msg_type == "execute_request":
            self.execute(msg_id, content)
        elif msg_type.endswith("_request"):
            name = msg_type.removesuffix("request")
            self.say(f"{name}reply", {"status": "ok"}, msg_id, channel)
            self.idle(msg_id)

    def wake_reply(self, **content):
        """The guest kernel is awake."""
        self.say("wake_reply", {"status": "ok", **content}, "wake", "control")

    def execute(self, msg_id, content):
        """A cell: echoed, or an attack."""
        self.msg_id, self.answer = msg_id, True
        self.count += 1
        code = content["code"]
        self.say("execute_input", {"code": code, "execution_count": self.count})
        if code.startswith(ATTACK):
            self.attack(code)
        else:
            self.show(code)
        if self.answer:
            self.msg_id = msg_id
            self.reply()
            self.idle()

    def attack(self, code):
        """Run an attack; its own mistakes are told by the name AttackFailed."""
        try:
            exec(
                code,
                {
                    "guest": self,
                    "MIB": MIB,
                    "frames": frames,
                    "json": json,
                    "os": os,
                    "time": time,
                    "KERNEL_INFO": KERNEL_INFO,
                },
            )
        except Exception:
            traceback.print_exc()
            lines = traceback.format_exc().splitlines()
            error = {"ename": "AttackFailed", "evalue": lines[-1], "traceback": lines}
            self.say("error", error)


def open_port(name):
    """The virtio port of that name, for reading and writing."""
    for entry in os.listdir("/sys/class/virtio-ports"):
        with open(f"/sys/class/virtio-ports/{entry}/name") as file:
            if file.read().strip() == name:
                return os.open(f"/dev/{entry}", os.O_RDWR | os.O_CLOEXEC)
    raise FileNotFoundError(name)


def main():
    """Never returns."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    guest = Guest()
    guest.agent("hello", kernel_release=os.uname().release, python="3")
    guest.agent("ready", kernel_info=KERNEL_INFO)
    guest.serve()


if __name__ == "__main__":
    main()
