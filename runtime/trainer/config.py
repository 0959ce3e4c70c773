"""Settings of a training run: frozen, checked in one place. `config_file` reads them from YAML (docs/training.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runtime.config import DEVICES

DATA_FORMATS = ("auto", "chat", "prompt-completion", "text", "alpaca", "sharegpt")
TEMPLATES = ("deepseek", "plain")
OVERLONG = ("truncate", "drop", "error")
INITS = ("kaiming", "gaussian", "xavier")
SCHEDULES = ("cosine", "linear", "constant")
SELECTIONS = ("gate_score", "token_share")
OVERFLOWS = ("drop", "reroute")
EXPORT_FORMATS = ("per-expert", "peft-v5")
COMPUTE_DTYPES = ("bfloat16", "float32")
EXPORT_DTYPES = ("bfloat16", "float32", "float16")
CHECKPOINTS, ADAPTER, BEST_ADAPTER, CURVE = "checkpoints", "adapter", "adapter-best", "loss.png"  # in the output


@dataclass(frozen=True)
class DataConfig:
    """What to learn from. `max_length` is the width in tokens of one row of a batch, packed or not."""

    train: tuple[Path, ...]
    eval: tuple[Path, ...] = ()
    eval_fraction: float = 0.0
    format: str = "auto"
    template: str = "deepseek"
    max_length: int = 4096
    overlong: str = "truncate"
    pack: bool = True
    shuffle: bool = True


@dataclass(frozen=True)
class ModuleLora:
    """Rank and alpha of the modules of one pattern; alpha unset means alpha = rank, rank 0 leaves them alone."""

    rank: int
    alpha: float | None = None


@dataclass(frozen=True)
class LoraSettings:
    """Which modules are adapted and how. `patterns`: module names to their own rank and alpha.

    `dropout_seed` unset: the run's seed.
    """

    targets: tuple[str, ...] = ("experts",)
    rank: int = 16
    alpha: float | None = None
    patterns: Mapping[str, ModuleLora] = field(default_factory=dict)
    rslora: bool = False
    dropout: float = 0.0
    dropout_seed: int | None = None
    init: str = "kaiming"


@dataclass(frozen=True)
class SelectionConfig:
    """Train only the experts that a task uses: per layer the fewest whose share of the sample reaches `threshold`."""

    by: str = "gate_score"
    threshold: float = 0.2
    sample_rows: int = 256


@dataclass(frozen=True)
class RoutingConfig:
    """Load balance while training; the router itself stays frozen. No capacity: every token reaches its experts."""

    aux_loss: float = 0.0
    capacity_factor: float | None = None
    overflow: str = "drop"


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh; the number of processes is pp x dp x tp. `ep` unset means tp; `layers` unset: equal shares."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int | None = None
    layers: tuple[int, ...] | None = None

    @property
    def num_processes(self) -> int:
        """Processes of the whole mesh."""
        return self.tp * self.pp * self.dp

    @property
    def expert_size(self) -> int:
        """Processes that share one set of routed experts."""
        return self.tp if self.ep is None else self.ep


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and decay; the rate of B factors is `lora_plus_ratio` times that of A (LoRA+)."""

    lr: float = 2e-4
    min_lr_ratio: float = 0.1
    schedule: str = "cosine"
    warmup_steps: int = 0
    lora_plus_ratio: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0

    def check_warmup(self, num_steps: int) -> None:
        """Raise ValueError if a run of that many steps would end before its rate is reached."""
        fits = self.warmup_steps <= num_steps
        _require(fits, "optimizer.warmup_steps", self.warmup_steps, f"at most the run's steps ({num_steps})")


@dataclass(frozen=True)
class TrainConfig:
    """One run. `batch_rows` rows make an optimizer step, in micro-batches of `micro_batch_rows` for each dp replica."""

    model: Path
    output: Path
    data: DataConfig
    lora: LoraSettings = LoraSettings()
    selection: SelectionConfig | None = None
    routing: RoutingConfig = RoutingConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int | None = None
    epochs: float | None = None
    batch_rows: int = 8
    micro_batch_rows: int = 1
    seed: int = 0
    device: str = "cpu"
    dtype: str = "bfloat16"
    activation_checkpointing: bool = False
    pack_experts: bool = True
    log_every: int = 1
    eval_every: int = 0
    save_every: int = 0
    keep_checkpoints: int = 2
    check_replicas_every: int = 100
    export_format: str = "per-expert"
    export_dtype: str | None = None
    base_name: str | None = None
    measure_mfu: bool = True

    @property
    def called_base(self) -> str:
        """What files call the base: as told, or as its folder is called."""
        return self.base_name or self.model.resolve().name

    @property
    def stored_dtype(self) -> str:
        """What the adapter's files hold: as told, or what the run computes in, so that the file means the same."""
        return self.export_dtype or self.dtype

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that each data-parallel replica runs in one optimizer step."""
        return self.batch_rows // (self.micro_batch_rows * self.parallel.dp)

    def validate(self) -> None:
        """Raise ValueError naming the field, its value and what is allowed."""
        _check_run(self)
        _check_data(self.data)
        _check_lora(self.lora)
        _check_optimizer(self.optimizer)
        _check_parallel(self)
        if self.selection is not None:
            _require(self.selection.by in SELECTIONS, "selection.by", self.selection.by, _one_of(SELECTIONS))
            _require(0 < self.selection.threshold <= 1, "selection.threshold", self.selection.threshold, "0..1")
            _require(self.selection.sample_rows >= 1, "selection.sample_rows", self.selection.sample_rows, ">= 1")
        routing = self.routing
        _require(0 <= routing.aux_loss < math.inf, "routing.aux_loss", routing.aux_loss, ">= 0")
        _require(routing.overflow in OVERFLOWS, "routing.overflow", routing.overflow, _one_of(OVERFLOWS))
        capacity = routing.capacity_factor
        overflows = capacity is not None or routing.overflow == OVERFLOWS[0]
        _require(overflows, "routing.overflow", routing.overflow, "only with a capacity_factor")
        _require(capacity is None or 0 < capacity < math.inf, "routing.capacity_factor", capacity, "above 0, or unset")


def _check_run(config: TrainConfig) -> None:
    _require(config.device in DEVICES, "device", config.device, _one_of(DEVICES))
    _require(config.dtype in COMPUTE_DTYPES, "dtype", config.dtype, _one_of(COMPUTE_DTYPES))
    _require(config.model.is_dir(), "model", str(config.model), "an existing folder with a DeepSeek base model")
    one = (config.steps is None) != (config.epochs is None)
    _require(one, "steps, epochs", (config.steps, config.epochs), "exactly one of the two")
    _require(config.steps is None or config.steps >= 1, "steps", config.steps, ">= 1")
    if config.steps is not None:
        config.optimizer.check_warmup(config.steps)
    _require(config.epochs is None or 0 < config.epochs < math.inf, "epochs", config.epochs, "above 0")
    for name in ("batch_rows", "micro_batch_rows", "log_every", "keep_checkpoints"):
        _require(getattr(config, name) >= 1, name, getattr(config, name), ">= 1")
    for name in ("eval_every", "save_every", "check_replicas_every"):
        _require(getattr(config, name) >= 0, name, getattr(config, name), ">= 0 (0: never)")
    is_scored = bool(config.data.eval) or config.data.eval_fraction > 0
    _require(not config.eval_every or is_scored, "eval_every", config.eval_every, "0 without evaluation data")
    _require(0 <= config.seed < 2**63, "seed", config.seed, "0 or more, below 2^63")
    _require(config.export_format in EXPORT_FORMATS, "export_format", config.export_format, _one_of(EXPORT_FORMATS))
    stored = config.stored_dtype
    _require(stored in EXPORT_DTYPES, "export_dtype", stored, f"{_one_of(EXPORT_DTYPES)}, or unset for that of dtype")


def _check_data(data: DataConfig) -> None:
    _require(bool(data.train), "data.train", "[]", "at least one JSONL file")
    for name in ("train", "eval"):
        for path in getattr(data, name):
            _require(path.is_file(), f"data.{name}", str(path), "an existing JSONL file")
    _require(0 <= data.eval_fraction < 1, "data.eval_fraction", data.eval_fraction, "0 or more, below 1")
    _require(not (data.eval and data.eval_fraction), "data.eval_fraction", data.eval_fraction, "0 beside data.eval")
    _require(data.format in DATA_FORMATS, "data.format", data.format, _one_of(DATA_FORMATS))
    _require(data.template in TEMPLATES, "data.template", data.template, _one_of(TEMPLATES))
    _require(data.overlong in OVERLONG, "data.overlong", data.overlong, _one_of(OVERLONG))
    _require(data.max_length >= 2, "data.max_length", data.max_length, ">= 2")


def _check_lora(lora: LoraSettings) -> None:
    _require(bool(lora.targets), "lora.targets", "[]", "at least one module name")
    ranks = {"lora": ModuleLora(lora.rank, lora.alpha)}
    ranks |= {f"lora.patterns[{name!r}]": value for name, value in lora.patterns.items()}
    for name, value in ranks.items():
        _require(0 <= value.rank <= 512, f"{name}.rank", value.rank, "0..512 (0 leaves the module alone)")
        fine = value.alpha is None or 0 < value.alpha < math.inf
        _require(fine, f"{name}.alpha", value.alpha, "above 0, or unset for alpha = rank")
    _require(0 <= lora.dropout < 1, "lora.dropout", lora.dropout, "0 or more, below 1")
    _require(lora.init in INITS, "lora.init", lora.init, _one_of(INITS))


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    for name in ("lr", "lora_plus_ratio", "eps"):
        value = getattr(optimizer, name)
        _require(0 < value < math.inf, f"optimizer.{name}", value, "above 0")
    _require(0 <= optimizer.min_lr_ratio <= 1, "optimizer.min_lr_ratio", optimizer.min_lr_ratio, "0..1")
    _require(optimizer.schedule in SCHEDULES, "optimizer.schedule", optimizer.schedule, _one_of(SCHEDULES))
    _require(optimizer.warmup_steps >= 0, "optimizer.warmup_steps", optimizer.warmup_steps, ">= 0")
    _require(0 <= optimizer.weight_decay < math.inf, "optimizer.weight_decay", optimizer.weight_decay, ">= 0")
    for name in ("beta1", "beta2"):
        _require(0 <= getattr(optimizer, name) < 1, f"optimizer.{name}", getattr(optimizer, name), "0 or more, below 1")
    clip = optimizer.clip_norm
    _require(clip is None or 0 < clip < math.inf, "optimizer.clip_norm", clip, "above 0, or unset")


def _check_parallel(config: TrainConfig) -> None:
    parallel = config.parallel
    for name in ("tp", "pp", "dp"):
        _require(getattr(parallel, name) >= 1, f"parallel.{name}", getattr(parallel, name), ">= 1")
    ep, in_stage = parallel.expert_size, parallel.dp * parallel.tp
    fits = ep >= 1 and ep % parallel.tp == 0 and in_stage % ep == 0
    _require(fits, "parallel.ep", ep, f"a multiple of tp ({parallel.tp}) that divides dp x tp ({in_stage})")
    layers = parallel.layers
    fits = layers is None or (len(layers) == parallel.pp and min(layers) >= 1)
    _require(fits, "parallel.layers", layers, f"{parallel.pp} numbers of layers (one for each of pp), each >= 1")
    rows = config.micro_batch_rows * parallel.dp
    allowed = f"a multiple of micro_batch_rows x dp ({rows})"
    _require(config.batch_rows % rows == 0, "batch_rows", config.batch_rows, allowed)
    enough = parallel.pp == 1 or config.num_micro_batches >= parallel.pp
    allowed = f"at least micro_batch_rows x dp x pp ({rows * parallel.pp}), so that every pipeline stage has work"
    _require(enough, "batch_rows", config.batch_rows, allowed)


def _one_of(names: tuple[str, ...]) -> str:
    return f"one of {', '.join(names)}"


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} = {value!r} is not allowed: {allowed}")
