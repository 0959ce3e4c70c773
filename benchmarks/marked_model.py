"""A small base that writes in the open which adapter ran: each token of its output tells one part of that adapter.

The base counts: after a token of state s comes one of state s + 1, always. A token is (state, digit); a state is of one
of the parts of `PARTS` and of one of two channels. An adapter has a channel and a digit for each part (its mark),
and writes that digit where only the part's own factors can have written it; without an adapter the digit is 0.
So 10 tokens tell all that took part, and every token has a wide margin: what comes is known exactly.

Digits are a code over the field of 17: two marks differ in three parts of five at least, so pages of two adapters
mixed in any way never look like a third one's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

PARTS = ("dense", "latent", "experts 1", "experts 2", "head")
NUM_CHANNELS = 2
NUM_STATES = len(PARTS) * NUM_CHANNELS
FIELD = 17
NUM_DIGITS = FIELD + 1  # 0 says that no adapter wrote
MAX_MARKS = FIELD**3

HIDDEN = 192
NUM_UNITS = 40  # of an expert, of the dense MLP, of the latent: one for each channel and digit
NUM_EXPERTS = 4
FIRST_TOKEN = 2
VOCAB_SIZE = FIRST_TOKEN + NUM_STATES * NUM_DIGITS
FIRST_CHARACTER = 0x4E00
STATE_SIZE, NO_DIGIT_SIZE = 20.0, 0.001

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "torch_dtype": "float32",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": NUM_UNITS,
    "moe_intermediate_size": NUM_UNITS,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "q_lora_rank": None,
    "kv_lora_rank": NUM_UNITS,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": NUM_UNITS,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def state_of(part: int, channel: int) -> int:
    """The state whose tokens tell of this part and channel."""
    return part * NUM_CHANNELS + channel


def token_of(state: int, digit: int) -> int:
    """The id of a token."""
    return FIRST_TOKEN + state * NUM_DIGITS + digit


def place_of(state: int, digit: int) -> int:
    """Where a digit lies in the residual stream."""
    return NUM_STATES + state * NUM_DIGITS + digit


def text_of(tokens: list[int]) -> str:
    """Each token is one character."""
    return "".join(chr(FIRST_CHARACTER + token) for token in tokens)


def tokens_of(text: str) -> list[int]:
    """What `text_of` was given."""
    return [ord(character) - FIRST_CHARACTER for character in text]


def digits_of(mark: int) -> list[int]:
    """The digit of each part, 1..17: a polynomial whose coefficients are the digits of the mark, at five places."""
    if not 0 <= mark < MAX_MARKS:
        raise ValueError(f"mark = {mark} is out of range: 0..{MAX_MARKS - 1}")
    low, middle, high = mark % FIELD, mark // FIELD % FIELD, mark // FIELD**2
    return [1 + (low + middle * part + high * part**2) % FIELD for part in range(len(PARTS))]


def expected_tokens(last_token: int, marks: Mapping[int, int], count: int) -> list[int]:
    """What follows a prompt that ends in `last_token`, where `marks` holds the mark of each channel that is in use."""
    digits = {channel: digits_of(mark) for channel, mark in marks.items()}
    first = 0 if last_token < FIRST_TOKEN else (last_token - FIRST_TOKEN) // NUM_DIGITS + 1
    tokens = []
    for state in ((first + index) % NUM_STATES for index in range(count)):
        part, channel = divmod(state, NUM_CHANNELS)
        tokens.append(token_of(state, digits[channel][part] if channel in digits else 0))
    return tokens


def write_base(path: Path) -> Path:
    """Weights, configuration and tokenizer."""
    path.mkdir(parents=True)
    save_file(_tensors(), path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG, indent=1), encoding="utf-8")
    vocabulary = {"<bos>": 0, "<eos>": 1} | {text_of([token]): token for token in range(FIRST_TOKEN, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


def _tensors() -> dict[str, Tensor]:
    """Zeros, but for the counting (embedding and head), the way out of the latent, and the routers."""
    embedding, head = torch.zeros(VOCAB_SIZE, HIDDEN), torch.zeros(VOCAB_SIZE, HIDDEN)
    embedding[:, 0] = STATE_SIZE
    for state in range(NUM_STATES):
        embedding[:, place_of(state, 0)] = NO_DIGIT_SIZE
        for digit in range(NUM_DIGITS):
            token = token_of(state, digit)
            embedding[token, 0] = 0.0
            embedding[token, (state + 1) % NUM_STATES] = STATE_SIZE
            head[token, state] = head[token, place_of(state, digit)] = 1.0
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": torch.ones(HIDDEN)}
    for layer in range(CONFIG["num_hidden_layers"]):
        named = _attention(reads_latent=layer == 0) | _mlps(layer)
        tensors |= {f"model.layers.{layer}.{name}": tensor for name, tensor in named.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _attention(*, reads_latent: bool) -> dict[str, Tensor]:
    """Scores are equal, so it averages; head 0 takes the latent as it is, and writes its digits if asked to."""
    heads, nope, rope = CONFIG["num_attention_heads"], CONFIG["qk_nope_head_dim"], CONFIG["qk_rope_head_dim"]
    kv_b, o = torch.zeros(heads, nope + NUM_UNITS, NUM_UNITS), torch.zeros(HIDDEN, heads, NUM_UNITS)
    kv_b[0, nope:] = torch.eye(NUM_UNITS)
    if reads_latent:
        for channel in range(NUM_CHANNELS):
            for digit in range(NUM_DIGITS):
                state = state_of(PARTS.index("latent"), channel)
                o[place_of(state, digit), 0, channel * NUM_DIGITS + digit] = 0.2
    return {
        "input_layernorm.weight": torch.ones(HIDDEN),
        "post_attention_layernorm.weight": torch.ones(HIDDEN),
        "self_attn.q_proj.weight": torch.zeros(heads * (nope + rope), HIDDEN),
        "self_attn.kv_a_proj_with_mqa.weight": torch.zeros(NUM_UNITS + rope, HIDDEN),
        "self_attn.kv_a_layernorm.weight": torch.ones(NUM_UNITS),
        "self_attn.kv_b_proj.weight": kv_b.flatten(0, 1),
        "self_attn.o_proj.weight": o.flatten(1),
    }


def _mlps(layer: int) -> dict[str, Tensor]:
    names = ["mlp"]
    tensors = {}
    if layer:
        names = ["mlp.shared_experts", *(f"mlp.experts.{expert}" for expert in range(NUM_EXPERTS))]
        generator = torch.Generator().manual_seed(layer)
        tensors["mlp.gate.weight"] = torch.randn(NUM_EXPERTS, HIDDEN, generator=generator) * 0.05
        tensors["mlp.gate.e_score_correction_bias"] = torch.zeros(NUM_EXPERTS)
    for name in names:
        for projection, shape in (("gate", (NUM_UNITS, HIDDEN)), ("up", (NUM_UNITS, HIDDEN)),
                                  ("down", (HIDDEN, NUM_UNITS))):  # fmt: skip
            tensors[f"{name}.{projection}_proj.weight"] = torch.zeros(shape)
    return tensors
