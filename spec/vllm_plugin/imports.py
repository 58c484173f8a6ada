"""Acting on a module once it is imported, without importing it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def once_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call ``action(module)`` right after module ``name`` has been imported: at once if it already is."""
    if name in sys.modules:
        action(sys.modules[name])
    elif not any(isinstance(finder, _Waiting) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(name, action))


class _Waiting(MetaPathFinder):
    """Finds the module as anybody would, and has its loader call ``action`` after running it."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]):
        self.name = name
        self._action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)  # its work is done, and the look-up below must not come back here
        found = importlib.util.find_spec(fullname)
        if found is None or found.loader is None:
            return None
        execute = found.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            self._action(module)

        found.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return found
