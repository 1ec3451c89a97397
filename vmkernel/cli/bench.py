"""``vmkernel bench``: how this kernel does on this host, beside plain ipykernel. Floor 5.

A small and dependable part of what ``script/bench`` measures, by the same code, in less than a
minute once the template is there.
"""

from __future__ import annotations

import signal
import sys

import click

PLAIN = "python3"
OURS = "vmsandbox"
BLOCKS = ("start", "round-trip", "memory")


@click.command()
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True,
              help="Starts of each kernel.")  # fmt: skip
@click.option("--recipe", help="The guest image to start from.")
@click.option("--memory", help="Memory of each VM, like 4G.")
@click.option("--plain", default=PLAIN, show_default=True, metavar="KERNEL",
              help="The kernel to compare with; it is left out where there is none.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, with every sample.")
def bench(rounds: int, recipe: str | None, memory: str | None, plain: str, as_json: bool) -> None:
    """Measure start, round trip and memory of kernels on this host.

    Each in turn: plain ipykernel, a kernel in a VM, and one from a ready pool. The kernels are the
    benchmark's own: your notebooks, their history and your pool are not touched. Ratios are what
    to trust; times are as fast as the machine is idle.
    """
    from vmkernel.bench.measure import measure, text
    from vmkernel.bench.report import full
    from vmkernel.bench.rig import POOL, Pool, Rig
    from vmkernel.cli.install import install_kernelspec
    from vmkernel.cli.output import print_json

    def say(words: str) -> None:
        click.echo(words, err=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends with what there is
    options = {"recipe": recipe, "memory": memory}
    with Rig() as rig:
        install_kernelspec(
            rig.kernels_dir,
            name=OURS,
            options={key: value for key, value in options.items() if value is not None},
        )
        kernels = [OURS, *([OURS + POOL] if Pool.exists() else [])]
        if _is_installed(plain):
            kernels.insert(0, plain)
        else:
            say(f"There is no kernel {plain!r} to compare with: figures without ratios.")
        results, machine = measure(
            rig, kernels, BLOCKS, rounds=rounds, cells=100, many=3, say=say, brief=True
        )  # fmt: skip
    if as_json:
        print_json(full(results, machine))
    else:
        click.echo(text(results, machine, goals=False))
    if not results.of("start_first", OURS).samples:
        sys.exit(1)


def _is_installed(kernel: str) -> bool:
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        KernelSpecManager().get_kernel_spec(kernel)
    except NoSuchKernel:
        return False
    return True
