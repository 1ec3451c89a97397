"""What takes long: gigabytes of output, and the largest message that there may be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hostile.attack import code_of
from hostile.rig import Rig
from kernel_client import Cell

pytestmark = [pytest.mark.vm, pytest.mark.timeout(3600)]


def stream(guest, size):
    """So many MiB of text."""
    batch = guest.framed("stream", {"name": "stdout", "text": "x" * MIB})  # noqa: F821 - the guest's
    for _ in range(size):
        guest.raw("kernel", batch)


def texts_of(cell: Cell) -> list[str]:
    """What has arrived of its streams."""
    return [content["text"] for content in cell.contents("stream")]


def x_in(cell: Cell) -> int:
    """How many of the characters that were printed are among it."""
    return sum(len(text) for text in texts_of(cell) if set(text) == {"x"})


def test_gigabytes_of_output_take_no_memory(rig: Rig, rounds: Callable[..., int]) -> None:
    size = rounds(quick=64, full=4096)
    victim = rig.victim()
    victim.check_honest()  # its template is there: a first start tells how far that is
    victim.peak()
    cell = victim.send(code_of(stream, size=size), allow_stdin=False)
    received = waits = 0
    slowest = 0.0
    while not cell.done:
        with rig.unharmed():
            victim.listen(0.5)
            slowest = max(slowest, victim.check_responsive())
            waits += 1
        received += x_in(cell)
        cell.messages[:] = [m for m in cell.messages if set(m["content"].get("text", "")) != {"x"}]
    received += x_in(cell)
    assert cell.status == "ok"
    assert [text for text in texts_of(cell) if set(text) != {"x"}] == []
    assert received == size << 20
    peak = victim.peak()
    print(f"{size} MiB: peak {peak} MiB, slowest answer {slowest:.1f} s of {waits}")
    assert peak < 300
    victim.check_honest()


def message_of(guest, size):
    """One message of so many bytes, by hand: the guest has less memory than that."""
    head = b'["iopub","display_data","' + guest.msg_id.encode() + b'",{},{"data":{},"metadata":{}}]'
    start = len(head).to_bytes(4, "big") + head
    start += (size - len(start) - 4).to_bytes(4, "big")
    left = size
    while left:
        part = min(left, MIB)  # noqa: F821 - the guest's
        left -= part
        word = part | (0x8000_0000 if left else 0)
        guest.raw("kernel", word.to_bytes(4, "big") + start + bytes(part - len(start)))
        start = b""


@pytest.mark.parametrize("over", [0, 1])
def test_the_largest_message_passes_and_one_byte_more_ends_the_vm(
    rig: Rig, rounds: Callable[..., int], over: int
) -> None:
    from vmkernel.protocol import frames

    # Where outputs are made safe, buffers that do not belong there are left out
    victim = rig.start(VMKERNEL_OUTPUTS="trusted")
    victim.peak()
    size = rounds(quick=48 << 20, full=frames.MAX_MESSAGE) if not over else frames.MAX_MESSAGE + 1
    code = code_of(message_of, size=size)
    cell = victim.send(code, allow_stdin=False)
    while not cell.done:
        victim.check_responsive()
        victim.listen(0.2)
    peak = victim.peak()
    print(f"{size} bytes: {cell.status}, peak {peak} MiB")
    assert cell.status == ("error" if over else "ok"), cell
    assert peak < 1100
    sizes = [sum(map(len, m["buffers"])) for m in cell.messages if m["msg_type"] == "display_data"]
    assert over or size - 1000 < sum(sizes) < size
    cell.messages.clear()
    victim.check_honest()
    victim.shut_down()
