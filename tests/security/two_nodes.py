"""Two hosts of a cluster, namespaces of this process's own, with a public and a private subnet.

Run by `test_network_cluster` in a network namespace; prints what a guest's proxy answered here.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from network_rig import Canary, Rig, status

PUBLIC, PRIVATE = "203.0.114", "10.213.99"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def join(device: str, number: int) -> None:
    """Give this namespace its addresses."""
    ip("link", "set", "lo", "up")
    for subnet in (PUBLIC, PRIVATE):
        ip("addr", "add", f"{subnet}.{number}/24", "dev", device)
    ip("link", "set", device, "up")


def other() -> None:
    """The other host, with a port open on all its addresses."""
    print("here", flush=True)
    sys.stdin.readline()
    join("peer0", 2)
    canary = Canary("0.0.0.0")
    print(canary.port, flush=True)
    while sys.stdin.readline():
        print(canary.connections, flush=True)


async def main() -> None:
    command = ["unshare", "--net", sys.executable, __file__, "other"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as peer:
        assert peer.stdin is not None
        assert peer.stdout is not None
        peer.stdout.readline()
        ip("link", "add", "node0", "type", "veth", "peer", "name", "peer0")
        ip("link", "set", "peer0", "netns", str(peer.pid))
        join("node0", 1)
        peer.stdin.write("\n")
        port = int(peer.stdout.readline())
        own = Canary("0.0.0.0")

        def reached() -> int:
            assert peer.stdin is not None
            assert peer.stdout is not None
            peer.stdin.write("\n")
            return int(peer.stdout.readline())

        found: dict[str, dict[str, int]] = {}
        listed = [f"{PUBLIC}.2:{port}", f"{PRIVATE}.2:{port}", f"{PRIVATE}.0/24:{port}",
                  f"{PUBLIC}.0/24:{own.port}"]  # fmt: skip
        for name, mode, allow, deny in (
            ("open", "open", [], ()),
            ("open, denied", "open", [], (f"{PUBLIC}.0/24",)),
            ("allow", "allow", listed, ()),
            ("allow, denied", "allow", listed, (f"{PUBLIC}.2", f"{PRIVATE}.0/24")),
        ):
            before, before_own = reached(), own.connections
            answers: dict[str, int] = {}
            with tempfile.TemporaryDirectory() as directory:
                async with Rig(mode, allow, Path(directory), network_deny=deny) as rig:
                    for subnet in (PUBLIC, PRIVATE):
                        answers[f"{subnet}.2"] = status(await rig.tunnel(f"{subnet}.2:{port}"))
                        answers[f"{subnet}.1"] = status(await rig.tunnel(f"{subnet}.1:{own.port}"))
                    mapped = f"[::ffff:{PUBLIC}.2]:{port}"
                    answers["mapped"] = status(await rig.tunnel(mapped))
                    answers["http"] = status(await rig.get(f"http://{PUBLIC}.2:{port}/"))
            answers["arrived"] = reached() - before
            answers["arrived here"] = own.connections - before_own
            found[name] = answers
        peer.stdin.close()
        peer.wait(10)
    print(json.dumps(found))


if __name__ == "__main__":
    other() if "other" in sys.argv else asyncio.run(main())
