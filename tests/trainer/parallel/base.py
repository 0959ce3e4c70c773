"""The base of the parallel tests: a random V3 in which one expert of each layer is never chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.oracle.base_models import Oracle, build_oracle
from tests.oracle.shapes import V3

IDLE_EXPERT = 5
# Everything that could depend on the layout and must not.
OPTIONS: dict[str, Any] = {
    "lora": {
        "targets": ["all-linear", "lm_head"],
        "rank": 4,
        "rslora": True,
        "dropout": 0.2,
        "init": "xavier",
        "patterns": {"o_proj": {"rank": 3, "alpha": 9.0}, "shared_experts": {"rank": 8}},
    },
    "routing": {"aux_loss": 0.5, "capacity_factor": 1.0, "overflow": "reroute"},
    "selection": {"by": "token_share", "threshold": 0.6, "sample_rows": 7},
    "optimizer": {"lr": 1e-3, "clip_norm": 1.0, "eps": 1e-6, "lora_plus_ratio": 4.0, "schedule": "linear"},
    "activation_checkpointing": True,
}


def build_base(path: Path) -> Oracle:
    """On disk; the transformers model that comes with it does not know of the idle expert."""
    oracle = build_oracle(V3, path)
    for shard in path.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if name.endswith("e_score_correction_bias"):
                tensor[IDLE_EXPERT] = -100.0
        save_file(tensors, shard, metadata={"format": "pt"})
    return oracle


def plain_config(base: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Everything adapted, accumulation and clipping on."""
    config: dict[str, Any] = {
        "model": str(base),
        "output": str(output),
        "data": {"train": [str(base / "config.json")], "max_length": 48},
        "lora": {"targets": ["all-linear", "lm_head"], "rank": 4, "alpha": 8.0},
        "optimizer": {"lr": 2e-3, "clip_norm": 1.0, "eps": 1e-6, "weight_decay": 0.01, "warmup_steps": 2},
        "steps": 5,
        "batch_rows": 8,
        "dtype": "float32",
        "check_replicas_every": 2,
        "measure_mfu": False,
    }
    return config | changes
