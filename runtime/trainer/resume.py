"""Which checkpoint a run goes on from, and whether it is the same run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.trainer.checkpoint import CheckpointProblem, RunState, checkpoints
from runtime.trainer.config import CHECKPOINTS, TrainConfig
from runtime.trainer.config_file import as_plain
from runtime.trainer.output import adapters_in

LATEST = "latest"
# What does not change the result of a run; everything else must be as it was.
FREE = frozenset(
    ("output", "model", "parallel", "micro_batch_rows", "device", "activation_checkpointing", "pack_experts",
     "log_every", "eval_every", "save_every", "keep_checkpoints", "check_replicas_every", "export_format",
     "export_dtype", "base_name", "measure_mfu")
)  # fmt: skip
# Settings that are read from the first to the last, the first that matches deciding.
ORDERED = frozenset(("lora.patterns",))


def find_checkpoint(output: Path, resume: str | None, *, overwrite: bool = False) -> Path | None:
    """The folder to resume from, None for a fresh start; raises CheckpointProblem where that would lose a run.

    `overwrite`: the user wants to lose it.
    """
    existing = checkpoints(output / CHECKPOINTS)
    if resume is None:
        if existing and not overwrite:
            raise CheckpointProblem(
                f"{output} holds checkpoints of an earlier run (up to {existing[-1].name}): go on with --resume, "
                "choose another output, or give --overwrite to replace that run"
            )
        if (adapters := adapters_in(output)) and not overwrite:
            raise CheckpointProblem(
                f"{output} holds the result of an earlier run ({', '.join(adapters)}): choose another output, or give "
                "--overwrite to replace that run"
            )
        return None
    if resume == LATEST:
        if not existing:
            raise CheckpointProblem(f"{output / CHECKPOINTS} holds no whole checkpoint to resume from")
        return existing[-1]
    path = Path(resume)
    return path if path.is_dir() else output / CHECKPOINTS / resume


def is_own_checkpoint(found: Path, output: Path) -> bool:
    """Whether a checkpoint lies in the folder into which this run writes its own."""
    return found.resolve().parent == (output / CHECKPOINTS).resolve()


def check_nothing_is_lost(found: Path, output: Path) -> None:
    """Raises CheckpointProblem if a run that goes on from `found` would write over or among other checkpoints."""
    standing = [path.name for path in checkpoints(output / CHECKPOINTS)]
    own = is_own_checkpoint(found, output)
    if own:
        standing = [name for name in standing if name > found.name]
        which = f"checkpoints after {found.name}"
    elif standing:
        which = "checkpoints of another run"
    else:
        standing, which = adapters_in(output), "the result of another run"
    if not standing:
        return
    raise CheckpointProblem(
        f"{output} holds {which} ({', '.join(standing)}), which this run would replace: go on in a new folder, for "
        f"instance with --resume {found} --set output={output}-from-{found.name}, or move those away first"
    )


def check_same_run(config: TrainConfig, resumed: RunState) -> None:
    """Raises CheckpointProblem naming the settings that must not change when a run goes on."""
    now, before = as_plain(config), dict(resumed.settings)
    changed = [
        f"{name} was {old!r}, is {new!r}"
        for name in sorted(now.keys() - FREE)
        for name, old, new in _differences(name, before.get(name), now[name])
    ]
    if changed:
        raise CheckpointProblem(
            "the run cannot go on with other settings: " + "; ".join(changed) + "; set them back, or start a new run"
        )


def check_same_inputs(config: TrainConfig, now: Mapping[str, str], before: Mapping[str, str]) -> None:
    """Raises CheckpointProblem naming the data or base that is not the one of the checkpoint."""
    where = {"data.train": config.data.train, "data.eval": config.data.eval, "model": (config.model,)}
    differing = {name for name in now if now[name] != before.get(name)}
    if "data.eval" in differing and not config.data.eval:  # a part of the training data was split off
        differing = differing - {"data.eval"} | {"data.train"}
    changed = [f"{name} ({', '.join(map(str, where[name]))})" for name in sorted(differing)]
    if changed:
        raise CheckpointProblem(
            f"the run cannot go on: {' and '.join(changed)} is not what it was trained with; "
            "put that back, or start a new run in another output"
        )


def _differences(name: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    if name in ORDERED and isinstance(old, dict) and isinstance(new, dict):
        return [] if list(old.items()) == list(new.items()) else [(name, old, new)]
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [found for key in keys for found in _differences(f"{name}.{key}", old.get(key), new.get(key))]
    return [] if old == new else [(name, old, new)]
