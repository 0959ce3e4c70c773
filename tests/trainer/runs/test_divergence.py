"""A run whose numbers are lost: it ends, what was good stays, and the advice that it gives can be followed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from runtime.trainer.evaluate import Evaluation
from runtime.trainer.replicas import gradient_norm
from tests.trainer.runs.demo import MODEL, Graft, adapter_bytes, write_config

OPTIMIZER = {"lr": 1e30, "clip_norm": None, "schedule": "constant"}


@dataclass
class Score:
    """Replaces the evaluation's losses, one after the other, by these."""

    losses: Iterator[float]

    def __call__(self, *_: Any) -> Evaluation:
        return Evaluation(next(self.losses), 0.0, 1, 1)


def norms(*values: float | None) -> Any:
    """Replaces gradient norms, None by what it is."""
    given = iter(values)

    def norm(*arguments: Any) -> float:
        value = next(given, None)
        return gradient_norm(*arguments) if value is None else value

    return mock.patch("runtime.trainer.loop.gradient_norm", norm)


def names(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").glob("*"))


def test_the_last_good_checkpoint_outlasts_a_bad_one_and_is_named(graft: Graft, tmp_path: Path, rows: Path) -> None:
    """Steps 1 to 4 are good; the factors after step 4, saved then, give no finite gradients."""
    output = tmp_path / "out"
    config = write_config(tmp_path / "run.yaml", rows, output, keep_checkpoints=1, save_every=2, optimizer=OPTIMIZER
                          | {"lr": 1e-3})  # fmt: skip
    with norms(None, None, None, None, math.inf):
        said = graft("train", config)
    assert names(output) == ["step-00000002", "step-00000004"]
    good = output / "checkpoints" / "step-00000002"
    assert said.status == 1 and said.messages == [
        "graft train: step 5: the gradients are not finite, training diverged: start a new run in another output with "
        "a lower optimizer.lr or an optimizer.clip_norm (--resume keeps the settings, so it would diverge again); "
        f"{good} is from before that, and graft export writes its adapter"
    ]
    assert graft("export", good, "--base", MODEL, "--out", tmp_path / "exported").status == 0


def test_the_advice_leads_to_a_run_that_ends_well(graft: Graft, tmp_path: Path, rows: Path) -> None:
    settings = {"lora": {"targets": ["experts"], "rank": 4}, "save_every": 1, "steps": 3}
    config = write_config(tmp_path / "run.yaml", rows, tmp_path / "out", optimizer=OPTIMIZER, **settings)
    said = graft("train", config, "--set", "dtype=bfloat16")
    assert said.status == 1 and "a lower optimizer.lr or an optimizer.clip_norm or dtype: float32" in said.err
    assert "from before that" not in said.err, "step 1 already took the numbers away"
    advised = ["optimizer.lr=1e-3", "optimizer.clip_norm=1.0", f"output={tmp_path / 'again'}"]
    assert graft("train", config, *[f"--set={change}" for change in advised]).status == 0


def test_an_evaluation_that_is_not_finite_ends_the_run_and_is_never_the_best(
    graft: Graft, tmp_path: Path, rows: Path
) -> None:
    output = tmp_path / "out"
    config = write_config(tmp_path / "run.yaml", rows, output, eval_every=1, save_every=1, keep_checkpoints=1)
    with mock.patch("runtime.trainer.loop.evaluate", Score(iter([3.0, 2.0, math.nan]))):
        said = graft("train", config)
    assert said.status == 1 and len(said.messages) == 1, said.err
    assert "step 3: the evaluation loss is not finite, training diverged" in said.messages[0]
    assert names(output) == ["step-00000002"], "the state that gave it is not saved"
    state = json.loads((output / "checkpoints" / "step-00000002" / "run.json").read_text())
    assert (state["best_step"], state["best_loss"]) == (2, 2.0)
    assert len(adapter_bytes(output, "adapter-best")) > 0 and not (output / "adapter").exists()


def test_a_first_evaluation_that_is_not_finite_leaves_no_best_adapter(graft: Graft, tmp_path: Path, rows: Path) -> None:
    config = write_config(tmp_path / "run.yaml", rows, tmp_path / "out", eval_every=1, optimizer=OPTIMIZER, steps=2,
                          lora={"targets": ["experts"], "rank": 4})  # fmt: skip
    said = graft("train", config)
    assert said.status == 1 and "step 1: the evaluation loss is not finite" in said.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["tensorboard"]
