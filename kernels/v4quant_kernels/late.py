"""`torch`, imported at its first use.

Headers, plans and names need no arithmetic, and importing torch takes longer than reading them.
Modules that a command needs without computing anything take `torch` from here: to them and to
mypy it is torch. It cannot be asked for anything while such a module is being imported.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["torch"]

if TYPE_CHECKING:
    import torch
else:

    class _Late(ModuleType):
        _module: ModuleType | None = None

        def __getattr__(self, name: str) -> Any:
            module = self._module
            if module is None:
                module = self._module = import_module(self.__name__)
            return getattr(module, name)

    torch = _Late("torch")
