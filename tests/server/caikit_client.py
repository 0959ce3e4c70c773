"""Runs in a process of its own: the published, unmodified caikit-tgis-backend stubs against a live server.

Its stubs register the same message names as ours, so both cannot live in one process. Prints what it saw as JSON.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import sys
from pathlib import Path

import grpc
from google.protobuf.json_format import MessageToDict


def main(address: str) -> None:
    package = importlib.util.find_spec("caikit_tgis_backend")  # found, not imported: that would need all of caikit
    if package is None or package.origin is None:
        raise SystemExit("caikit-tgis-backend is not installed: run `make setup`")
    sys.path.insert(0, str(Path(package.origin).parent / "protobufs"))
    import generation_pb2 as pb
    import generation_pb2_grpc as pb_grpc

    def show(message: object) -> dict[str, object]:
        return MessageToDict(message, preserving_proto_field_name=True)

    params = pb.Parameters(
        method=pb.SAMPLE,
        sampling=pb.SamplingParameters(temperature=0.7, top_k=5, top_p=0.9, seed=7),
        stopping=pb.StoppingCriteria(max_new_tokens=100, stop_sequences=["STOP"]),
        response=pb.ResponseOptions(generated_tokens=True, token_logprobs=True, token_ranks=True, top_n_tokens=2),
    )
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        texts = [pb.GenerationRequest(text="one STOP two"), pb.GenerationRequest(text="three")]
        batched = pb.BatchedGenerationRequest(model_id="m", requests=texts, params=params)
        single = pb.SingleGenerationRequest(
            model_id="m",
            adapter_id="dates",
            request=pb.GenerationRequest(text="abc"),
            params=pb.Parameters(stopping=pb.StoppingCriteria(max_new_tokens=100)),
        )
        tokenize = pb.BatchedTokenizeRequest(
            requests=[pb.TokenizeRequest(text="Hello 世界")], return_tokens=True, return_offsets=True
        )
        seen = {
            "generate": show(stub.Generate(batched)),
            "stream": [show(response) for response in stub.GenerateStream(single)],
            "tokenize": show(stub.Tokenize(tokenize)),
            "info": show(stub.ModelInfo(pb.ModelInfoRequest(model_id="m"))),
            "descriptor": base64.b64encode(pb.DESCRIPTOR.serialized_pb).decode(),
        }
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1])
