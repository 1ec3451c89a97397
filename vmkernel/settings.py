"""Every setting, in one typed place: `Settings`, and where its values come from.

A value is taken from the last of these that has one:

1. the default below,
2. ``/etc/vmkernel/config.toml`` (the administrator's),
3. ``$XDG_CONFIG_HOME/vmkernel/config.toml`` (the user's; ``~/.config`` when unset),
4. an option in the kernelspec (``--memory=4G``), handed in as *overrides*,
5. the environment variable ``VMKERNEL_<NAME>``; an empty one counts as unset,
6. an option of the command that is run (``vmkernel run --memory 4G``).

The administrator's file may also name settings that nothing later may change:
``locked = ["network"]``.

Floor 2. This module lies on the kernel's start path: it imports msgspec, which is there anyway,
and reads the environment and the disk only when `load_settings` or `Settings` is called.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from vmkernel import trace
from vmkernel.environment import variable_names
from vmkernel.errors import SettingsError
from vmkernel.values import (
    absolute_path,
    choice,
    cluster_address,
    count,
    duration,
    duration_between,
    networks,
    optional_count,
    optional_duration,
    optional_path,
    optional_percent,
    optional_time,
    program,
    recipe_name,
    size,
    switch,
    words,
)

Accelerator = Literal["auto", "kvm", "tcg"]
OutputPolicy = Literal["safe", "trusted"]
SandboxChoice = Literal["auto", "required", "off"]
Switch = Literal["on", "off"]
WorkspaceChoice = Literal["none", "ro", "rw"]
NetworkChoice = Literal["none", "packages", "allow", "open"]
FilesChoice = Literal["off", "ask", "on"]

NOTIFY_SOCKET = "VMKERNEL_NOTIFY_SOCKET"
"""Where a kernel tells how its start goes (`vmkernel.kernel.notify`)"""
NOTEBOOK_DIRECTORY = "VMKERNEL_NOTEBOOK_DIRECTORY"
"""Where the front end is at work, for a kernel on a host that has no such directory to start in"""
_NO_SETTINGS = frozenset({trace.VARIABLE, NOTIFY_SOCKET, NOTEBOOK_DIRECTORY})
"""For developers, and for who starts a kernel for others"""
SYSTEM_CONFIG = Path("/etc/vmkernel/config.toml")
ENVIRONMENT_PREFIX = "VMKERNEL_"

# Stands for a file in one of the directories below; __post_init__ puts the real path in its place.
_IN_ITS_DIR = Path()


class Field(NamedTuple):
    """What is known of one setting besides its type and default."""

    parse: Callable[[object], Any]
    allowed: str
    meaning: str


_ABSOLUTE = "an absolute path (a leading ~ is the home directory)"
_HOST = r"[A-Za-z0-9*\[][A-Za-z0-9.:/_*\[\]-]*"
_DURATION = "seconds above 0, or a number with s, m or h"

FIELDS: dict[str, Field] = {
    "recipe": Field(
        recipe_name,
        "a recipe's name: lower-case letters, digits, '.', '_', '-' (`vmkernel image list`)",
        "Which guest image a kernel starts from.",
    ),
    "memory": Field(
        size(64, 1024**2),
        "64M to 1T; a plain number is MiB",
        "Memory of one VM; unset: what the recipe asks for, where it does.",
    ),
    "vcpus": Field(count(1, 64), "a whole number from 1 to 64", "Virtual processors of one VM."),
    "scratch_size": Field(
        size(64, 64 * 1024**2),
        "64M to 64T; a plain number is MiB",
        "Size of a VM's disk for all that is written in it; sparse, gone with the VM.",
    ),
    "cpu_quota": Field(
        optional_percent,
        "per cent of one processor, like 50%, or none",
        "The most processor time that one VM may take, all its threads together. Where the host "
        "has no systemd with cgroup v2 to hold it to that, the VM gets low priority instead "
        "(`vmkernel doctor` says which).",
    ),
    "lifetime": Field(
        optional_time,
        "seconds above 0, a number with s, m or h, or none",
        "How long a VM may live; then it is ended, whatever it does.",
    ),
    "idle_timeout": Field(
        optional_time,
        "seconds above 0, a number with s, m or h, or none",
        "How long a VM may have nothing to do; then it is ended, and its slot is free.",
    ),
    "max_output": Field(
        size(1, 1024),
        "1M to 1G; a plain number is MiB",
        "How much of one run's output a `RunResult` keeps.",
    ),
    "accelerator": Field(
        choice("auto", "kvm", "tcg"),
        "auto, kvm or tcg",
        "How QEMU runs the guest: `kvm` by the processor, `tcg` by emulation; `auto` takes KVM "
        "only after a guest has really booted with it.",
    ),
    "sandbox": Field(
        choice("auto", "required", "off"),
        "auto, required or off",
        "Whether QEMU runs in bubblewrap, out of reach of the network, of other processes and of "
        "files: `auto`, wherever that works (`vmkernel doctor` says if it does here); `required`: "
        "or no VM starts.",
    ),
    "outputs": Field(
        choice("safe", "trusted"),
        "safe or trusted",
        "What a notebook shows of the guest's outputs. `safe`: nothing that could run script in "
        "the front end, load from the network or steer a terminal (docs/outputs.md); "
        "`trusted`: all.",
    ),
    "workspace": Field(
        choice("none", "ro", "rw"),
        "none, ro or rw",
        "Whether the guest sees the directory that the notebook lies in, at the path that it has "
        "on the host: not at all, for reading, or for writing, too (docs/workspace.md).",
    ),
    "workspace_dir": Field(
        optional_path,
        f"{_ABSOLUTE}, or none",
        "The directory of the workspace; `none`: a notebook's own, and for a VM of `vmkernel run` "
        "or of a program, no workspace.",
    ),
    "workspace_size": Field(
        size(1, 16 * 1024**2),
        "1M to 16T; a plain number is MiB",
        "How much a VM may write into its workspace (`rw`).",
    ),
    "workspace_files": Field(
        count(1, 10_000_000),
        "a whole number from 1 to 10000000",
        "How many files and directories a VM may make in its workspace (`rw`).",
    ),
    "network": Field(
        choice("none", "packages", "allow", "open"),
        "none, packages, allow or open",
        "What the guest reaches, through a filter on the host: nothing; the package index that "
        "pip is configured for on this host; the hosts of `network_allow`, too; or all but this "
        "host and private networks (docs/network.md).",
    ),
    "network_allow": Field(
        words(_HOST),
        'host, *.domain, address or network, :port where wanted; in a file a list: ["a", "b:22"]',
        "Which hosts `network = allow` opens (ports 80 and 443 where none is named).",
    ),
    "network_deny": Field(
        networks,
        'addresses and networks, like 192.0.2.7 or 10.1.0.0/16; in a file a list: ["a", "b"]',
        "What a guest never reaches, whatever `network` and `network_allow` open: other hosts of a "
        "cluster (docs/cluster.md). This host's own addresses need no entry.",
    ),
    "env": Field(
        variable_names,
        'names of variables; in a file a list: ["A", "B"]; not those of the guest\'s own set-up '
        "(docs/secrets.md)",
        "Which of the kernel's environment variables the guest gets, besides those of every guest.",
    ),
    "env_file": Field(
        optional_path,
        f"{_ABSOLUTE}, or none",
        "A file of `NAME=value` lines that the guest gets as environment variables; nobody but "
        "its owner may be able to read it (mode 0600).",
    ),
    "files": Field(
        choice("off", "ask", "on"),
        "off, ask or on",
        "Whether `%vm put` and `%vm get` copy files between the host and the guest: never, each "
        "time when the person at the front end has agreed, or always (docs/files.md).",
    ),
    "max_concurrent_vms": Field(
        count(1, 4096),
        "a whole number from 1 to 4096",
        "How many VMs may exist at once among all who share `semaphore_file`; "
        "unset: twice the host's GiB of memory, at least 2, at most 256.",
    ),
    "max_vms_per_user": Field(
        optional_count(1, 4096),
        "a whole number from 1 to 4096, or none",
        "How many of them one user may have at once, kernels that wait in a pool included "
        "(docs/shared-hosts.md).",
    ),
    "max_concurrent_boots": Field(
        count(1, 64),
        "a whole number from 1 to 64",
        "How many of them may boot from cold (build a template) at once.",
    ),
    "pool_size": Field(
        count(0, 16),
        "a whole number from 0 to 16",
        "How many kernels, wrapper and VM, wait ready for a front end, for each of the settings "
        "that kernels were started with lately (docs/pool.md). 0: none, and every kernel starts "
        "from the beginning.",
    ),
    "pool_max_idle": Field(
        duration, _DURATION, "After which time a kernel that waits is replaced by a fresh one."
    ),
    "pool_linger": Field(
        duration, _DURATION, "How long the pool stays after the user's last kernel has ended."
    ),
    "runtime_dir": Field(
        absolute_path,
        _ABSOLUTE,
        "Sockets and records of running VMs; private to the user (mode 0700).",
    ),
    "semaphore_file": Field(
        absolute_path,
        _ABSOLUTE,
        "The file whose byte locks are the VM slots; one for a host when an administrator sets it "
        "in /etc. Unset: `slots` in `runtime_dir`.",
    ),
    "queue_timeout": Field(
        optional_duration,
        "seconds, a number with s, m or h, or none",
        "How long a kernel waits for a slot; `none` is for ever, 0 not at all.",
    ),
    "start_timeout": Field(duration, _DURATION, "How long a clone may take until it is ready."),
    "boot_timeout": Field(duration, _DURATION, "How long a cold boot of a template may take."),
    "console_log_size": Field(
        size(1, 1024), "1M to 1G; a plain number is MiB", "How much of a VM's console is kept."
    ),
    "qemu": Field(program, "a program on PATH, or its path", "The QEMU system emulator."),
    "shared_dir": Field(
        optional_path,
        f"{_ABSOLUTE}, or none",
        "Where images and memory templates lie that an administrator has built for all users "
        "(`vmkernel setup-host`, docs/shared-hosts.md): images that are not in `images_dir`, and "
        "templates before those in `cache_dir`.",
    ),
    "images_dir": Field(absolute_path, _ABSOLUTE, "Where guest images lie."),
    "base_images_dir": Field(
        optional_path,
        f"{_ABSOLUTE}, or none",
        "Another name of `images_dir`; where it is set, it counts.",
    ),
    "kernel_path": Field(
        optional_path,
        f"{_ABSOLUTE}, or none",
        "A Linux kernel (bzImage) for the guests, of the release that the image's modules are for; "
        "`none`: the image's own.",
    ),
    "cache_dir": Field(
        absolute_path, _ABSOLUTE, "Where memory templates and remembered verdicts lie."
    ),
    "state_dir": Field(absolute_path, _ABSOLUTE, "Logs: each VM's console, QEMU's own words."),
    "database_file": Field(
        absolute_path,
        _ABSOLUTE,
        "The record of VMs, an SQLite database (WAL: not on a network file system).",
    ),
    "database_timeout": Field(
        duration, _DURATION, "How long to wait for the record while other processes write to it."
    ),
    "history": Field(
        switch,
        "on or off",
        "Whether the cells that a person runs are kept on the host, for the history of the user's "
        "next kernels (the arrow-up key, search). No guest sees it. `off`: a kernel knows its own "
        "cells only, and nothing is written.",
    ),
    "history_file": Field(
        absolute_path,
        _ABSOLUTE,
        "Where they are kept: an SQLite file of IPython's, mode 0600; several kernels share it.",
    ),
    "cluster_address": Field(
        cluster_address,
        "auto, or HOST:PORT",
        "The Ray cluster that places kernels of `vmkernel install --ray` (docs/cluster.md); "
        "`auto`: what RAY_ADDRESS names, else the cluster that this host is part of.",
    ),
    "cluster_wait": Field(
        optional_duration,
        "seconds, a number with s, m or h, or none",
        "How long such a kernel waits for a VM slot in the cluster; `none` is for ever, 0 not at "
        "all. It tries again when the next cell is run.",
    ),
    "cluster_lease": Field(
        duration_between(4, 3600),
        "4 to 3600 seconds, or a number with s, m or h",
        "After how long without contact such a kernel is ended by its host, and given up by its "
        "front end.",
    ),
    "log_level": Field(
        choice("debug", "info", "warning", "error"),
        "debug, info, warning or error",
        "How much the kernel tells on its standard error (the Jupyter server's log).",
    ),
}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings in force; `FIELDS` says what each means. Sizes in MiB, times in seconds.

    Raises:
        SettingsError: a value is not allowed.
    """

    recipe: str = "datascience"
    memory: int = 2048
    vcpus: int = 1
    scratch_size: int = 8192
    cpu_quota: int | None = None
    lifetime: float | None = None
    idle_timeout: float | None = None
    max_output: int = 16
    accelerator: Accelerator = "auto"
    sandbox: SandboxChoice = "auto"
    outputs: OutputPolicy = "safe"
    workspace: WorkspaceChoice = "ro"
    workspace_dir: Path | None = None
    workspace_size: int = 4096
    workspace_files: int = 10_000
    network: NetworkChoice = "none"
    network_allow: tuple[str, ...] = ()
    network_deny: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    env_file: Path | None = None
    files: FilesChoice = "ask"
    max_concurrent_vms: int = msgspec.field(default_factory=lambda: default_vm_limit())  # noqa: PLW0108 - defined below
    max_vms_per_user: int | None = None
    max_concurrent_boots: int = 1
    pool_size: int = 1
    pool_max_idle: float = 1800.0
    pool_linger: float = 180.0
    semaphore_file: Path = _IN_ITS_DIR
    queue_timeout: float | None = None
    start_timeout: float = 60.0
    boot_timeout: float = 240.0
    console_log_size: int = 1
    qemu: str = "qemu-system-x86_64"
    shared_dir: Path | None = None
    images_dir: Path = msgspec.field(default_factory=lambda: default_dir("images_dir", os.environ))
    base_images_dir: Path | None = None
    """Another name of ``images_dir``, which has the value; here it is None again."""
    kernel_path: Path | None = None
    cache_dir: Path = msgspec.field(default_factory=lambda: default_dir("cache_dir", os.environ))
    runtime_dir: Path = msgspec.field(
        default_factory=lambda: default_dir("runtime_dir", os.environ)
    )
    state_dir: Path = msgspec.field(default_factory=lambda: default_dir("state_dir", os.environ))
    database_file: Path = _IN_ITS_DIR
    database_timeout: float = 5.0
    history: Switch = "on"
    history_file: Path = _IN_ITS_DIR
    cluster_address: str = "auto"
    cluster_wait: float | None = 600.0
    cluster_lease: float = 30.0
    log_level: str = "warning"

    def __post_init__(self) -> None:
        """Check what was handed in directly, by the same rules as what was read."""
        if self.base_images_dir is not None:
            msgspec.structs.force_setattr(self, "images_dir", self.base_images_dir)
            msgspec.structs.force_setattr(self, "base_images_dir", None)
        for name, field in FIELDS.items():
            value = getattr(self, name)
            if value == _IN_ITS_DIR:
                value = {
                    "semaphore_file": Path(self.runtime_dir) / "slots",
                    "database_file": Path(self.state_dir) / "vms.sqlite",
                    "history_file": Path(self.state_dir) / "history.sqlite",
                }[name]
            msgspec.structs.force_setattr(self, name, _parse(name, field, value, "the program"))


_BY_ENVIRONMENT = frozenset(
    "images_dir cache_dir runtime_dir state_dir semaphore_file database_file history_file".split()
)
"""Whose defaults a user's environment, or another setting, decides."""


def default_vm_limit() -> int:
    """How many VMs this host bears when nobody said: an idle clone costs far below 512 MiB."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 2
    return max(2, min(256, 2 * memory // 1024**3))


def default_dir(name: str, environ: Mapping[str, str]) -> Path:
    """The default of a directory setting, by the XDG base directory specification.

    Relative values of ``XDG_…`` are ignored, as the specification asks.
    """
    variable, fallback, below = {
        "images_dir": ("XDG_DATA_HOME", ".local/share", "vmkernel/images"),
        "cache_dir": ("XDG_CACHE_HOME", ".cache", "vmkernel"),
        "state_dir": ("XDG_STATE_HOME", ".local/state", "vmkernel"),
        "config_dir": ("XDG_CONFIG_HOME", ".config", "vmkernel"),
        "runtime_dir": ("XDG_RUNTIME_DIR", "", "vmkernel"),
    }[name]
    base = environ.get(variable, "")
    if base.startswith("/"):
        return Path(base, below)
    if name == "runtime_dir":
        # Predictable on purpose (every process of the user must find it), so whoever uses it
        # calls ensure_private_dir first: in /tmp somebody else may have been there before.
        return Path(f"/tmp/vmkernel-{os.getuid()}")  # noqa: S108
    home = environ.get("HOME", "") or os.path.expanduser("~")  # noqa: PTH111
    return Path(home, fallback, below)


class LoadedSettings(NamedTuple):
    """Settings, and for each one that is not the default, where its value came from."""

    settings: Settings
    sources: dict[str, str]


def load_settings(
    overrides: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    options: Mapping[str, str] | None = None,
    system_config: Path = SYSTEM_CONFIG,
) -> Settings:
    """The settings in force, from every source in the order that the module's docstring tells.

    *overrides* are kernelspec options (name to text), *environ* stands for ``os.environ``,
    *options* were written on a command line for this one time, and come before all else.

    Raises:
        SettingsError: a value is not allowed, a name is unknown, or a file cannot be read.
    """
    return load_settings_with_sources(
        overrides, environ, options=options, system_config=system_config
    ).settings


def load_settings_with_sources(
    overrides: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    options: Mapping[str, str] | None = None,
    given: Mapping[str, object] | None = None,
    system_config: Path = SYSTEM_CONFIG,
) -> LoadedSettings:
    """As `load_settings`, and tells where each value came from.

    What is *given* a program itself has chosen; it comes even before *options*.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {
        name: default_dir(name, environ)
        for name in ("images_dir", "cache_dir", "runtime_dir", "state_dir")
    }
    sources: dict[str, str] = {}
    locked: frozenset[str] = frozenset()

    def take(name: str, value: object, source: str) -> None:
        field = FIELDS.get(name)
        if field is None:
            raise _unknown(name, source)
        parsed = _parse(name, field, value, source)
        if name == "base_images_dir":  # or it would win over an images_dir that comes later
            name = "images_dir"
        if name in locked:
            _require_same(name, parsed, source, values, system_config)
            return
        values[name] = parsed
        sources[name] = source

    administrators = _read_config(system_config)
    names = _locked(administrators, system_config)
    administrators.pop("locked", None)
    for name, value in administrators.items():
        take(name, value, f"{system_config}, key {name!r}")
    locked = names
    path = default_dir("config_dir", environ) / "config.toml"
    for name, value in _read_config(path).items():
        take(name, value, f"{path}, key {name!r}")
    for name, value in (overrides or {}).items():
        take(name.replace("-", "_"), value, f"kernelspec option --{name.replace('_', '-')}")
    for variable, value in environ.items():
        if variable in _NO_SETTINGS:
            continue
        if variable.startswith(ENVIRONMENT_PREFIX) and value:
            name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
            take(name, value, f"environment variable {variable}")
    for name, value in (options or {}).items():
        take(name.replace("-", "_"), value, f"option --{name.replace('_', '-')}")
    for name, value in (given or {}).items():
        take(name, value, "the program")
    return LoadedSettings(Settings(**values), sources)


def check_names(names: Iterable[str]) -> None:
    """See that settings that a program names are there.

    Raises:
        SettingsError: one is not.
    """
    for name in names:
        if name not in FIELDS:
            raise SettingsError(
                f"there is no setting {name!r}", hint=f"the settings are: {', '.join(FIELDS)}"
            )


def dump_settings(settings: Settings) -> dict[str, Any]:
    """The settings as plain values of JSON, for another process or a later day."""
    values: dict[str, Any] = msgspec.to_builtins(settings, enc_hook=str)
    return values


def restore_settings(values: Mapping[str, Any]) -> Settings:
    """Settings from `dump_settings`; what this version does not know is left out.

    Raises:
        SettingsError: a value is not allowed.
    """
    return Settings(**{name: value for name, value in values.items() if name in FIELDS})


def _parse(name: str, field: Field, value: object, source: str) -> Any:
    try:
        return field.parse(value)
    except ValueError as error:
        reason = str(error)
        # int() and float() speak of Python; everything of ours above is meant for people.
        why = "not a number" if reason.startswith(("invalid literal", "could not")) else reason
        # Somebody may have written a secret where its name belongs
        shown = "wrong" if name == "env" else repr(value)
        raise SettingsError(
            f"Setting {name!r} is {shown} (from {source}): {why}. Allowed: {field.allowed}.",
            hint=f"change {source}",
        ) from error


def locked_settings(system_config: Path = SYSTEM_CONFIG) -> frozenset[str]:
    """The settings that the administrator has locked.  Raises SettingsError."""
    return _locked(_read_config(system_config), system_config)


def check_locked(settings: Settings, system_config: Path = SYSTEM_CONFIG) -> None:
    """See that settings that a program made, or an earlier day, are not what is locked today.

    Raises:
        SettingsError: one is; and what is wrong with the administrator's file.
    """
    administrators = _read_config(system_config)
    locked = _locked(administrators, system_config)
    if not locked:
        return
    environ = {k: v for k, v in os.environ.items() if not k.startswith(ENVIRONMENT_PREFIX)}
    environ["XDG_CONFIG_HOME"] = "/dev/null"  # where no user's file is
    in_force = load_settings(environ=environ, system_config=system_config)
    for name in locked:
        if name == "memory" and name not in administrators:
            continue  # each recipe has its own
        values = {name: getattr(in_force, name)}
        _require_same(name, getattr(settings, name), "the program", values, system_config)


def check_lockable(locked: Iterable[str], values: Iterable[str], source: str) -> None:
    """See that what is to be locked has one of the *values*, where it takes one to lock it.

    Raises:
        SettingsError: it has none.
    """
    there = {"images_dir" if name == "base_images_dir" else name for name in values}
    for name in locked:
        if name in _BY_ENVIRONMENT and name not in there:
            raise SettingsError(
                f"{source}: {name!r} has no value in that file, and its default follows what each "
                "user can choose (XDG_…, another setting): it would not be locked",
                hint=f"the administrator gives {name} a value there, or does not lock it",
            )


def _locked(administrators: Mapping[str, Any], path: Path) -> frozenset[str]:
    """The names under the key ``locked`` of the administrator's file."""
    names = administrators.get("locked", ())
    source = f"{path}, key 'locked'"
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise SettingsError(
            f"{source}, is not a list of settings' names",
            hint='write it like: locked = ["network", "workspace"]',
        )
    for name in names:
        if name not in FIELDS:
            raise _unknown(name, source)
    # The two are names of one setting
    locked = frozenset("images_dir" if name == "base_images_dir" else name for name in names)
    check_lockable(locked, administrators, source)
    return locked


def _require_same(
    name: str, value: object, source: str, values: Mapping[str, Any], system_config: Path
) -> None:
    """See that a locked setting is not changed; the value that it has anyway may be repeated."""
    in_force = values[name] if name in values else getattr(Settings(**values), name)
    if value != in_force:
        raise SettingsError(
            f"Setting {name!r} may not be changed (by {source}): the administrator has locked it "
            f"in {system_config}; it is {_in_words(in_force)}.",
            hint=f"remove it from {source}, or ask the administrator",
        )


def _in_words(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _unknown(name: str, source: str) -> SettingsError:
    from difflib import get_close_matches

    close = get_close_matches(name, FIELDS, n=1, cutoff=0.5)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    return SettingsError(
        f"There is no setting {name!r} (from {source}).{guess}",
        hint=f"correct or remove it; the settings are: {', '.join(FIELDS)}",
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"The configuration file {path} cannot be read: {error}",
            hint="make it a readable text file (UTF-8), or remove it",
        ) from error
    import tomllib  # only who has such a file pays for the parser

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(
            f"The configuration file {path} is not valid TOML: {error}",
            hint='write one setting a line, like: memory = "4G"',
        ) from error


def ensure_private_dir(path: Path) -> Path:
    """Make *path* a directory that only this user can enter, or find it so; return it.

    Guards against another user of the host who made ``/tmp/vmkernel-<uid>`` beforehand, as a
    directory of theirs or as a link, to get at our sockets.

    Raises:
        SettingsError: it cannot be made, is a link, is not ours, or is open to others.
    """
    import stat

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise SettingsError(
            f"The directory {path} cannot be made: {error.strerror or error}",
            hint="set VMKERNEL_RUNTIME_DIR to a directory that you can make",
        ) from error
    if not stat.S_ISDIR(found.st_mode):
        problem = "it is a link" if stat.S_ISLNK(found.st_mode) else "it is no directory"
    elif found.st_uid != os.geteuid():
        problem = f"it belongs to user id {found.st_uid}, not to you ({os.geteuid()})"
    elif found.st_mode & 0o077:
        problem = f"others may enter it (mode {stat.S_IMODE(found.st_mode):04o}, wanted 0700)"
    else:
        return path
    raise SettingsError(
        f"The directory {path} is not private: {problem}.",
        hint=f"look at what it is, then `chmod 700 {path}` or remove it, "
        "or set VMKERNEL_RUNTIME_DIR to another place",
    )
