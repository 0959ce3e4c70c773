"""Shape rules that all two-dimensional layouts share."""

from loaders.adapter_explain import explain_hidden
from loaders.adapter_formats.base import FormatContext
from loaders.adapter_keys import FactorPair
from loaders.adapter_types import ExpertShape


def check_pair(pair: FactorPair, out_features: int, in_features: int, hidden: int | None, ctx: FormatContext) -> None:
    """lora_A must be [r, in], lora_B [out, r] with one r within the limit; `hidden` words the likely cause."""
    a_shape, b_shape = pair.a_shape, pair.b_shape
    if len(a_shape) != 2 or len(b_shape) != 2:
        ctx.problems.append(f"{pair.module}: lora_A {list(a_shape)} and lora_B {list(b_shape)} must be 2-D")
        return
    before = len(ctx.problems)
    if a_shape[1] != in_features:
        cause = explain_hidden(a_shape[1], in_features) if hidden == in_features else ""
        ctx.problems.append(
            f"{pair.module}: lora_A is {list(a_shape)}, expected [r, {in_features}] for this base{cause}"
        )
    if b_shape[0] != out_features:
        cause = explain_hidden(b_shape[0], out_features) if hidden == out_features else ""
        ctx.problems.append(
            f"{pair.module}: lora_B is {list(b_shape)}, expected [{out_features}, r] for this base{cause}"
        )
    if a_shape[0] != b_shape[1]:
        ctx.problems.append(f"{pair.module}: lora_A has rank {a_shape[0]}, lora_B has rank {b_shape[1]}")
    elif a_shape[0] == 0:
        ctx.problems.append(f"{pair.module}: rank 0")
    if len(ctx.problems) == before:
        ctx.check_rank(pair.module, ctx.rules.name_in_patterns(pair.module), a_shape[0])


def check_expert(module: str, expert: int, shape: ExpertShape, ctx: FormatContext) -> bool:
    """Whether the base's layer has an expert of this index; a problem is added if not."""
    if expert < shape.num_experts:
        return True
    ctx.problems.append(
        f"{module}: the base has {shape.num_experts} experts (0 to {shape.num_experts - 1}); "
        "trained on a base with more?"
    )
    return False
