"""The back-end's calls of torch_npu fit the real schemas and have kernels on the bench; the kernels fit them too."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import torch_npu

from tests.npu.bench import KERNELS
from tests.npu.schema_check import operators, problems

BACK_END = Path(__file__).parents[2] / "runtime" / "ops" / "npu"
MODULES = sorted(BACK_END.rglob("*.py"))


def test_the_back_end_calls_torch_npu_as_its_schemas_say() -> None:
    found = [problem for module in MODULES for problem in problems(module.read_text(encoding="utf-8"), module.name)]
    assert not found, "\n".join(found)


def test_the_check_finds_the_calls_of_the_back_end() -> None:
    """Guards the test above against passing because the calls were written in a way that it does not see."""
    used = set().union(*(operators(module.read_text(encoding="utf-8")) for module in MODULES))
    assert {"npu_grouped_matmul", "npu_moe_init_routing_v2", "npu_fused_infer_attention_score_v2"} <= used


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ("torch_npu.npu_swiglu(x)", None),
        ("torch_npu.npu_rms_norm(x, gamma, epsilon=1e-6)", None),
        ("torch_npu.npu_grouped_matmul([x], [w], group_list=g, group_type=0, split_item=2)", None),
        ("torch.ops.npu.npu_swiglu_backward(grad, x)", None),
        ("torch_npu.npu.is_available()", None),
        ("hasattr(torch_npu, 'npu_of_a_later_release')", None),
        ("torch_npu.npu_swigloo(x)", "no operator npu_swigloo"),
        ("torch.ops.npu.npu_swigloo(x)", "no operator npu_swigloo"),
        ("torch_npu.npu_rms_norm(x, gamma, eps=1e-6)", "npu_rms_norm has no argument eps"),
        ("torch_npu.npu_rms_norm(x)", "needs the argument gamma"),
        ("torch_npu.npu_rms_norm(x, gamma, 1e-6, 2)", "takes 3 positional arguments, 4 are given"),
        ("torch_npu.npu_rms_norm(x, gamma, **options)", "cannot be checked"),
        ("torch_npu.npu_gelu(x)", "npu_gelu has no kernel on the bench"),
        ("torch_npu.npu.set_devices(0)", "has no torch_npu.npu.set_devices"),
        ("getattr(torch_npu, name)(x)", "hides a call"),
        ("from torch_npu import npu_swiglu", "import torch_npu whole"),
        ("import torch_npu as npu", "must keep its name"),
    ],
)
def test_the_check_tells_right_from_wrong(call: str, problem: str | None) -> None:
    found = problems(call, "module.py")
    if problem is None:
        assert not found
    else:
        assert len(found) == 1 and problem in found[0]


@pytest.mark.parametrize("name", ["npu_grouped_matmul", "npu_swiglu", "npu_fused_infer_attention_score"])
def test_the_operators_are_those_of_the_real_torch_npu(name: str) -> None:
    assert torch_npu.__version__.startswith("2.13.0") and torch.__version__.startswith("2.13.0")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", "PrivateUse1")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", "Meta")


@pytest.mark.parametrize("name", sorted(set(KERNELS) - {"npu_grouped_matmul.List"}))
def test_a_kernel_has_the_arguments_and_defaults_of_its_schema(name: str) -> None:
    """Python is given no argument that has its default, so a wrong default in a kernel would go unnoticed."""
    packet, _, overload = name.partition(".")
    schema = getattr(getattr(torch.ops.npu, packet), overload or "default")._schema
    parameters = inspect.signature(KERNELS[name].run).parameters
    free = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    named = {key: value for key, value in parameters.items() if value.kind is not inspect.Parameter.VAR_KEYWORD}
    arguments = {argument.name: argument for argument in schema.arguments}
    assert set(named) <= set(arguments) and (free or list(named) == list(arguments))
    for key, parameter in named.items():
        argument = arguments[key]
        assert argument.kwarg_only == (parameter.kind is inspect.Parameter.KEYWORD_ONLY)
        assert argument.has_default_value() == (parameter.default is not inspect.Parameter.empty)
        if argument.has_default_value():
            default = argument.default_value
            assert parameter.default == (tuple(default) if isinstance(default, list) else default)
    assert all(arguments[key].default_value is None for key in arguments if key not in named)
