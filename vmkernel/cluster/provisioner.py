"""The kernel provisioner ``vmkernel-ray``: Jupyter's way to start a kernel, on a cluster.  Floor 5.

Jupyter (`jupyter_client.manager.KernelManager`) takes it from the entry point that
``metadata.kernel_provisioner`` in a kernel.json names (`vmkernel install --ray`).  It never starts
a process here: it opens the kernel's sockets, returns, and the rest is `ClusterKernel`'s, in the
driver's thread.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jupyter_client.provisioning import KernelProvisionerBase
from traitlets import Dict, Unicode

from vmkernel.cluster.driver import Driver
from vmkernel.errors import VmError
from vmkernel.settings import Settings, load_settings

if TYPE_CHECKING:
    from vmkernel.cluster.kernel import ClusterKernel

# What any guest is given of its front end's environment (vmkernel.host.waking), and what gateways
# mean for the kernel
_PASSED = ("JPY_SESSION_NAME", "IPYKERNEL_CELL_NAME", "COLUMNS", "LINES", "MPLBACKEND", "TZ")
_PASSED_PREFIXES = ("KERNEL_",)


class RayProvisioner(KernelProvisionerBase):  # type: ignore[misc]
    """Starts kernels in VMs of a Ray cluster (docs/cluster.md)."""

    kernel_name = Unicode(
        "vmsandbox", config=True, help="The kernelspec on the hosts that is started there."
    )
    options = Dict(
        config=True, help="Settings of the kernel, as text by name: those of `vmkernel install`."
    )

    _kernel: ClusterKernel | None = None
    _driver: Driver | None = None
    _has_process = False

    @property
    def has_process(self) -> bool:
        """Whether there is a kernel: running, or waiting for a slot."""
        return self._has_process

    async def poll(self) -> int | None:
        """None while the kernel runs or waits; else its exit code.  Asks nobody."""
        if self._kernel is None or not self._has_process:
            return 0
        return self._kernel.exit_code

    async def wait(self) -> int | None:
        """Wait until the kernel has ended, and return its exit code."""
        if self._kernel is None or self._driver is None or not self._has_process:
            return 0
        code = await self._driver.run(self._kernel.wait())
        self._has_process = False
        return code

    async def send_signal(self, signum: int) -> None:
        """Send a signal to the kernel on its host."""
        if self._kernel is not None and self._driver is not None and self._has_process:
            await self._driver.run(self._kernel.signal(signum))

    async def kill(self, restart: bool = False) -> None:
        """End the kernel and its VM at once."""
        if self._kernel is not None and self._driver is not None and self._has_process:
            await self._driver.run(self._kernel.end())

    async def terminate(self, restart: bool = False) -> None:
        """Ask the kernel's process to end."""
        import signal

        await self.send_signal(signal.SIGTERM)

    async def shutdown_requested(self, restart: bool = False) -> None:
        """A shutdown_request is on its way to the kernel: see to it that its end shows at once."""
        kernel = self._kernel
        if kernel is not None and self._driver is not None and self._has_process:

            async def watch() -> None:
                kernel.watch_shutdown()

            await self._driver.run(watch())

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Settle the connection's keys and ports; nothing is started here, so there is no file."""
        manager = self.parent
        _settle_encryption(manager)
        self.connection_info = manager.get_connection_info()
        extra = kwargs.pop("extra_arguments", [])
        settled: dict[str, Any] = await super().pre_launch(cmd=list(extra), **kwargs)
        return settled

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> dict[str, Any]:
        """Bind the five sockets and return; a slot and a host are looked for behind them."""
        from vmkernel.cluster.kernel import ClusterKernel
        from vmkernel.cluster.search import Order

        failure: VmError | None = None
        try:
            settings = load_settings(dict(self.options))
        except VmError as error:
            settings, failure = Settings(), error
        env = kwargs.get("env") or {}
        order = Order(
            kernel_name=self.kernel_name,
            argv=[*_as_options(self.options), *cmd],
            env=self._passed(env, settings),
            cwd=str(kwargs.get("cwd") or os.getcwd()),  # noqa: PTH109
        )
        if self._kernel is None:
            self._driver = Driver.get()
            self._kernel = ClusterKernel(
                self.kernel_id, self._driver, settings, self._expected(settings)
            )
        assert self._driver is not None
        info = await self._driver.run(self._kernel.launch(self.connection_info, order, failure))
        self.connection_info = info = {**info, "key": _as_bytes(info.get("key", b""))}
        self._has_process = True
        return info

    async def cleanup(self, restart: bool = False) -> None:
        """Give everything back; before a restart, all but the sockets and the slot."""
        if self._kernel is None or self._driver is None:
            return
        if restart:
            await self._driver.run(self._kernel.end())
        else:
            kernel, self._kernel = self._kernel, None
            await self._driver.run(kernel.close())
        self._has_process = False

    async def get_provisioner_info(self) -> dict[str, Any]:
        """What another process needs to take the kernel over (JSON, but for the key)."""
        info: dict[str, Any] = await super().get_provisioner_info()
        if self._kernel is not None:
            info["cluster"] = self._kernel.statistics()
        return info

    async def load_provisioner_info(self, provisioner_info: dict[str, Any]) -> None:
        """Take over a running kernel from what its former process told.

        Raises:
            VmError: it does not run any more, or cannot be reached.
        """
        from vmkernel.cluster.kernel import ClusterKernel
        from vmkernel.cluster.search import Order

        await super().load_provisioner_info(provisioner_info)
        settings = load_settings(dict(self.options))
        order = Order(self.kernel_name, _as_options(self.options), {}, os.getcwd())  # noqa: PTH109
        driver = Driver.get()
        kernel = ClusterKernel(self.kernel_id, driver, settings, self._expected(settings))
        try:
            await driver.run(kernel.adopt(self.connection_info, order, provisioner_info["cluster"]))
        except VmError:
            await driver.run(kernel.close())
            raise
        self._driver, self._kernel, self._has_process = driver, kernel, True

    def get_stable_start_time(self, recommended: float = 10.0) -> float:
        """As Jupyter's own: a kernel that waits for a slot does not die of it."""
        return recommended

    def _expected(self, settings: Settings) -> dict[str, Any] | None:
        """What the kernel will say of itself, for front ends that ask before it is there."""
        name = self.kernel_spec.language
        if name == "python":
            return None  # as every image of ours says it
        from vmkernel.cli.install import chosen_recipe

        recipe = chosen_recipe(settings)
        known = recipe.language if recipe is not None and recipe.language.name == name else None
        language = {
            "name": name,
            "version": "",
            "mimetype": known.mimetype if known else "text/plain",
            "file_extension": known.file_extension if known else ".txt",
        }
        if known is not None and known.pygments_lexer:
            language["pygments_lexer"] = known.pygments_lexer
        return {"implementation": "vmsandbox", "language_info": language, "help_links": []}

    def _passed(self, env: Mapping[str, str], settings: Settings) -> dict[str, str]:
        """The variables that are meant for the kernel.

        Never the whole environment: that of a server has its secrets in it, and the places of its
        programs, which mean nothing on another host.
        """
        names = {*_PASSED, *settings.env, *(self.kernel_spec.env if self.kernel_spec else ())}
        return {
            name: value
            for name, value in env.items()
            if name in names or name.startswith(_PASSED_PREFIXES)
        }


def _as_options(options: Mapping[str, object]) -> list[str]:
    """Settings for the kernel on its host; those of the cluster are for this side."""
    return [
        f"--{name.replace('_', '-')}={value}"
        for name, value in options.items()
        if not name.replace("-", "_").startswith("cluster_")
    ]


def _settle_encryption(manager: Any) -> None:
    """The keys of the front end's side, if it is to encrypt: as `LocalProvisioner` has it.

    Raises RuntimeError: it is required and cannot be, as there.
    """
    policy = getattr(manager, "transport_encryption", "disabled")
    if policy == "disabled" or manager.curve_publickey is not None:
        return
    if manager.transport not in ("tcp", "ipc"):
        if policy == "required":
            raise RuntimeError("transport_encryption='required' needs the transport tcp or ipc")
        return
    import zmq

    manager.curve_publickey, manager.curve_secretkey = zmq.curve_keypair()


def _as_bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
