"""Details of input tokens over the wire; that the numbers are the model's, the engine's test_token_details shows."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.demo import ADAPTERS_DIR
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.pb.graft.admin.v1 import adapters_pb2 as admin_pb
from tests.server.live import LiveServer

ADAPTER = "date-iso"
PROMPT = "Input:\nMarch 4th, 1999\nOutput:\n"
EVERYTHING = {"input_tokens": True, "token_logprobs": True, "token_ranks": True, "top_n_tokens": 3}
STOPPING = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    root: Path = tmp_path_factory.mktemp("root")
    shutil.copytree(ADAPTERS_DIR / ADAPTER, root / ADAPTER)
    with LiveServer.demo(root, "--max-batch-tokens", "64") as live:
        live.adapters.LoadAdapter(admin_pb.LoadAdapterRequest(adapter_id=ADAPTER, source_path=ADAPTER), timeout=60)
        yield live


def _pieces(server: LiveServer, text: str) -> list[str]:
    request = pb.BatchedTokenizeRequest(requests=[pb.TokenizeRequest(text=text)], return_tokens=True)
    return list(server.generation.Tokenize(request).responses[0].tokens)


def test_every_input_token_but_the_first_has_its_score(server: LiveServer) -> None:
    response = server.generate(PROMPT, ADAPTER, response=EVERYTHING, stopping=STOPPING)
    assert [token.text for token in response.input_tokens] == _pieces(server, PROMPT)
    first, *rest = response.input_tokens
    assert (first.logprob, first.rank, len(first.top_tokens)) == (0.0, 0, 0)
    for token in rest:
        assert token.logprob < 0 and token.rank >= 1
        best = [top.logprob for top in token.top_tokens]
        assert len(best) == 3 and best == sorted(best, reverse=True)
        assert token.rank != 1 or math.isclose(token.logprob, best[0], abs_tol=1e-5)
    assert not response.tokens
    assert response.text.strip() == "1999-03-04"


def test_a_stream_tells_them_with_its_first_message_however_many_steps_the_prompt_takes(server: LiveServer) -> None:
    prompt = "Some words before. " * 40 + PROMPT
    whole = server.generate(prompt, response=EVERYTHING, stopping=STOPPING)
    first, *deltas = server.stream(prompt, response=EVERYTHING, stopping=STOPPING)
    assert first.input_token_count == len(first.input_tokens) > 3 * 64
    assert first.generated_token_count == 0
    assert list(first.input_tokens) == list(whole.input_tokens)
    assert not any(part.input_tokens for part in deltas)
    assert "".join(part.text for part in deltas) == whole.text


def test_input_and_generated_tokens_have_the_same_kinds_of_details(server: LiveServer) -> None:
    both = {**EVERYTHING, "generated_tokens": True, "token_logprobs": False, "top_n_tokens": 2, "input_text": True}
    response = server.generate(PROMPT, response=both, stopping=STOPPING)
    assert response.text.startswith(PROMPT)
    for token in [*response.input_tokens[1:], *response.tokens]:
        assert token.logprob == 0.0 and token.rank >= 1
        assert [top.logprob for top in token.top_tokens] == [0.0, 0.0]


def test_input_tokens_without_details_cost_no_scores(server: LiveServer) -> None:
    response = server.generate(PROMPT, response={"input_tokens": True}, stopping=STOPPING)
    assert [token.text for token in response.input_tokens] == _pieces(server, PROMPT)
    assert not any(token.rank or token.logprob or token.top_tokens for token in response.input_tokens)
