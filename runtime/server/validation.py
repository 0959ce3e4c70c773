"""The one place where a client's parameters are checked: fmaas messages in, plain checked options out."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass
from typing import Any

from runtime.adapters.expression import parse_expression
from runtime.engine.sampling_params import SamplingParams
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.server.guide_validation import validate_guide
from runtime.server.limits import Limits
from runtime.server.refusal import invalid, require


@dataclass(frozen=True)
class ResponseDetail:
    """What the client wants to see besides the text."""

    input_text: bool = False
    generated_tokens: bool = False
    input_tokens: bool = False
    logprobs: bool = False
    ranks: bool = False
    num_top_tokens: int = 0


@dataclass(frozen=True)
class GenerationOptions:
    """One request's parameters after all checks; `seed` None means that the server draws one."""

    sampling: SamplingParams
    is_greedy: bool = True
    seed: int | None = None
    stop_sequences: tuple[str, ...] = ()
    include_stop_sequence: bool = True
    time_limit_seconds: float | None = None
    truncate_input_tokens: int = 0
    detail: ResponseDetail = ResponseDetail()


def validate_parameters(params: pb.Parameters, limits: Limits) -> GenerationOptions:
    """Check everything that does not depend on the prompt; raises InvalidRequest with the field's path."""
    stopping = params.stopping
    detail = validate_detail(params.response, limits)
    wants_detail = detail.logprobs or detail.ranks or detail.num_top_tokens > 0
    sampling = SamplingParams(
        **_validate_length(stopping, limits),
        **_validate_sampling(params, limits),
        **_validate_penalties(params.decoding, limits),
        logprobs=wants_detail and detail.generated_tokens,
        score_prompt=wants_detail and detail.input_tokens,
        num_top_tokens=detail.num_top_tokens,
        guide=validate_guide(params.decoding, limits),
    )
    include = stopping.include_stop_sequence if stopping.HasField("include_stop_sequence") else True
    return GenerationOptions(
        sampling=sampling,
        is_greedy=sampling.temperature == 0.0,
        seed=params.sampling.seed if params.sampling.HasField("seed") else None,
        stop_sequences=_validate_stop_sequences(stopping, limits),
        include_stop_sequence=include,
        time_limit_seconds=stopping.time_limit_millis / 1000 if stopping.time_limit_millis else None,
        truncate_input_tokens=params.truncate_input_tokens,
        detail=detail,
    )


def fit_to_context(
    options: GenerationOptions, num_prompt_tokens: int, limits: Limits, text_field: str
) -> tuple[SamplingParams, bool]:
    """Sampling parameters that fit behind this prompt, and whether the context, not the client, set their length."""
    room = limits.max_model_len - num_prompt_tokens
    sampling = options.sampling
    if num_prompt_tokens == 0:
        raise invalid("EMPTY_PROMPT", text_field, "the prompt has no tokens")
    if room < max(1, sampling.min_new_tokens):
        raise invalid(
            "PROMPT_TOO_LONG",
            text_field,
            f"the prompt has {num_prompt_tokens} tokens; with at least {max(1, sampling.min_new_tokens)} new tokens "
            f"that is over the limit of {limits.max_model_len} (max_sequence_length)",
        )
    seed = 0 if options.is_greedy else secrets.randbits(64) if options.seed is None else options.seed
    max_new_tokens = min(sampling.max_new_tokens, room)
    fitted = dataclasses.replace(sampling, seed=seed, max_new_tokens=max_new_tokens)
    return fitted, max_new_tokens < sampling.max_new_tokens


def validate_adapter_id(adapter_id: str, prefix_id: str) -> str | None:
    """The adapter that a request names, or the weighted sum of adapters; None for the base."""
    if prefix_id:
        raise invalid("UNSUPPORTED_PARAMETER", "prefix_id", "prefix_id is not supported; use adapter_id")
    if adapter_id:
        parse_expression(adapter_id)
    return adapter_id or None


def _validate_length(stopping: pb.StoppingCriteria, limits: Limits) -> dict[str, int]:
    max_new, min_new = stopping.max_new_tokens, stopping.min_new_tokens
    require(
        max_new <= limits.max_new_tokens,
        "params.stopping.max_new_tokens",
        max_new,
        f"0 (default {limits.default_max_new_tokens})..{limits.max_new_tokens}",
    )
    max_new = max_new or limits.default_max_new_tokens
    require(min_new <= max_new, "params.stopping.min_new_tokens", min_new, f"0..max_new_tokens ({max_new})")
    return {"max_new_tokens": max_new, "min_new_tokens": min_new}


def _validate_sampling(params: pb.Parameters, limits: Limits) -> dict[str, Any]:
    """Everything is checked whatever the method; a greedy request, by method or temperature 0, uses none of it."""
    sampling = params.sampling
    require(params.method in (pb.GREEDY, pb.SAMPLE), "params.method", params.method, "GREEDY (0) or SAMPLE (1)")
    temperature = sampling.temperature if sampling.HasField("temperature") else 1.0
    require(
        temperature == 0.0 or limits.min_temperature <= temperature <= limits.max_temperature,
        "params.sampling.temperature",
        temperature,
        f"0 (greedy) or {limits.min_temperature}..{limits.max_temperature}",
    )
    require(0.0 <= sampling.top_p <= 1.0, "params.sampling.top_p", sampling.top_p, "0 (off)..1")
    require(0.0 <= sampling.typical_p <= 1.0, "params.sampling.typical_p", sampling.typical_p, "0 (off)..1")
    if params.method == pb.GREEDY or temperature == 0.0:
        return {}
    return {
        "temperature": temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p or 1.0,
        "typical_p": sampling.typical_p or 1.0,
    }


def _validate_penalties(decoding: pb.DecodingParameters, limits: Limits) -> dict[str, Any]:
    penalty = decoding.repetition_penalty
    require(
        0.0 <= penalty <= limits.max_repetition_penalty,
        "params.decoding.repetition_penalty",
        penalty,
        f"0 (off)..{limits.max_repetition_penalty}",
    )
    values: dict[str, Any] = {"repetition_penalty": penalty or 1.0}
    if decoding.HasField("length_penalty"):
        factor = decoding.length_penalty.decay_factor
        require(
            limits.min_decay_factor <= factor <= limits.max_decay_factor,
            "params.decoding.length_penalty.decay_factor",
            factor,
            f"{limits.min_decay_factor}..{limits.max_decay_factor}",
        )
        values |= {"length_penalty_start": decoding.length_penalty.start_index, "length_penalty_factor": factor}
    return values


def _validate_stop_sequences(stopping: pb.StoppingCriteria, limits: Limits) -> tuple[str, ...]:
    stops = tuple(stopping.stop_sequences)
    require(
        len(stops) <= limits.max_stop_sequences,
        "params.stopping.stop_sequences",
        len(stops),
        f"at most {limits.max_stop_sequences} sequences",
    )
    for index, stop in enumerate(stops):
        num_bytes = len(stop.encode())
        require(
            1 <= num_bytes <= limits.max_stop_sequence_bytes,
            f"params.stopping.stop_sequences[{index}]",
            num_bytes,
            f"1..{limits.max_stop_sequence_bytes} bytes",
        )
    return stops


def validate_detail(response: pb.ResponseOptions, limits: Limits) -> ResponseDetail:
    """What to show; details of tokens need tokens that they belong to."""
    require(
        response.top_n_tokens <= limits.max_top_n_tokens,
        "params.response.top_n_tokens",
        response.top_n_tokens,
        f"0..{limits.max_top_n_tokens}",
    )
    wants_detail = response.token_logprobs or response.token_ranks or response.top_n_tokens > 0
    if wants_detail and not (response.generated_tokens or response.input_tokens):
        message = "token details need generated_tokens or input_tokens to be asked for"
        raise invalid("INVALID_PARAMETER", "params.response.generated_tokens", message)
    return ResponseDetail(
        input_text=response.input_text,
        generated_tokens=response.generated_tokens,
        input_tokens=response.input_tokens,
        logprobs=response.token_logprobs,
        ranks=response.token_ranks,
        num_top_tokens=response.top_n_tokens,
    )
