"""The plain data of a pickle, without running it: containers, numbers, strings and tensor descriptions.

A pickle is a program that may call any function. Here its opcodes are only read (pickletools.genops); dictionaries,
lists and tuples are built, torch's tensor constructors become a TensorRef, and every other object is an OPAQUE.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loaders.errors import AdapterError

_TENSOR_BUILDERS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_npu_tensor")
_PARAMETER_BUILDERS = ("_rebuild_parameter", "_rebuild_parameter_with_state")
_MARK = object()


@dataclass(frozen=True)
class Name:
    """A class or function that the pickle names; never imported."""

    module: str
    name: str


@dataclass(frozen=True)
class StorageRef:
    """A storage in the archive: `data/{key}`, of the class `kind` (FloatStorage, say)."""

    kind: str
    key: str


@dataclass(frozen=True)
class TensorRef:
    """A view of a storage: offset, sizes and strides in elements."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Opaque:
    """An object of any other class: what it would be does not matter here."""


OPAQUE = Opaque()


def read_pickle(data: bytes, label: str) -> Any:
    """The data of a torch.save pickle; raises AdapterError naming `label` where it is broken or of an unknown form."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.run(opcode.name, argument)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError) as cause:
        raise AdapterError(f"{label}: not a pickle of tensors ({str(cause)[:120]})") from None
    raise AdapterError(f"{label}: the pickle ends too early")


class _Machine:
    """The stack and the memo of the pickle language."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            self.stack.append(argument)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self._memo[argument])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            self._push_tuple(int(name[-1]))
        elif name not in ("PROTO", "FRAME"):
            step = _STEPS.get(name)
            if step is None:
                raise ValueError(f"opcode {name}")
            step(self, argument)

    def _push_tuple(self, size: int) -> None:
        items = tuple(self.stack[-size:])
        if len(items) != size:
            raise ValueError("too few items on the stack")
        self.stack[-size:] = [items]

    def to_mark(self) -> list[Any]:
        """Take off everything above the last mark, and the mark."""
        start = len(self.stack) - 1
        while self.stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise ValueError("no mark on the stack")
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def set_items(self, items: list[Any]) -> None:
        """Store key, value, key, value ... in the dictionary on top; other objects keep nothing."""
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(zip(items[::2], items[1::2], strict=True))

    def append(self, items: list[Any]) -> None:
        """Extend the list on top; other objects keep nothing."""
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)

    def reduce(self) -> None:
        """What a call would return, for the calls that are known."""
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(_result(function, arguments))

    def persistent(self) -> None:
        """torch's persistent id: ("storage", class, key, location, number of elements)."""
        tag, kind, key, *_ = self.stack.pop()
        if tag != "storage" or not isinstance(kind, Name) or not isinstance(key, str):
            raise ValueError("a persistent id that is no storage")
        self.stack.append(StorageRef(kind.name, key))

    def drop(self, count: int) -> None:
        """Forget the topmost items."""
        del self.stack[-count:]

    def drop_class(self, count: int) -> None:
        """Replace a class and its arguments by an object of it."""
        self.drop(count)
        self.stack.append(OPAQUE)


def _result(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        return OPAQUE
    if (function.module, function.name) == ("collections", "OrderedDict"):
        return dict(arguments[0]) if arguments else {}
    if function.name in _PARAMETER_BUILDERS and arguments and isinstance(arguments[0], TensorRef):
        return arguments[0]
    if function.name in _TENSOR_BUILDERS and len(arguments) >= 4 and isinstance(arguments[0], StorageRef):
        storage, offset, shape, stride = arguments[:4]
        numbers = (offset, *shape, *stride)
        if len(shape) != len(stride) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a tensor of impossible sizes")
        return TensorRef(storage, offset, tuple(shape), tuple(stride))
    return OPAQUE


def _global(machine: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    machine.stack.append(Name(module, name))


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(Name(str(module), str(name)))


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": lambda: OPAQUE,
    "MARK": lambda: _MARK,
}
_LITERALS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": lambda machine, _: machine.reduce(),
    "BINPERSID": lambda machine, _: machine.persistent(),
    "BUILD": lambda machine, _: machine.drop(1),
    "POP": lambda machine, _: machine.drop(1),
    "NEWOBJ": lambda machine, _: machine.drop_class(2),
    "NEWOBJ_EX": lambda machine, _: machine.drop_class(3),
    "POP_MARK": lambda machine, _: machine.to_mark().clear(),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.to_mark())),
    "LIST": lambda machine, _: machine.stack.append(machine.to_mark()),
    "SETITEM": lambda machine, _: machine.set_items([*reversed([machine.stack.pop(), machine.stack.pop()])]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.to_mark()),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.to_mark()),
    "ADDITEMS": lambda machine, _: machine.append(machine.to_mark()),
}
