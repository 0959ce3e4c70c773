"""adapter_config.json: refuse what would change the maths, and give each module its rank and scale (PEFT's rules)."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# These say how the adapter was made or named; tensors and scales do not depend on them.
_INFORMATIVE = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "revision", "task_type"),
        *("r", "rank", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_B_layout"),
        *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
        *("bias", "init_lora_weights", "inference_mode", "lora_dropout", "ensure_weight_tying", "runtime_config"),
        *("corda_config", "eva_config", "loftq_config", "megatron_config", "megatron_core", "qalora_group_size"),
    )
)
_REFUSED = {
    "use_dora": "DoRA (weight-decomposed LoRA) is not supported",
    "lora_bias": "bias vectors beside lora_B are not supported",
    "modules_to_save": "full copies of modules are not supported; export them into the base",
    "fan_in_fan_out": "transposed weights do not occur in this model family",
    "trainable_token_indices": "trained token embeddings are not supported",
    "layer_replication": "replicated layers are not supported",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not supported",
    "use_bdlora": "block-diagonal LoRA (BD-LoRA) is not supported",
    "use_qalora": "QALoRA is not supported",
}
# Every other initialisation subtracts something from the base weights, so B @ A alone is not the adapter.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
_MAX_REGEX_PATTERNS = 64
_MAX_PATTERN_LENGTH = 300
_MAX_NUMBER = 1e9
_LITERAL = re.compile(r"[\w.]+")
_REPEATED_GROUP = re.compile(r"\)\s*[*+{]")
_UNBOUNDED = re.compile(r"[*+{]")


class Pattern:
    """rank_pattern or alpha_pattern: the first key for which `(.*\\.)?(key)$` matches the module name decides."""

    def __init__(self, name: str, raw: object, problems: list[str]) -> None:
        self._literal: dict[str, tuple[int, float]] = {}
        self._regex: list[tuple[int, re.Pattern[str], float]] = []
        if raw is None:
            return
        if not isinstance(raw, dict):
            problems.append(f"adapter_config.json: {name} must be an object, found {type(raw).__name__}")
            return
        for order, (key, value) in enumerate(raw.items()):
            if not _is_positive(value):
                problems.append(
                    f"adapter_config.json: {name}[{_short(key)}] must be a positive number, found {_short(value)}"
                )
            elif _LITERAL.fullmatch(key):
                self._literal.setdefault(key, (order, float(value)))
            else:
                self._add_regex(name, order, key, float(value), problems)

    def _add_regex(self, name: str, order: int, key: str, value: float, problems: list[str]) -> None:
        # Keys come from a file: bounded length and no repeated groups, so that matching cannot run away.
        if len(key) > _MAX_PATTERN_LENGTH or _REPEATED_GROUP.search(key) or len(_UNBOUNDED.findall(key)) > 3:
            problems.append(f"adapter_config.json: {name} key {_short(key)} is too complex a regular expression")
        elif len(self._regex) >= _MAX_REGEX_PATTERNS:
            problems.append(f"adapter_config.json: {name} has more than {_MAX_REGEX_PATTERNS} regular expressions")
        else:
            try:
                self._regex.append((order, re.compile(rf"(.*\.)?({key})$"), value))
            except re.error as cause:
                problems.append(f"adapter_config.json: {name} key {_short(key)} is not a regular expression ({cause})")

    def value(self, module: str) -> float | None:
        """The value for a module name, or None when no key matches."""
        if not self._literal and not self._regex:
            return None
        parts = module.split(".")
        suffixes = (".".join(parts[first:]) for first in range(len(parts)))
        hits = [self._literal[suffix] for suffix in suffixes if suffix in self._literal]
        hits += [(order, value) for order, regex, value in self._regex if regex.match(module)]
        return min(hits)[1] if hits else None


@dataclass(frozen=True)
class AdapterRules:
    """What adapter_config.json says about ranks and scales."""

    alpha: float | None
    lora_rank: float | None
    use_rslora: bool
    rank_pattern: Pattern
    alpha_pattern: Pattern
    target_parameters: tuple[str, ...]
    raw: Mapping[str, Any]

    def name_in_patterns(self, module: str) -> str:
        """PEFT matches patterns against the parameter's name where a 2-D weight was targeted as a parameter."""
        if not self.target_parameters:
            return module
        parameter = f"{module}.weight"
        is_parameter = any(parameter == t or parameter.endswith(f".{t}") for t in self.target_parameters)
        return parameter if is_parameter else module

    def scale(self, name: str, lora_rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA; `name` as PEFT matches it, `lora_rank` from the tensors."""
        alpha = self.alpha_pattern.value(name)
        if alpha is None:
            alpha = self.alpha if self.alpha is not None else float(lora_rank)
        return alpha / math.sqrt(lora_rank) if self.use_rslora else alpha / lora_rank

    def rank_problem(self, name: str, lora_rank: int) -> str | None:
        """A problem if rank_pattern states another rank for this module than its tensors have."""
        stated = self.rank_pattern.value(name)
        if stated is None or stated == lora_rank:
            return None
        return f"{name}: rank {lora_rank} in the tensors, but rank_pattern in adapter_config.json says {stated:g}"

    def rank_differs(self, name: str, lora_rank: int) -> bool:
        """Whether the tensors have another rank than the file's general `r` without a rank_pattern saying so."""
        return self.lora_rank is not None and self.rank_pattern.value(name) is None and self.lora_rank != lora_rank


def read_rules(config: Mapping[str, Any], problems: list[str]) -> AdapterRules:
    """Check every key of adapter_config.json; what cannot be honoured is added to `problems` by name."""
    _check_keys(config, problems)
    alpha = config.get("lora_alpha", config.get("alpha"))
    rank = config.get("r", config.get("rank"))
    if not _is_positive(alpha):
        problems.append(f"adapter_config.json: lora_alpha must be a positive number, found {_short(alpha)}")
        alpha = None
    if rank is not None and not _is_positive(rank):
        problems.append(f"adapter_config.json: r must be a positive integer, found {_short(rank)}")
        rank = None
    parameters = config.get("target_parameters") or []
    if isinstance(parameters, str):
        parameters = [parameters]
    if not isinstance(parameters, list) or not all(isinstance(entry, str) for entry in parameters):
        problems.append("adapter_config.json: target_parameters must be a list of names")
        parameters = []
    return AdapterRules(
        alpha=alpha,
        lora_rank=rank,
        use_rslora=config.get("use_rslora") is True,
        rank_pattern=Pattern("rank_pattern", config.get("rank_pattern"), problems),
        alpha_pattern=Pattern("alpha_pattern", config.get("alpha_pattern"), problems),
        target_parameters=tuple(parameters),
        raw=config,
    )


def _check_keys(config: Mapping[str, Any], problems: list[str]) -> None:
    where = "adapter_config.json"
    if config.get("peft_type") not in (None, "LORA"):
        problems.append(f"{where}: peft_type is {_short(config['peft_type'])}, only LORA is supported")
    if config.get("bias") not in (None, "none"):
        problems.append(f"{where}: bias is {_short(config['bias'])}, only 'none' is supported")
    if config.get("use_rslora") not in (None, True, False):
        problems.append(f"{where}: use_rslora must be true or false, found {_short(config['use_rslora'])}")
    init = config.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in _PLAIN_INITS):
        problems.append(f"{where}: init_lora_weights {_short(init)} changes the base weights and is not supported")
    for key, value in config.items():
        if value is None or value is False or value in ("", [], {}):
            continue
        if key in _REFUSED:
            problems.append(f"{where}: {key} is set: {_REFUSED[key]}")
        elif key not in _INFORMATIVE:
            name = key if key.isidentifier() else _short(key)
            problems.append(f"{where}: {name} is set to {_short(value)}, a setting this loader does not know")


def _short(value: object) -> str:
    """A value from the file as it may appear in a message: escaped, and not longer than a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _MAX_NUMBER
