"""Sets attributes and dictionary entries of a host so that each can be put back."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

_ABSENT = object()
#: Values whose patch was undone while another patch's lay above them, by identity: the value, and what was before it.
_buried: dict[int, tuple[Any, Any]] = {}


class Patcher:
    """A reversible set of changes to a host's modules and classes."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._changes: list[str] = []

    def __bool__(self) -> bool:
        """Something is changed."""
        return bool(self._undo)

    @property
    def changes(self) -> tuple[str, ...]:
        """What is changed, by qualified name, in order, each once."""
        return tuple(dict.fromkeys(self._changes))

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set ``owner.name``, which need not be there; a static or class method is put back as such."""
        before = vars(owner).get(name, _ABSENT)
        module = getattr(owner, "__module__", None)
        told = getattr(owner, "__qualname__", getattr(owner, "__name__", type(owner).__name__))
        self._changes.append(".".join(part for part in (module, told, name) if part))
        setattr(owner, name, value)

        def undo() -> None:
            # Another patch's is above it, or a module that was reloaded has its own again.
            if vars(owner).get(name, _ABSENT) is not value:
                _buried[id(value)] = (value, before)
                return
            restored = before
            while id(restored) in _buried:
                restored = _buried.pop(id(restored))[1]
            if restored is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, restored)

        self._undo.append(undo)

    def set_item(self, mapping: MutableMapping[str, Any], key: str, value: Any) -> None:
        """Set ``mapping[key]``, which need not be there."""
        before = mapping.get(key, _ABSENT)
        self._changes.append(f"[{key!r}]")
        mapping[key] = value

        def undo() -> None:
            if before is _ABSENT:
                del mapping[key]
            else:
                mapping[key] = before

        self._undo.append(undo)

    def undo(self) -> None:
        """Put everything back, last change first; what somebody else has changed since stays as it is."""
        while self._undo:
            self._undo.pop()()
        self._changes.clear()
