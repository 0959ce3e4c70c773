"""Reads Python source for its calls of torch_npu, and holds each against the real schemas and the bench's kernels."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch_npu

from tests.npu.bench import KERNELS


def problems(source: str, name: str) -> list[str]:
    """What is wrong with the calls of torch_npu in a module, each with its line; and imports that hide calls."""
    found = []
    tree = ast.parse(source, filename=name)
    for node in ast.walk(tree):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch_npu":
            found.append(f"{where}: import torch_npu whole, so that its calls can be found")
        elif isinstance(node, ast.Import):
            hidden = [alias for alias in node.names if alias.name.split(".")[0] == "torch_npu" and alias.asname]
            found += [f"{where}: torch_npu must keep its name, so that its calls can be found" for _ in hidden]
        elif isinstance(node, ast.Attribute) and _path(node):
            found += [f"{where}: {problem}" for problem in _name_problems(_path(node))]
        elif isinstance(node, ast.Call):
            found += [f"{where}: {problem}" for problem in _call_problems(node)]
    return found


def operators(source: str) -> set[str]:
    """The names of the npu operators that a module uses."""
    paths = [_path(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    return {name for path in paths if (name := _operator(path))}


def _path(node: ast.expr) -> tuple[str, ...]:
    """The dotted name of an expression that starts at torch_npu or torch.ops.npu, () for any other."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ()
    parts.insert(0, node.id)
    known = parts[0] == "torch_npu" or parts[:3] == ["torch", "ops", "npu"]
    return tuple(parts) if known else ()


@cache
def _schemas() -> dict[str, list[Any]]:
    """Operator name -> the schemas of its overloads, those that write into `out` left out."""
    found: dict[str, list[Any]] = {}
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace == "npu" and "out" not in schema.overload_name:
            found.setdefault(name, []).append(schema)
    return found


def _operator(path: tuple[str, ...]) -> str | None:
    """The operator that a dotted name calls, None for other things of torch_npu (its devices, its version)."""
    if path[:1] == ("torch_npu",) and len(path) == 2 and (path[1] in _schemas() or path[1].startswith("npu_")):
        return path[1]
    return path[3] if len(path) > 3 and path[:3] == ("torch", "ops", "npu") else None


def _name_problems(path: tuple[str, ...]) -> Iterator[str]:
    name = _operator(path)
    if name is not None and name not in _schemas():
        yield f"torch_npu {torch_npu.__version__} has no operator {name}"
    elif name is not None and name not in KERNELS:
        yield f"{name} has no kernel on the bench"
    elif path[0] == "torch_npu":
        value: object = torch_npu
        for part in path[1:]:
            if not hasattr(value, part):
                yield f"torch_npu {torch_npu.__version__} has no {'.'.join(path)}"
                return
            value = getattr(value, part)


def _call_problems(call: ast.Call) -> Iterator[str]:
    called = call.func
    if isinstance(called, ast.Name) and called.id == "getattr" and ast.unparse(call.args[0]) == "torch_npu":
        yield "getattr(torch_npu, ...) hides a call: write torch_npu.<name>(...)"
    name = _operator(_path(called))
    if name not in _schemas():
        return
    fitting = [list(_argument_problems(call, schema)) for schema in _schemas()[name]]
    yield from min(fitting, key=len)


def _argument_problems(call: ast.Call, schema: Any) -> Iterator[str]:
    name = schema.name.split("::")[1]
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    starred = any(isinstance(argument, ast.Starred) for argument in call.args)
    if starred or any(word.arg is None for word in call.keywords):
        yield f"{name}: arguments behind * or ** cannot be checked, write them out"
        return
    if len(call.args) > len(positional):
        yield f"{name} takes {len(positional)} positional arguments, {len(call.args)} are given"
    given = {*positional[: len(call.args)], *(word.arg for word in call.keywords)}
    known = {argument.name for argument in schema.arguments}
    yield from (f"{name} has no argument {word}" for word in sorted(filter(None, given - known)))
    required = [argument.name for argument in schema.arguments if not argument.has_default_value()]
    yield from (f"{name} needs the argument {word}" for word in required if word not in given)
