"""Rules of the code base that no linter knows: sizes, import directions, and what must not appear at all."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("runtime", "loaders")
SOURCE = (*PRODUCT, "tests", "examples", "benchmarks", "proto")
GENERATED = ("runtime/pb/",)
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# Each level may import itself and the levels after it (ARCHITECTURE: imports point one way).
LEVELS = (
    "runtime.cli",
    "runtime.commands",
    "runtime.server",
    "runtime.engine",
    "runtime.adapters",
    "runtime.models",
    "runtime.layers",
    "runtime.ops",
)
# What stands beside a level: it may import that level and the ones after it.
BESIDE = {
    "runtime.__main__": "runtime.cli",
    "runtime.demo": "runtime.commands",
    "runtime.bench": "runtime.commands",
    "runtime.doctor": "runtime.commands",
    "runtime.trainer": "runtime.models",
    "runtime.distributed": "runtime.ops",
}
# Plain data and names without imports of their own weight: anyone in `runtime` may use them.
COMMON = (
    "runtime.errors",
    "runtime.config",
    "runtime.env",
    "runtime.version",
    "runtime.distributed",
    "runtime.engine.messages",
    "runtime.engine.sampling_params",
)
DEVICE_CODE = ("runtime/ops/",)


@cache
def _python_files(*folders: str) -> tuple[Path, ...]:
    found = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return tuple(path for path in found if not _name(path).startswith(GENERATED))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _nodes(*folders: str) -> Iterator[tuple[Path, ast.AST]]:
    for path in _python_files(*folders):
        for node in ast.walk(_tree(path)):
            yield path, node


def _where(path: Path, node: ast.AST) -> str:
    return f"{_name(path)}:{getattr(node, 'lineno', 0)}"


def _report(problems: list[str]) -> None:
    distinct = list(dict.fromkeys(problems))
    if distinct:
        pytest.fail("\n  ".join([f"{len(distinct)} found:", *distinct]), pytrace=False)


def test_the_rules_look_at_the_code() -> None:
    """Guards the other tests against passing because they found nothing to read."""
    assert {_name(path) for path in _python_files(*PRODUCT)} >= {"runtime/errors.py", "runtime/config.py"}


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in _python_files(*SOURCE)}
    _report([f"{_name(path)}: {lines} lines" for path, lines in lengths.items() if lines > MAX_FILE_LINES])


def test_no_function_is_longer_than_60_lines() -> None:
    problems = []
    for path, node in _nodes(*SOURCE):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                problems.append(f"{_where(path, node)}: {node.name} has {lines} lines")
    _report(problems)


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Every module named by an import, relative ones resolved; `from a import b` gives `a.b` where that is a module."""
    package = _module(path).split(".") if path.name == "__init__.py" else _module(path).split(".")[:-1]
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, node.module] if node.module else base
            for alias in node.names:
                target = ROOT.joinpath(*".".join(base).split("."), alias.name)
                is_module = target.is_dir() or target.with_suffix(".py").is_file()
                yield node, ".".join([*base, alias.name] if is_module else base)


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def _level(module: str) -> int | None:
    for index, package in enumerate(LEVELS):
        if _within(module, (package,)) or module.startswith(f"{package}_"):
            return index
    return next((LEVELS.index(at) for package, at in BESIDE.items() if _within(module, (package,))), None)


def _import_problem(importer: str, imported: str) -> str | None:
    if not _within(imported, PRODUCT):
        return None
    if _within(importer, ("loaders",)):
        return None if _within(imported, ("loaders",)) else "loaders import nothing from runtime"
    level = _level(importer)
    if _within(imported, COMMON) or _within(importer, ("runtime.pb",)):
        return None
    if level is None:
        return "the importer is in no known package of the architecture"
    if _within(imported, ("loaders",)):
        return None if level <= LEVELS.index("runtime.models") else "only models and what stands above use the loaders"
    if _within(imported, ("runtime.pb",)):
        return None if level <= LEVELS.index("runtime.server") else "only server, cli and demo speak protobuf"
    other = _level(imported)
    if other is None:
        return "the imported is in no known package of the architecture"
    same = importer.split(".")[1] == imported.split(".")[1]
    return None if other > level or same or (other == level and _beside(importer)) else "imports point the other way"


def _beside(module: str) -> bool:
    return _within(module, (*BESIDE, "runtime.commands"))


def test_imports_point_one_way() -> None:
    problems = []
    for path in _python_files(*PRODUCT):
        for node, imported in _imports(path):
            problem = _import_problem(_module(path), imported)
            if problem:
                problems.append(f"{_where(path, node)}: imports {imported}: {problem}")
    _report(problems)


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("runtime.server.service", "runtime.engine.messages", True),
        ("runtime.adapters.registry", "runtime.models.deepseek.config", True),
        ("runtime.adapters.registry", "runtime.engine.messages", True),
        ("runtime.adapters.registry", "runtime.engine.scheduler", False),
        ("runtime.ops.cpu", "runtime.layers.norm", False),
        ("runtime.models.deepseek.moe", "runtime.adapters.lora_plan", False),
        ("runtime.engine.engine", "runtime.pb.fmaas.generation_pb2", False),
        ("runtime.errors", "runtime.server.app", False),
        ("loaders.checkpoint", "runtime.errors", False),
        ("runtime.trainer.loop", "runtime.engine.engine", False),
        ("runtime.demo.run", "runtime.commands.client", True),
        ("runtime.commands.demo", "runtime.demo.run", True),
        ("runtime.bench.run", "runtime.commands.client", True),
        ("runtime.server.service", "runtime.bench.statistics", False),
        ("runtime.server.service", "runtime.commands.client", False),
    ],
)
def test_the_import_rule_tells_right_from_wrong(importer: str, imported: str, allowed: bool) -> None:
    assert (_import_problem(importer, imported) is None) is allowed


def test_the_front_end_does_not_import_torch() -> None:
    """Its process has no model and no device; torch alone would cost it half a second and 200 MB."""
    _report(
        [
            f"{_where(path, node)}: imports {imported}"
            for path in _python_files("runtime/server")
            for node, imported in _imports(path)
            if _within(imported, ("torch",))
        ]
    )


def _is_device_word(node: ast.AST) -> bool:
    value = node.value if isinstance(node, ast.Constant) else None
    return isinstance(value, str) and value.split(":")[0] in ("cuda", "npu")


def _branches_on_device(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare):
        return any(_is_device_word(part) for side in (node.left, *node.comparators) for part in ast.walk(side))
    if isinstance(node, ast.MatchValue):
        return _is_device_word(node.value)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
        return any(_is_device_word(argument) for argument in node.args)
    if isinstance(node, ast.Attribute):
        return node.attr in ("is_cuda", "is_npu") or (
            node.attr in ("cuda", "npu") and isinstance(node.value, ast.Name) and node.value.id == "torch"
        )
    return False


def test_devices_are_told_apart_only_in_ops() -> None:
    _report(
        [
            f"{_where(path, node)}: {ast.unparse(node)}"
            for path, node in _nodes(*PRODUCT)
            if _branches_on_device(node) and not _name(path).startswith(DEVICE_CODE)
        ]
    )


def test_nothing_unpickles_or_evaluates() -> None:
    """A weight file or a message must never be able to run code."""
    problems = []
    for path in _python_files(*PRODUCT):
        for node, imported in _imports(path):
            if imported.split(".")[0] in ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"):
                problems.append(f"{_where(path, node)}: imports {imported}")
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "eval", "exec", "yaml.load"):
                problems.append(f"{_where(path, node)}: calls {ast.unparse(node.func)}")
    _report(problems)


def _narrows_a_type(test: ast.expr) -> bool:
    if isinstance(test, ast.Compare):
        return isinstance(test.ops[0], ast.IsNot) and ast.unparse(test.comparators[0]) == "None"
    return isinstance(test, ast.Call) and ast.unparse(test.func) == "isinstance"


def test_the_product_checks_with_exceptions_not_with_assert() -> None:
    """`python -O` removes asserts; only those that tell the type checker what is already sure are allowed."""
    _report(
        [
            f"{_where(path, node)}: {ast.unparse(node)}"
            for path, node in _nodes(*PRODUCT)
            if isinstance(node, ast.Assert) and not _narrows_a_type(node.test)
        ]
    )


def test_no_exception_is_swallowed() -> None:
    problems = []
    for path, node in _nodes(*PRODUCT):
        if isinstance(node, ast.ExceptHandler):
            everything = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            if everything and all(isinstance(line, ast.Pass) for line in node.body):
                problems.append(_where(path, node))
    _report(problems)


def _tracked_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listing.stdout.split("\0") if name)
    return [path for path in paths if path.is_file() and path.stat().st_size < 2**20]


def test_no_file_names_a_path_of_one_machine() -> None:
    local = re.compile("/(?:" + "|".join(("work/", "root/", "farm/", r"home/(?!nonroot|user)\w+/", "Users/")) + ")")
    problems = []
    for path in _tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        problems += [
            f"{_name(path)}:{number}: {line.strip()[:120]}"
            for number, line in enumerate(text.splitlines(), 1)
            if local.search(line)
        ]
    _report(problems)
