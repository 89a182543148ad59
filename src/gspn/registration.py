"""Registers the operators with torch when `gspn` is imported or, if torch is imported later, right after torch. So the
command can refuse a wrong argument at once: importing torch takes seconds.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec


class _WithTorch:
    """A module finder that finds torch as the others do, and imports gspn.dispatch right after it."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        if name != "torch":
            return None
        others = (finder for finder in sys.meta_path if finder is not _WithTorch)
        searches = (finder.find_spec for finder in others if hasattr(finder, "find_spec"))  # old finders have none
        spec = next(filter(None, (search(name, path, target) for search in searches)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            importlib.import_module("gspn.dispatch")

        spec.loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Imports gspn.dispatch now if torch is imported, else after torch."""
    if "torch" in sys.modules:
        importlib.import_module("gspn.dispatch")
    elif _WithTorch not in sys.meta_path:
        sys.meta_path.insert(0, _WithTorch)
