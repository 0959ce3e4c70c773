"""Which requests are sent and when: request i depends on the seed and i alone, however the server behaves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from runtime.bench.plan import BenchPlan
from runtime.bench.prompts import PromptRow, random_prompt, read_prompts
from runtime.pb.fmaas import generation_pb2 as pb

MEASURED = "measured"
WARMUP = "warmup"


@dataclass(frozen=True)
class RequestSpec:
    """One request, ready to send."""

    adapter: str
    message: pb.SingleGenerationRequest


class Workload:
    """Makes the requests of a plan within the limits of a server."""

    def __init__(self, plan: BenchPlan, info: pb.ModelInfoResponse) -> None:
        """Raises ValueError if the lengths of the plan cannot fit, or if the file of prompts is wrong."""
        self._plan = plan
        self._max_output = min(info.max_new_tokens, info.max_sequence_length - 1)
        self._max_sequence = info.max_sequence_length
        self._rows = [] if plan.prompts_path is None else read_prompts(plan.prompts_path)
        self._check_lengths()

    def requests(self, purpose: str = MEASURED) -> Iterator[RequestSpec]:
        """Without end. Prompts of a file come in its order, those of the warm-up from its end backwards."""
        return (self._request(purpose, index) for index in itertools.count())

    def arrivals(self) -> Iterator[float]:
        """Seconds from the start at which requests arrive: a Poisson process of the plan's rate, without end."""
        rng = Random(f"{self._plan.seed}/arrivals")
        return itertools.accumulate(rng.expovariate(self._plan.rate) for _ in itertools.count())

    def _request(self, purpose: str, index: int) -> RequestSpec:
        plan, rng = self._plan, Random(f"{self._plan.seed}/{purpose}/{index}")
        adapter = self._adapter(purpose, index, rng)
        num_output = min(plan.output_tokens.sample(rng), self._max_output)
        params = pb.Parameters(
            stopping=pb.StoppingCriteria(
                max_new_tokens=num_output, min_new_tokens=0 if plan.stop_at_eos else num_output
            ),
        )
        if plan.temperature > 0:
            params.method = pb.SAMPLE
            params.sampling.temperature = plan.temperature
            params.sampling.seed = rng.getrandbits(63)
        if row := self._row(purpose, index):
            text = row.text
            adapter = adapter if row.adapter is None else row.adapter
        else:
            params.truncate_input_tokens = min(plan.prompt_tokens.sample(rng), self._max_sequence - num_output)
            text = random_prompt(rng, params.truncate_input_tokens)
        request = pb.GenerationRequest(text=text)
        message = pb.SingleGenerationRequest(adapter_id=adapter or None, request=request, params=params)
        return RequestSpec(adapter, message)

    def _adapter(self, purpose: str, index: int, rng: Random) -> str:
        """By weight; the warm-up takes them in turn, so that it leaves none out."""
        names, weights = zip(*self._plan.adapters, strict=True)
        chosen: str = rng.choices(names, weights)[0]
        return chosen if purpose == MEASURED else str(names[index % len(names)])

    def _row(self, purpose: str, index: int) -> PromptRow | None:
        if not self._rows:
            return None
        place = index if purpose == MEASURED else -1 - index
        return self._rows[place % len(self._rows)]

    def _check_lengths(self) -> None:
        """What has an upper end must fit; the tail of a distribution without one is cut to the limits."""
        output, prompt = self._plan.output_tokens.largest or 1, self._plan.prompt_tokens.largest or 1
        if output > self._max_output:
            raise ValueError(f"--output-tokens up to {output}: this server generates at most {self._max_output}")
        if not self._rows and prompt + output > self._max_sequence:
            message = f"--prompt-tokens up to {prompt} and --output-tokens up to {output}: "
            raise ValueError(f"{message}a sequence of this server has at most {self._max_sequence} tokens")
