"""What an experiment's runs train for: a task is a package here, or a class of one's own, "module:Class"."""

from importlib import import_module
from typing import Any

from torchdsc.lab.schema import Model, SettingsError, did_you_mean

__all__ = ["TASKS", "load_task", "settings_type"]

TASKS = ("language_modelling", "adaptation", "forecasting")


def settings_type(name: str) -> type[Model]:
    """The class of a task's settings; of those here without loading what trains.

    Raises:
        SettingsError: If there is no such task.
    """
    if name in TASKS:
        kind: type[Model] = import_module(f"{__name__}.{name}.settings").Settings
        return kind
    own: type[Model] = _class(name).settings_type
    return own


def load_task(name: str) -> Any:
    """The class of a task, a subclass of :class:`torchdsc.lab.tasks.task.Task`.

    Raises:
        SettingsError: If there is no such task.
    """
    return import_module(f"{__name__}.{name}.task").Task if name in TASKS else _class(name)


def _class(name: str) -> Any:
    from .task import Task

    module, _, attribute = name.partition(":")
    if not attribute:
        raise SettingsError(
            f"task must be one of {', '.join(TASKS)}, or module:Class, got {name!r}{did_you_mean(name, TASKS)}"
        )
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SettingsError(
            f"task must be module:Class that can be imported, got {name!r}: {error} (is its folder on PYTHONPATH?)"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise SettingsError(f"task must be a subclass of torchdsc.lab.tasks.task.Task, got {name!r}")
    return found
