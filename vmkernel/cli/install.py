"""``vmkernel install`` and ``uninstall``: the kernelspec that makes Jupyter offer the kernel.

The kernelspec is ``kernelspec/`` (a kernel.json template and logos) with this Python's path and
the chosen options written into its command line. Floor 5.
"""

from __future__ import annotations

import contextlib
import json
import py_compile
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmkernel.errors import ImageError, SettingsError, VmError

if TYPE_CHECKING:
    from vmkernel.image.recipe import Recipe
    from vmkernel.settings import Settings

DEFAULT_NAME = "vmsandbox"
CLUSTER_NAME = "vmsandbox-ray"
PROVISIONER = "vmkernel-ray"
_CLUSTER_COMMAND = "vmkernel.cluster"
_LAUNCHER = ("pool", "launcher.py")
# As jupyter_client.kernelspec allows them, less capitals, which it would turn to small ones.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


def kernel_name(options: Mapping[str, str], default: str = DEFAULT_NAME) -> str:
    """The kernelspec's name where none is asked for: *default*, or with the recipe's name."""
    from vmkernel.settings import Settings

    recipe = options.get("recipe", "")
    return default if recipe in ("", Settings().recipe) else f"{default}-{recipe}"


def _launcher() -> Path:
    import vmkernel

    return Path(vmkernel.__file__).absolute().parent.joinpath(*_LAUNCHER)


def kernel_json(
    display_name: str | None, options: Mapping[str, str], recipe: Recipe | None = None
) -> dict[str, Any]:
    """The content of ``kernel.json``: the template, this Python, and *options* (settings).

    *recipe* gives the language and, where *display_name* is None, what the launcher shows.  The
    interrupt mode is the wrapper kernel's, not that of the kernel in the guest: it takes messages.
    """
    from vmkernel.resources import resource_dir

    spec: dict[str, Any] = json.loads((resource_dir("kernelspec") / "kernel.json").read_text())
    # sys.executable as it is: resolving a venv's link would lose the venv.
    places = {"{python}": sys.executable, "{launcher}": str(_launcher())}
    spec["argv"] = [places.get(word, word) for word in spec["argv"]]
    spec["argv"] += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    if recipe is not None:
        spec["display_name"] = recipe.language.display_name
        spec["language"] = recipe.language.name
        if recipe.engine != "python":
            spec["metadata"]["debugger"] = False
    if display_name is not None:
        spec["display_name"] = display_name
    return spec


def on_a_cluster(spec: dict[str, Any], options: Mapping[str, str], on_hosts: str) -> None:
    """Change *spec* (`kernel_json` with *options*) to a kernel that Ray places on some VM host.

    *on_hosts* is the kernelspec that is started there.  Front ends that know no provisioners get a
    command that says so.
    """
    spec["argv"] = [sys.executable, "-P", "-m", _CLUSTER_COMMAND, "-f", "{connection_file}"]
    spec["display_name"] = re.sub(r"\((microVM.*)\)", r"(\1, cluster)", spec["display_name"])
    spec["metadata"]["kernel_provisioner"] = {
        "provisioner_name": PROVISIONER,
        "config": {"kernel_name": on_hosts, "options": dict(options)},
    }


def chosen_recipe(settings: Settings) -> Recipe | None:
    """What the settings' image was built from, or is to be; None when nobody knows the name."""
    from vmkernel.image.recipe import load_recipe
    from vmkernel.image.store import find_image

    try:
        return find_image(settings.recipe, settings).recipe
    except ImageError:
        try:
            return load_recipe(settings.recipe)
        except ImageError:
            return None


def install_kernelspec(
    kernels_dir: Path,
    *,
    name: str | None = None,
    display_name: str | None = None,
    options: Mapping[str, str] | None = None,
    on_hosts: str = "",
) -> Path:
    """Write the kernelspec *name* into *kernels_dir* (``…/share/jupyter/kernels``), in one step.

    Without *name* and *display_name* they follow the recipe that *options* or settings name.
    *options* are settings by name, as text; they are checked here, so that a mistake shows now
    and not when a notebook is opened. With *on_hosts*, the kernel runs on a cluster of VM hosts,
    which have a kernelspec of that name. Returns the kernelspec's directory.

    Raises:
        SettingsError: an option or the name is not allowed.
        VmError: the place is taken by another kernel, or cannot be written.
    """
    from vmkernel.resources import resource_dir
    from vmkernel.settings import load_settings

    options = dict(options or {})
    recipe = chosen_recipe(load_settings(options))
    if name is None:
        name = kernel_name(options, CLUSTER_NAME if on_hosts else DEFAULT_NAME)
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"{name!r} cannot be a kernel's name",
            hint="use small letters, digits, '.', '_' and '-', a letter or digit first",
        )
    target = kernels_dir / name
    if target.exists() and not is_ours(target):
        raise VmError(
            f"{target} is the kernelspec of another kernel",
            hint="choose another name with --name",
        )
    # Beside the target, so that the last step is a rename: Jupyter never sees half a kernelspec.
    # A leading dot is no valid kernel name, so Jupyter skips it meanwhile.
    fresh = kernels_dir / f".{name}.new"
    try:
        kernels_dir.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        with contextlib.suppress(OSError, py_compile.PyCompileError):
            # Which would be compiled at each start, where nobody may write beside the sources
            py_compile.compile(str(_launcher().with_name("handover.py")), doraise=True)
        for logo in resource_dir("kernelspec").glob("logo-*"):
            shutil.copyfile(logo, fresh / logo.name)
        content = kernel_json(None if on_hosts else display_name, options, recipe)
        if on_hosts:
            on_a_cluster(content, options, on_hosts)
            content["display_name"] = display_name or content["display_name"]
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (fresh / "kernel.json").write_text(text + "\n", encoding="utf-8")
        _remove(target)
        fresh.rename(target)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise VmError(
            f"The kernelspec cannot be written to {target}: {error.strerror or error}",
            hint="install for yourself with --user, or into an environment of your own "
            "with --prefix",
        ) from error
    return target


def is_ours(kernelspec_dir: Path) -> bool:
    """Whether *kernelspec_dir* starts vmkernel; one that cannot be read is not."""
    try:
        argv = json.loads((kernelspec_dir / "kernel.json").read_bytes())["argv"]
        if "-m" in argv:  # of a cluster, or as it was before there was a launcher
            return argv[argv.index("-m") + 1] in ("vmkernel", _CLUSTER_COMMAND)
        return Path(argv[argv.index("-f") - 1]).parts[-3:] == ("vmkernel", *_LAUNCHER)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def is_on_a_cluster(kernelspec_dir: Path) -> bool:
    """Whether a kernelspec of ours starts its kernels on a cluster."""
    argv = json.loads((kernelspec_dir / "kernel.json").read_bytes())["argv"]
    return _CLUSTER_COMMAND in argv


def installed_kernelspecs() -> dict[str, Path]:
    """Every kernelspec that this Jupyter sees and that starts vmkernel, by name."""
    from jupyter_client.kernelspec import KernelSpecManager

    found = KernelSpecManager().find_kernel_specs()
    return {name: Path(path) for name, path in found.items() if is_ours(Path(path))}


def uninstall_kernelspec(name: str, kernels_dir: Path | None = None) -> Path:
    """Remove the kernelspec *name* from *kernels_dir*, or from where Jupyter finds it.

    Raises:
        VmError: there is none of that name, it is not vmkernel's, or it cannot be removed.
    """
    found = installed_kernelspecs()
    target = kernels_dir / name if kernels_dir else found.get(name)
    if target is None or not is_ours(target):
        others = ", ".join(f"{n} ({p})" for n, p in found.items()) or "none"
        raise VmError(
            f"There is no kernelspec {name!r} of vmkernel"
            + (f" in {kernels_dir}" if kernels_dir else ""),
            hint=f"name one that is installed with --name; installed here: {others}",
        )
    try:
        _remove(target)
    except OSError as error:
        raise VmError(
            f"{target} cannot be removed: {error.strerror or error}",
            hint="remove it as the user who installed it",
        ) from error
    return target


def _remove(directory: Path) -> None:
    if directory.is_symlink():
        directory.unlink()
    elif directory.exists():
        shutil.rmtree(directory)


def _kernels_dir(user: bool, sys_prefix: bool, prefix: Path | None) -> Path | None:
    if user + sys_prefix + (prefix is not None) > 1:
        raise click.UsageError("--user, --sys-prefix and --prefix exclude each other")
    if sys_prefix:
        prefix = Path(sys.prefix)
    if prefix is not None:
        return prefix.expanduser().absolute() / "share" / "jupyter" / "kernels"
    return None


def _user_kernels_dir() -> Path:
    from jupyter_core.paths import jupyter_data_dir

    return Path(jupyter_data_dir()) / "kernels"


_user = click.option("--user", is_flag=True, help="For you, in your home directory (default).")
_sys_prefix = click.option("--sys-prefix", is_flag=True, help="Into this Python's environment.")
_prefix = click.option(
    "--prefix", type=click.Path(file_okay=False, path_type=Path), help="Below PREFIX/share/jupyter."
)


@click.command()
@_user
@_sys_prefix
@_prefix
@click.option("--name", help="The kernel's name; else vmsandbox, or vmsandbox-RECIPE.")
@click.option("--display-name", help="What the launcher shows; else what the recipe says.")
@click.option("--recipe", help="The guest image to start from.")
@click.option("--memory", help="Memory of the VM, like 4G.")
@click.option("--vcpus", help="Virtual processors of the VM.")
@click.option(
    "--set", "more", multiple=True, metavar="NAME=VALUE", help="Any setting; may be repeated."
)
@click.option("--ray", is_flag=True, help="On a cluster of VM hosts, placed by Ray.")
@click.option(
    "--on-hosts", metavar="NAME", help="With --ray: the kernel that the hosts have; else vmsandbox."
)
def install(
    user: bool,
    sys_prefix: bool,
    prefix: Path | None,
    name: str | None,
    display_name: str | None,
    recipe: str | None,
    memory: str | None,
    vcpus: str | None,
    more: tuple[str, ...],
    ray: bool,
    on_hosts: str | None,
) -> None:
    """Offer the kernel in Jupyter, with the given options.

    Settings that are not given here come from the configuration files and the environment when
    a notebook is opened (`vmkernel settings`).
    """
    from vmkernel.image.store import has_image, in_which_places
    from vmkernel.settings import load_settings

    if on_hosts and not ray:
        raise click.UsageError("--on-hosts goes with --ray")
    options = {"recipe": recipe, "memory": memory, "vcpus": vcpus}
    given = {key: value for key, value in options.items() if value is not None}
    for item in more:
        key, equals, value = item.partition("=")
        if not equals:
            raise click.UsageError(f"--set takes NAME=VALUE, not {item!r}")
        given[key.replace("-", "_")] = value
    target = install_kernelspec(
        _kernels_dir(user, sys_prefix, prefix) or _user_kernels_dir(),
        name=name,
        display_name=display_name,
        options=given,
        on_hosts=(on_hosts or DEFAULT_NAME) if ray else "",
    )
    name = target.name
    display_name = json.loads((target / "kernel.json").read_text())["display_name"]
    click.echo(f"Installed {name!r} ({display_name}) in {target}")
    settings = load_settings(given)
    if ray:
        from vmkernel.cli.checks_cluster import cluster_parts

        check = cluster_parts()
        if check.state != "ok":
            click.echo(f"warning: {check.found}: {check.remedy}", err=True)
    elif not has_image(settings.recipe, settings):
        click.echo(
            f"warning: there is no image {settings.recipe!r} in {in_which_places(settings)} yet; "
            f"build it with: vmkernel image build {settings.recipe}",
            err=True,
        )
    seen = installed_kernelspecs().get(name)
    if seen != target:
        what = f"finds another {name!r} first: {seen}" if seen else "does not look there"
        click.echo(f"note: the Jupyter of this Python ({sys.prefix}) {what}", err=True)


@click.command()
@_user
@_sys_prefix
@_prefix
@click.option("--name", default=DEFAULT_NAME, show_default=True, help="The kernel's name.")
def uninstall(user: bool, sys_prefix: bool, prefix: Path | None, name: str) -> None:
    """Take the kernel out of Jupyter; images and templates stay."""
    place = _kernels_dir(user, sys_prefix, prefix) or (_user_kernels_dir() if user else None)
    click.echo(f"Removed {uninstall_kernelspec(name, place)}")
