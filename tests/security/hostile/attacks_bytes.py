"""Attacks on the framing: bytes that are no messages, and lengths that lie."""

from __future__ import annotations

import os
import time

from hostile.attack import DIED, SERVED, STOPPED, Attacks
from hostile.program import MIB, frames

ATTACKS = attack = Attacks()
PORTS = ("kernel", "agent", "control")


@attack(STOPPED, each="port", of=PORTS)
def random_bytes(guest, port):
    """Noise."""
    guest.raw(port, b"\xff" + os.urandom(4 * MIB))
    time.sleep(2)


@attack(STOPPED, each="port", of=("kernel", "agent"))
def an_empty_frame(guest, port):
    """A frame of no bytes."""
    guest.raw(port, bytes(4))
    time.sleep(2)


@attack(STOPPED, each="port", of=("kernel", "agent"))
def a_frame_over_the_limit(guest, port):
    """A length of one more than there may be, and of two GiB."""
    guest.raw(port, (frames.MAX_FRAME + 1).to_bytes(4, "big") + bytes(MIB))
    guest.raw(port, (0x7FFF_FFFF).to_bytes(4, "big") + bytes(MIB))
    time.sleep(2)


@attack(STOPPED, peak=420, seconds=120, each="port", of=("kernel",))
def more_for_ever(guest, port):
    """A message that always goes on: memory is to grow with it."""
    frame = (0x8000_0000 | MIB).to_bytes(4, "big") + bytes(MIB)
    for _ in range(1 << 20):
        guest.raw(port, frame)


@attack(STOPPED, SERVED)
def one_byte_frames(guest):
    """A message in frames of a byte each, a hundred thousand of them, each with more to come."""
    guest.raw("kernel", (0x8000_0001).to_bytes(4, "big") + b"x")
    for _ in range(100):
        guest.raw("kernel", ((0x8000_0001).to_bytes(4, "big") + b"x") * 1000)
    guest.raw("kernel", (0x0000_0001).to_bytes(4, "big") + b"x")


@attack(STOPPED, each="length", of=(5, 1 << 20, 0xFFFF_FFFF))
def a_body_longer_than_its_message(guest, length):
    """The length of the body lies."""
    guest.raw("kernel", (8).to_bytes(4, "big") + length.to_bytes(4, "big") + b"[]..")


@attack(STOPPED)
def a_buffer_longer_than_its_message(guest):
    """The length of a buffer lies."""
    body = b"[]"
    message = len(body).to_bytes(4, "big") + body + (1 << 30).to_bytes(4, "big") + b"data"
    guest.raw("kernel", len(message).to_bytes(4, "big") + message)


@attack(STOPPED, each="count", of=(5000, 250_000))
def too_many_buffers(guest, count):
    """Buffers of no bytes, a quarter million in one frame."""
    body = b"[]"
    message = len(body).to_bytes(4, "big") + body + bytes(4 * count)
    guest.raw("kernel", len(message).to_bytes(4, "big") + message)


@attack(SERVED)
def buffers_where_none_belong(guest):
    """A stream with 4096 empty buffers and one of a MiB."""
    body = ["iopub", "stream", guest.msg_id, {}, {"name": "stdout", "text": "x"}]
    guest.message("kernel", body, [b""] * 4095 + [bytes(MIB)])


@attack(SERVED, STOPPED)
def an_empty_message(guest):
    """A body of no bytes."""
    guest.raw("kernel", (4).to_bytes(4, "big") + bytes(4))


@attack(STOPPED, each="port", of=("control",))
def an_honest_message_on_a_port_that_has_none(guest, port):
    """What leads into the guest only says something."""
    guest.message(port, ["iopub", "stream", guest.msg_id, {}, {"name": "stdout", "text": "x"}])
    time.sleep(2)


@attack(SERVED)
def slow_loris(guest):
    """A message, a byte every 20 ms."""
    body = b'["iopub","stream","' + guest.msg_id.encode() + b'",{},{"name":"stdout","text":"slow"}]'
    for byte in b"".join(bytes(piece) for piece in frames.encode(body)):
        guest.raw("kernel", bytes([byte]))
        time.sleep(0.02)


@attack(DIED)
def half_a_frame_and_a_new_kernel(guest):
    """The kernel dies in the midst of a frame, and of a message that had more to come."""
    guest.raw("kernel", (0x8000_0000 | MIB).to_bytes(4, "big") + bytes(MIB))
    guest.raw("kernel", MIB.to_bytes(4, "big") + b"half")
    guest.answer = False
    guest.died()


@attack(DIED, peak=150)
def noise_between_two_kernels(guest):
    """A kernel dies, and noise comes before the marker with which the next one begins."""

    def start(guest, command):
        del guest.on["start_kernel"]
        guest.raw("kernel", os.urandom(20 * MIB))
        guest.command(command["id"], {k: v for k, v in command.items() if k != "id"}, [])

    guest.on["start_kernel"] = start
    guest.answer = False
    guest.died()
