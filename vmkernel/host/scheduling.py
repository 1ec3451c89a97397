"""What a `Scheduler` goes by and is asked for: its configuration, one request, its statistics.

Where it stands: under ``scheduler.py``, over the settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from vmkernel.errors import SettingsError
from vmkernel.host.capacity import Statistics
from vmkernel.host.handle import OnInput, OnOutput
from vmkernel.host.start import settings_for_recipe
from vmkernel.models import Language
from vmkernel.settings import FIELDS, Settings, check_names, load_settings_with_sources


class SchedulerConfig:
    """What a `Scheduler` goes by.

    ``warm_pool_size``: how many ready VMs are kept. ``language``: what the members of the pool
    speak, and requests that do not say (default: what the recipe does). ``max_idle``: after how
    many seconds a member of the pool is replaced by a fresh one. Every setting of `Settings` may be
    given by its name; one that is not comes from where all settings come from (files,
    environment, default), and is in ``settings`` with the others.

    Raises:
        SettingsError: a value is not allowed, or there is no such setting.
    """

    def __init__(
        self,
        *,
        warm_pool_size: int = 0,
        language: Language | str | None = None,
        max_idle: float = 600.0,
        **settings: Any,
    ) -> None:
        found = load_settings_with_sources(given=settings)
        self.settings: Settings = settings_for_recipe(found)
        limit = self.settings.max_concurrent_vms
        if not 0 <= warm_pool_size <= limit:
            raise SettingsError(
                f"warm_pool_size is {warm_pool_size}, and max_concurrent_vms is {limit}",
                hint="keep from 0 to max_concurrent_vms VMs ready",
            )
        if not max_idle > 0:
            raise SettingsError(f"max_idle is {max_idle}", hint="give it seconds above 0")
        self.warm_pool_size = warm_pool_size
        self.language = language_of(language)
        self.max_idle = max_idle

    def __repr__(self) -> str:
        return (
            f"<SchedulerConfig warm_pool_size={self.warm_pool_size} max_idle={self.max_idle:g} "
            f"recipe={self.settings.recipe} memory={self.settings.memory} "
            f"max_concurrent_vms={self.settings.max_concurrent_vms}>"
        )

    def recipe_for(self, language: Language | None, recipe: str | None) -> str:
        """The recipe of a VM that was asked for so.  Raises ImageError: nothing speaks that."""
        if recipe is not None:
            return recipe
        if language is None:
            return self.settings.recipe
        from vmkernel.image.store import recipe_for_language

        return recipe_for_language(language, self.settings)

    @property
    def age_limit(self) -> float:
        """How long a member may be idle: a request is to get most of its VM's life."""
        lifetime = self.settings.lifetime
        return self.max_idle if lifetime is None else min(self.max_idle, lifetime / 2)


class SchedulerStatistics(NamedTuple):
    """A scheduler at one moment, and the slots of its host."""

    running: int
    """Requests that have a VM"""
    queued: int
    """Requests that have none yet"""
    warm: int
    """Members of the pool that are ready"""
    starting: int
    """Members of the pool that are on their way up"""
    done: int
    """Requests that have ended, well or badly, since the scheduler was made"""
    from_pool: int
    """How many of all requests got their VM from the pool"""
    slots: Statistics
    """The host's: limit, used, free, waiting"""


class Request(NamedTuple):
    """What `Scheduler.run` was asked for."""

    code: str
    recipe: str
    changes: dict[str, Any]
    """Settings in which this VM differs from the scheduler's others."""
    timeout: float | None
    queue_timeout: float | None
    tenant_id: str
    task_id: str
    env: Mapping[str, str]
    files: Mapping[str, Path | bytes]
    outputs: Mapping[str, Path]
    on_output: OnOutput | None
    on_input: OnInput | None
    on_progress: Callable[[str], None]


def changed(base: Settings, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What these settings make different from ``base``.  Raises SettingsError."""
    check_names(settings)
    wanted = msgspec.structs.replace(base, **settings)
    found = {name: getattr(wanted, name) for name in FIELDS}
    return {name: value for name, value in found.items() if value != getattr(base, name)}


def language_of(name: Language | str | None) -> Language | None:
    """The language of this name.  Raises SettingsError."""
    if name is None:
        return None
    try:
        return Language(name)
    except ValueError:
        raise SettingsError(
            f"There is no language {name!r}",
            hint=f"the languages are: {', '.join(Language)}; for any other use recipe=…",
        ) from None
