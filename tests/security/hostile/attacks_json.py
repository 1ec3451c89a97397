"""Attacks on the decoder: bodies that are no JSON, and JSON that is not what belongs there."""

from __future__ import annotations

from hostile.attack import SERVED, STOPPED, Attacks
from hostile.program import MIB

ATTACKS = attack = Attacks()
EITHER = (SERVED, STOPPED)
"""Dropped, or the end of the VM: both are right, as long as the cell ends."""


@attack(*EITHER, each="port", of=("kernel", "agent"))
def no_json(guest, port):
    """Text, noise, half an object."""
    guest.message(port, b"hello")
    guest.message(port, bytes(range(256)))
    guest.message(port, b'{"type":"ready"')


@attack(*EITHER, each="port", of=("kernel", "agent"))
def another_shape(guest, port):
    """JSON of every other kind."""
    for body in (b"null", b"1", b"[]", b"{}", b'""', b"[[]]", b"true", b"[1,2,3,4,5,6,7,8]"):
        guest.message(port, body)


@attack(*EITHER)
def nesting(guest):
    """A hundred thousand lists, each in the next."""
    deep = b"[" * 100_000 + b"]" * 100_000
    guest.message("kernel", b'["iopub","stream","' + guest.msg_id.encode() + b'",{},' + deep + b"]")
    text = b'{"name":"stdout","text":' + deep + b"}"
    guest.message("kernel", b'["iopub","stream","' + guest.msg_id.encode() + b'",{},' + text + b"]")


@attack(*EITHER, each="depth", of=(60, 900))
def nesting_that_can_be_decoded(guest, depth):
    """Deep, but not too deep for the decoder: whatever goes over it afterwards must bear it."""
    deep = b'{"a":' * depth + b"1" + b"}" * depth
    head = b'["iopub","display_data","' + guest.msg_id.encode() + b'",'
    data = b'{"data":{"application/json":' + deep + b'},"metadata":{},"transient":{}}'
    guest.message("kernel", head + b"{}," + data + b"]")
    guest.message("kernel", head + deep + b',{"data":{},"metadata":{}}]')


@attack(*EITHER, peak=1100, seconds=120)
def a_bomb_of_lists(guest):
    """16 MiB of empty lists, which decoded take twenty times as much."""
    lists = b"[" + b"[]," * (16 * MIB // 3) + b"[]]"
    head = b'["iopub","display_data","' + guest.msg_id.encode() + b'",{},'
    guest.message("kernel", head + b'{"data":{"application/json":' + lists + b"}}]")


@attack(*EITHER, peak=1100, seconds=120)
def a_bomb_of_keys(guest):
    """Half a million keys, none of them twice."""
    keys = b",".join(b'"%x":0' % i for i in range(500_000))
    head = b'["iopub","display_data","' + guest.msg_id.encode() + b'",{},{"data":{},"metadata":{'
    guest.message("kernel", head + keys + b"}}]")


@attack(*EITHER, each="number", of=("9" * 400, "-" + "9" * 4000))
def a_huge_integer(guest, number):
    """An integer that no machine word holds, and that Python will not print."""
    head = b'["iopub","execute_result","' + guest.msg_id.encode() + b'",{},'
    content = b'{"execution_count":' + number.encode() + b',"data":{},"metadata":{}}]'
    guest.message("kernel", head + content)


@attack(*EITHER)
def an_integer_of_a_million_digits(guest):
    """It takes minutes to be made a number of, where nobody forbids it."""
    head = b'["iopub","execute_result","' + guest.msg_id.encode() + b'",{},'
    content = b'{"execution_count":' + b"7" * 1_000_000 + b',"data":{},"metadata":{}}]'
    guest.message("kernel", head + content)


@attack(*EITHER, each="number", of=("NaN", "-Infinity", "1e999", "1e-999", "0x10", "01", "1."))
def what_is_hardly_a_number(guest, number):
    """Numbers that JSON does not have, or that are too large for a float."""
    head = b'["iopub","display_data","' + guest.msg_id.encode() + b'",{},'
    guest.message("kernel", head + b'{"data":{"application/json":' + number.encode() + b"}}]")


@attack(*EITHER, each="text", of=(b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", rb"\ud800", rb"\u00"))
def bad_text(guest, text):
    """No UTF-8: overlong, half a pair, a broken escape."""
    head = b'["iopub","stream","' + guest.msg_id.encode() + b'",{},{"name":"stdout","text":"'
    guest.message("kernel", head + text + b'"}]')


@attack(SERVED)
def text_of_every_character(guest):
    """NULs, controls, every plane: what is text may be shown, and is still a message."""
    text = "".join(map(chr, [*range(0x3000), 0xFFFE, 0xFFFF, 0x1F600, 0x10FFFF]))
    guest.say("stream", {"name": "stdout", "text": text})
    guest.say("stream", {"name": "std\0out", "text": "a\0b"})
    guest.say("stream", {"name": "../../etc", "text": "\0" * 1000})


@attack(*EITHER)
def keys_twice(guest):
    """An object with each key twice: whoever reads it must read the same."""
    head = b'["iopub","stream","' + guest.msg_id.encode() + b'",{},'
    guest.message("kernel", head + b'{"name":"stdout","text":1,"name":"x","text":"last"}]')


@attack(*EITHER)
def fields_missing_and_more(guest):
    """Three fields, and seven."""
    guest.message("kernel", ["iopub", "stream", guest.msg_id])
    guest.message("kernel", ["iopub", "stream", guest.msg_id, {}, {}, {}, {}])


@attack(*EITHER, each="place", of=(0, 1, 2, 3, 4))
def a_field_of_another_type(guest, place):
    """Each of the five fields in turn."""
    for wrong in (None, True, 7, 1.5, [], {"a": 1}, [[]], "x" * 2000):
        body = ["iopub", "stream", guest.msg_id, {}, {"name": "stdout", "text": "x"}]
        body[place] = wrong
        guest.message("kernel", body)


@attack(SERVED)
def contents_of_another_type(guest):
    """Well framed messages of every type, whose fields are of every wrong type."""
    fields = {
        "stream": ("name", "text"),
        "display_data": ("data", "metadata", "transient"),
        "update_display_data": ("data", "metadata", "transient"),
        "execute_result": ("execution_count", "data", "metadata"),
        "execute_input": ("code", "execution_count"),
        "error": ("ename", "evalue", "traceback"),
        "clear_output": ("wait",),
        "comm_open": ("comm_id", "target_name", "data"),
        "comm_msg": ("comm_id", "data"),
        "comm_close": ("comm_id", "data"),
        "debug_event": ("seq", "type", "body"),
        "no_such_type": ("x",),
    }
    for msg_type, names in fields.items():
        for wrong in (None, True, -1, 1e300, "x", [], [None], {}, {"a": {}}, {"text/html": 7}):
            guest.say(msg_type, dict.fromkeys(names, wrong))
            guest.say(msg_type, {}, metadata={"a": wrong})


@attack(*EITHER)
def a_reply_of_wrong_types(guest):
    """The reply's own fields: status, count, payload, traceback."""
    guest.answer = False
    guest.reply(
        {
            "status": ["ok"],
            "execution_count": {"a": 1},
            "payload": 7,
            "user_expressions": [[]],
            "ename": {},
            "traceback": "no list",
        }
    )
    guest.idle()


@attack(*EITHER, each="payload", of=([7, None, []], [{"source": []}], [{"source": {"a": 1}}]))
def a_payload_of_wrong_types(guest, payload):
    """Payloads are looked into by the host: ask_exit and set_next_input are among them."""
    guest.answer = False
    guest.reply({"status": "ok", "execution_count": 1, "payload": payload, "user_expressions": {}})
    guest.idle()


@attack(SERVED)
def ids_without_end(guest):
    """Names as long as a message: nothing may be kept by them."""
    for i in range(3):
        long = str(i) * MIB
        guest.say("comm_open", {"comm_id": long, "target_name": long, "data": {}})
        guest.say("comm_msg", {"comm_id": long, "data": {}})
        guest.say(
            "update_display_data", {"data": {}, "metadata": {}, "transient": {"display_id": long}}
        )
        guest.say("vm_request", {"id": long, "command": long, "arguments": []}, channel="vm")
        guest.say("input_request", {"prompt": long, "password": long}, channel="iopub")
