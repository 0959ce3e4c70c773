"""docs/ascend.md against what it tells of: the operators that the back-end calls, and the committed counts."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/ascend.md").read_text(encoding="utf-8")
COUNTS: Mapping[str, Any] = json.loads((ROOT / "benchmarks/results/npu_launches.json").read_text(encoding="utf-8"))


def _called_operators() -> set[str]:
    called = set()
    for path in (ROOT / "runtime/ops/npu").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch_npu":
                called.add(node.attr)
    return called


def test_the_table_of_operators_names_those_that_the_back_end_calls() -> None:
    section = PAGE.split("## What runs where")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert set(re.findall(r"`(npu_\w+)`", " ".join(rows))) == _called_operators() != set()


def _amounts(case: Mapping[str, Any], num_rows: int, base: Mapping[str, Any]) -> str:
    """The row of the page after its label."""
    (layer,) = (part["operators"] for part in case["parts"] if part["name"] == "routed layer")
    own = sum(each["launches"] for name, each in layer.items() if not name.startswith("npu_"))
    operators = sum(each["launches"] for name, each in layer.items() if name.startswith("npu_"))
    step, times = case["step"], [f"{1e3 * seconds:,.1f}" for seconds in case["step"]["seconds"]]
    added = step["seconds"][0] / base["step"]["seconds"][0] - 1
    return " | ".join([
        f"{operators} + {own}", f"{step['operators']:,} + {step['others']:,}", f"{step['num_bytes'] / 1e9:.1f}",
        f"{step['flops'] / 1e12:.2f}", f"{1e3 * step['launch_seconds']:.1f}", *times,
        f"{num_rows / step['seconds'][0]:,.0f}", f"{100 * added:.0f} %",
    ])  # fmt: skip


@pytest.mark.parametrize("model", COUNTS["models"])
def test_the_tables_of_predictions_are_those_of_the_committed_counts(model: str) -> None:
    cases = COUNTS["models"][model]
    section = PAGE.split(f"### {model}")[1].split("\n##")[0]
    for label, case in cases.items():
        kind, num_rows = label.split(",")[0].split()
        base = cases[f"{kind} {num_rows}, 0 adapters" + (", no MLA prolog" if label.endswith("no MLA prolog") else "")]
        assert f"| {label} | {_amounts(case, int(num_rows), base)} |" in section.splitlines()
