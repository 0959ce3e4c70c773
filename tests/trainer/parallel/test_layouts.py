"""Every layout gives what one process gives: losses, evaluation, the exported adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conftest import RecordNumber
from tests.trainer.parallel.base import IDLE_EXPERT, OPTIONS, build_base, plain_config
from tests.trainer.parallel.launch import logs, run_job
from tests.trainer.parallel.worker import Run

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tp": 2},
    "PP2": {"pp": 2},
    "EP2": {"dp": 2, "ep": 2},
    "DP2": {"dp": 2},
    "TP2xPP2": {"tp": 2, "pp": 2},
    "TP2xDP2": {"tp": 2, "dp": 2},
    "TP2xDP2, EP4": {"tp": 2, "dp": 2, "ep": 4},
    "PP2xEP2": {"pp": 2, "dp": 2, "ep": 2, "layers": [1, 2]},
}
# One expert a layer: most processes have none to train, and must take part in the way back all the same.
FEW_EXPERTS: dict[str, Any] = {
    "lora": {"targets": ["experts"], "rank": 4},
    "selection": {"by": "token_share", "threshold": 0.05, "sample_rows": 8},
}
# Nothing but experts, whose gradients are small: this clips every step, by a norm that each layout must count alike.
CLIPPED_EXPERTS: dict[str, Any] = {
    "lora": {"targets": ["experts"], "rank": 4},
    "optimizer": {"lr": 2e-3, "clip_norm": 0.02, "eps": 1e-3},
}
VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, tuple(LAYOUTS)),
    "options": (OPTIONS, ("TP2", "EP2", "TP2xPP2", "TP2xDP2, EP4", "PP2xEP2")),
    "clipped experts": (CLIPPED_EXPERTS, ("DP2", "EP2", "TP2xDP2", "TP2xPP2")),
    "few experts": (FEW_EXPERTS, ("TP2", "EP2", "TP2xPP2", "TP2xDP2, EP4", "PP2xEP2")),
}


def _num_processes(layout: dict[str, Any]) -> int:
    return layout.get("tp", 1) * layout.get("pp", 1) * layout.get("dp", 1)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One process first, then each layout, two or four processes at a time."""
    folder = tmp_path_factory.mktemp("layouts")
    build_base(folder / "base")
    jobs: dict[int, list[Run]] = {}
    wanted = []
    for variant, (options, names) in VARIANTS.items():
        for name in ("one", *names):
            layout = LAYOUTS.get(name, {})
            wanted.append(f"{name}: {variant}")
            config = plain_config(folder / "base", folder / wanted[-1], parallel=layout, **options)
            jobs.setdefault(_num_processes(layout), []).append(Run(config, str(folder / f"{wanted[-1]}.pt")))
    for num_processes, runs in jobs.items():
        statuses = run_job(runs, num_processes, folder / f"jobs-{num_processes}")
        assert statuses == [0] * num_processes, logs(folder / f"jobs-{num_processes}") + "".join(
            path.read_text() for path in folder.glob("*.error.*")
        )
    return {name: torch.load(folder / f"{name}.pt") for name in wanted}


@pytest.mark.parametrize(
    ("layout", "variant"), [(name, variant) for variant, (_, names) in VARIANTS.items() for name in names]
)
def test_a_layout_trains_what_one_process_trains(
    results: dict[str, dict[str, Any]], layout: str, variant: str, record_number: RecordNumber
) -> None:
    one, name = results[f"one: {variant}"], f"{layout}: {variant}"
    seen = results[name]
    assert len(seen["losses"]) == 5
    pairs = zip(seen["losses"], one["losses"], strict=True)
    record_number(f"{name}, loss, relative", max(abs(a / b - 1) for a, b in pairs), at_most=1e-5)
    pairs = zip(seen["norms"], one["norms"], strict=True)
    record_number(f"{name}, gradient norm, relative", max(abs(a / b - 1) for a, b in pairs), at_most=1e-5)
    assert seen["adapter"].keys() == one["adapter"].keys()
    worst = max(float((seen["adapter"][key] - one["adapter"][key]).abs().max()) for key in one["adapter"])
    record_number(f"{name}, exported adapter, absolute", worst, at_most=1e-5)
    assert seen["scores"]["loss"] == pytest.approx(one["scores"]["loss"], rel=1e-5)
    assert seen["scores"]["exact_match"] == one["scores"]["exact_match"]
    assert seen["scores"]["documents"] == one["scores"]["documents"] == 40


def test_the_runs_were_not_trivial(results: dict[str, dict[str, Any]]) -> None:
    """Losses move, routing is uneven, an expert with factors saw no token, clipping acted, selection left some out."""
    losses = results["one: plain"]["losses"]
    assert len(set(losses)) == 5
    tensors = results["one: plain"]["adapter"]
    for variant in ("plain", "clipped experts"):
        tokens = results[f"one: {variant}"]["tokens"]
        for layer, tokens_E in tokens.items():
            assert tokens_E[IDLE_EXPERT] == 0 and f"{layer}.{IDLE_EXPERT}.down.b" in tensors
            assert tokens_E.max() > 3 * tokens_E[tokens_E > 0].min(), tokens_E
        assert max(tokens_E.max() / tokens_E.double().mean() for tokens_E in tokens.values()) > 2
    assert min(results["one: clipped experts"]["norms"]) > 2 * CLIPPED_EXPERTS["optimizer"]["clip_norm"]
    assert min(results["one: plain"]["norms"]) > 1, "the plain runs' clip_norm"
    with_options = results["one: options"]["adapter"]
    assert len(with_options) < len(tensors)
    few = {key.split(".")[1] for key in results["one: few experts"]["adapter"] if key.startswith("1.")}
    assert len(few) == 1
