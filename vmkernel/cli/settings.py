"""``vmkernel settings``: every setting, its value, and where the value came from. Floor 5.

The table in ``docs/settings.md`` is made here too (``vmkernel settings --markdown``), so that it
cannot differ from what the code does; a test compares the two.
"""

from __future__ import annotations

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@click.option("--markdown", is_flag=True, help="The reference table of the documentation.")
def settings(as_json: bool, markdown: bool) -> None:
    """Show every setting, its value, and where the value came from."""
    from vmkernel.cli.output import print_json, print_table
    from vmkernel.settings import load_settings_with_sources, locked_settings

    if markdown:
        click.echo(settings_page(), nl=False)
        return
    loaded, sources = load_settings_with_sources()
    locked = locked_settings()
    rows = [
        (name, getattr(loaded, name), sources.get(name, "default"))
        for name in loaded.__struct_fields__
    ]
    if as_json:
        print_json(
            {
                name: {"value": value, "source": source, "locked": name in locked}
                for name, value, source in rows
            }
        )
    else:
        print_table(
            ("SETTING", "VALUE", "SOURCE"),
            [
                (name, _in_words(value), f"{source}{' (locked)' if name in locked else ''}")
                for name, value, source in rows
            ],
        )


def _in_words(value: object) -> str:
    if isinstance(value, tuple):
        value = ", ".join(map(str, value)) or None
    return "none" if value is None else str(value)


# Defaults that depend on the host or on the user's environment, told in words.
_DEFAULTS_IN_WORDS = {
    "max_concurrent_vms": "by the host's memory",
    "semaphore_file": "`<runtime_dir>/slots`",
    "images_dir": "`$XDG_DATA_HOME/vmkernel/images` (`~/.local/share/…`)",
    "cache_dir": "`$XDG_CACHE_HOME/vmkernel` (`~/.cache/…`)",
    "runtime_dir": "`$XDG_RUNTIME_DIR/vmkernel`, or `/tmp/vmkernel-<uid>`",
    "database_file": "`<state_dir>/vms.sqlite`",
    "history_file": "`<state_dir>/history.sqlite`",
    "state_dir": "`$XDG_STATE_HOME/vmkernel` (`~/.local/state/…`)",
}
_UNITS = {"memory": " MiB", "workspace_size": " MiB", "scratch_size": " MiB",
          "console_log_size": " MiB",
          "max_output": " MiB", "cluster_wait": " s", "cluster_lease": " s",
          "database_timeout": " s",
          "start_timeout": " s", "boot_timeout": " s"}  # fmt: skip


def settings_page() -> str:
    """The text of ``docs/settings.md``."""
    from vmkernel.settings import FIELDS, Settings

    defaults = Settings()
    lines = [
        "# Settings",
        "",
        "Made by `vmkernel settings --markdown`; do not edit by hand.",
        "",
        "A value is taken from the last of these that has one:",
        "",
        "1. the default,",
        "2. the administrator's file `/etc/vmkernel/config.toml`,",
        "3. the user's file `$XDG_CONFIG_HOME/vmkernel/config.toml` (`~/.config/vmkernel/…`),",
        "4. an option of the kernelspec, written by `vmkernel install --memory 4G` or, for any",
        "   setting, `vmkernel install --set NAME=VALUE`,",
        "5. the environment variable `VMKERNEL_<NAME>`, like `VMKERNEL_MEMORY=4G`; an empty one",
        "   counts as unset,",
        "6. an option of the command that is run: `vmkernel run --memory 4G`, for any setting",
        "   `vmkernel run --set NAME=VALUE`.",
        "",
        'A file holds one setting a line, as TOML: `memory = "4G"`. A wrong value or an unknown',
        "name is an error that names the setting, where it was found and what is allowed.",
        'In `/etc` there may also be `locked = ["network", "workspace"]`: names of settings that',
        "none of the later sources may change ([shared-hosts.md](shared-hosts.md)).",
        "`vmkernel settings` shows the values in force and where each came from.",
        "",
        "| Setting | Default | Allowed | Meaning |",
        "|---|---|---|---|",
    ]
    for name, field in FIELDS.items():
        value = getattr(defaults, name)
        plain = f"`{_in_words(value)}`{_UNITS.get(name, '')}"
        default = _DEFAULTS_IN_WORDS.get(name, plain)
        lines.append(f"| `{name}` | {default} | {field.allowed} | {field.meaning} |")
    return "\n".join(lines) + "\n"
