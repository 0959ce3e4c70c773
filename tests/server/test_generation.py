"""fmaas.GenerationService on a live server: texts, stop reasons, details, and each refusal."""

from __future__ import annotations

import concurrent.futures
import time

import grpc
import pytest

from runtime.pb.fmaas import generation_pb2 as pb
from tests.server.live import LiveServer, refused

TEXT = "Hello 世界 🙂 and more"


def test_stream_and_batch_give_the_same_text(server: LiveServer) -> None:
    stopping = {"max_new_tokens": 100}
    assert server.generate(TEXT, stopping=stopping).text == TEXT
    first, *deltas = server.stream(TEXT, stopping=stopping)
    assert first.input_token_count > 1 and first.text == "" and first.generated_token_count == 0
    assert "".join(delta.text for delta in deltas) == TEXT
    assert "\ufffd" not in "".join(delta.text for delta in deltas)
    counts = [delta.generated_token_count for delta in deltas]
    assert counts == sorted(counts) and counts[-1] == first.input_token_count
    assert [delta.stop_reason for delta in deltas] == [pb.NOT_FINISHED] * (len(deltas) - 1) + [pb.EOS_TOKEN]


def test_a_batch_answers_in_the_order_of_its_requests(server: LiveServer) -> None:
    texts = [f"number {n}" for n in range(20)]
    request = pb.BatchedGenerationRequest(
        requests=[pb.GenerationRequest(text=text) for text in texts],
        params=pb.Parameters(stopping=pb.StoppingCriteria(max_new_tokens=50)),
    )
    assert [response.text for response in server.generation.Generate(request).responses] == texts


def test_an_empty_batch_is_an_empty_answer(server: LiveServer) -> None:
    assert server.generation.Generate(pb.BatchedGenerationRequest()) == pb.BatchedGenerationResponse()


def test_requests_with_and_without_an_adapter_run_side_by_side(server: LiveServer) -> None:
    names = [None, "dates"] * 16
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        texts = pool.map(lambda name: server.generate("abc", name, stopping={"max_new_tokens": 50}).text, names)
    assert list(texts) == ["abc", "abcabc"] * 16


@pytest.mark.parametrize(
    ("stopping", "text", "reason"),
    [
        ({}, "one two three four", pb.EOS_TOKEN),
        ({"max_new_tokens": 1}, "one", pb.MAX_TOKENS),
        ({"max_new_tokens": 99, "stop_sequences": ["two", "zzz"]}, "one two", pb.STOP_SEQUENCE),
        (
            {"max_new_tokens": 99, "stop_sequences": ["wo thr"], "include_stop_sequence": False},
            "one t",
            pb.STOP_SEQUENCE,
        ),
        (
            {"max_new_tokens": 99, "stop_sequences": ["one"], "min_new_tokens": 5},
            "one two three fourone",
            pb.STOP_SEQUENCE,
        ),
    ],
)
def test_a_request_ends_for_the_stated_reason(server: LiveServer, stopping: dict, text: str, reason: int) -> None:
    response = server.generate("one two three four", stopping=stopping)
    assert (response.text, response.stop_reason) == (text, reason)


def test_the_context_ends_a_request_with_token_limit_and_the_client_with_max_tokens(server: LiveServer) -> None:
    long = "word " * 400
    full = server.generate(long, truncate_input_tokens=250, stopping={"max_new_tokens": 100, "min_new_tokens": 6})
    assert (full.input_token_count, full.generated_token_count, full.stop_reason) == (250, 6, pb.TOKEN_LIMIT)
    exact = server.generate(long, truncate_input_tokens=250, stopping={"max_new_tokens": 6, "min_new_tokens": 6})
    assert (exact.generated_token_count, exact.stop_reason) == (6, pb.MAX_TOKENS)


def test_truncation_keeps_the_last_tokens_behind_the_beginning_mark(server: LiveServer) -> None:
    params = {"stopping": {"max_new_tokens": 50}, "response": {"input_tokens": True}}
    whole = server.generate("one two three", **params)
    cut = server.generate("one two three", truncate_input_tokens=3, **params)
    texts = [token.text for token in whole.input_tokens]
    assert [token.text for token in cut.input_tokens] == [texts[0], *texts[-2:]]


def test_details_come_when_they_are_asked_for_and_only_then(server: LiveServer) -> None:
    plain = server.generate("abc")
    assert not plain.tokens and not plain.input_tokens
    rich = server.generate(
        "abc",
        response={
            "input_text": True,
            "generated_tokens": True,
            "token_logprobs": True,
            "token_ranks": True,
            "top_n_tokens": 3,
        },
    )
    assert rich.text == "abcabc"
    assert len(rich.tokens) == rich.generated_token_count
    assert rich.tokens[0].logprob == -0.5 and rich.tokens[0].rank == 1
    assert [top.logprob for top in rich.tokens[0].top_tokens] == [-0.5, -1.5, -2.5]
    ranks_only = server.generate("abc", response={"generated_tokens": True, "token_ranks": True})
    assert ranks_only.tokens[0].logprob == 0.0 and ranks_only.tokens[0].rank == 1


def test_a_sampled_request_tells_its_seed_and_a_greedy_one_has_none(server: LiveServer) -> None:
    assert server.generate("abc", method="SAMPLE", sampling={"seed": 42}).seed == 42
    drawn = {server.generate("abc", method="SAMPLE").seed for _ in range(3)}
    assert len(drawn) == 3
    assert server.generate("abc", sampling={"seed": 42}).seed == 0
    assert server.generate("abc", method="SAMPLE", sampling={"seed": 42, "temperature": 0.0}).seed == 0


def test_tokenize_truncates_and_keeps_offsets_with_their_tokens(server: LiveServer) -> None:
    request = pb.BatchedTokenizeRequest(
        requests=[pb.TokenizeRequest(text="one two three")], return_tokens=True, return_offsets=True
    )
    (whole,) = server.generation.Tokenize(request).responses
    request.truncate_input_tokens = 2
    (cut,) = server.generation.Tokenize(request).responses
    assert cut.token_count == 2
    # As in Generate, the begin token stays and counts.
    assert list(cut.tokens) == [whole.tokens[0], whole.tokens[-1]]
    assert list(cut.offsets) == [whole.offsets[0], whole.offsets[-1]]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("sampling.top_p", {"top_p": 1.5}),
        ("stopping.stop_sequences[0]", {"stop_sequences": [""]}),
        ("decoding.json_schema", {"json_schema": "{"}),
    ],
)
def test_both_calls_refuse_a_bad_parameter_alike(server: LiveServer, field: str, values: dict) -> None:
    params = {"method": "SAMPLE", field.split(".")[0]: values}
    expected = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER", f"params.{field}")
    assert refused(lambda: server.generate("abc", **params)) == expected
    assert refused(lambda: list(server.stream("abc", **params))) == expected
    assert server.generate("abc").text == "abc"


def test_an_unknown_method_is_refused(server: LiveServer) -> None:
    code, _, field = refused(lambda: server.generate("abc", method=9))
    assert (code, field) == (grpc.StatusCode.INVALID_ARGUMENT, "params.method")


@pytest.mark.parametrize("values", [{"format": "TEXT"}, {"repetition_penalty": 1.0}])
def test_an_option_that_changes_nothing_is_taken(server: LiveServer, values: dict) -> None:
    assert server.generate("abc", decoding=values, sampling={"typical_p": 1.0}).text == "abc"


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ("nobody", "ADAPTER_NOT_FOUND"),
        ("../dates", "ADAPTER_ID_INVALID"),
        ("x" * 64, "ADAPTER_ID_INVALID"),
        (".hidden", "ADAPTER_ID_INVALID"),
        ("a/b", "ADAPTER_ID_INVALID"),
    ],
)
def test_an_unknown_adapter_is_an_invalid_argument_as_tgis_clients_expect(
    server: LiveServer, adapter: str, reason: str
) -> None:
    expected = (grpc.StatusCode.INVALID_ARGUMENT, reason, "adapter_id")
    assert refused(lambda: server.generate("abc", adapter)) == expected
    assert refused(lambda: list(server.stream("abc", adapter))) == expected
    tokenize = pb.BatchedTokenizeRequest(adapter_id=adapter, requests=[pb.TokenizeRequest(text="a")])
    assert refused(lambda: server.generation.Tokenize(tokenize)) == expected
    assert server.generate("abc", "dates").text == "abcabc"


def test_a_prefix_id_is_refused_and_an_empty_one_is_not(server: LiveServer) -> None:
    request = pb.SingleGenerationRequest(prefix_id="p", request=pb.GenerationRequest(text="abc"))
    code, reason, field = refused(lambda: list(server.generation.GenerateStream(request)))
    assert (code, reason, field) == (grpc.StatusCode.INVALID_ARGUMENT, "UNSUPPORTED_PARAMETER", "prefix_id")
    request.prefix_id = request.adapter_id = ""
    assert "".join(response.text for response in server.generation.GenerateStream(request)) == "abc"


def test_an_over_long_prompt_is_refused_with_the_limit_and_its_place_in_the_batch(server: LiveServer) -> None:
    request = pb.BatchedGenerationRequest(
        requests=[pb.GenerationRequest(text="short"), pb.GenerationRequest(text="long " * 5000)]
    )
    with pytest.raises(grpc.RpcError) as caught:
        server.generation.Generate(request)
    assert "limit of 256" in caught.value.details()
    expected = (grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG", "requests[1].text")
    assert refused(lambda: server.generation.Generate(request)) == expected
    assert server.generate("abc").text == "abc"


def test_a_message_over_the_size_limit_is_refused_by_the_transport(server: LiveServer) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        server.generate("x" * (17 * 2**20))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert server.generate("abc").text == "abc"


def test_a_batch_over_the_limit_is_refused(server: LiveServer) -> None:
    request = pb.BatchedGenerationRequest(requests=[pb.GenerationRequest(text="a")] * 257)
    assert refused(lambda: server.generation.Generate(request))[1:] == ("BATCH_TOO_LARGE", "requests")


def test_a_full_queue_is_resource_exhausted_and_frees_the_rest_of_the_batch(server: LiveServer) -> None:
    request = pb.BatchedGenerationRequest(
        requests=[pb.GenerationRequest(text="a b c d")] * 200,
        params=pb.Parameters(stopping=pb.StoppingCriteria(max_new_tokens=200, min_new_tokens=200)),
    )
    code, reason, _ = refused(lambda: server.generation.Generate(request))
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert server.generate("abc").text == "abc"
    time.sleep(0.3)  # the engine tells its gauges when they change, at the latest after its idle time
    assert server.metric("graft_requests_running") == 0
