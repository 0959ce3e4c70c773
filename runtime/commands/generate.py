"""`graft generate`: one prompt, streamed to stdout, from a server or from a model in this process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from runtime.commands.client import connect
from runtime.config import EngineConfig
from runtime.engine.messages import (
    AdapterReply,
    AddRequest,
    CallFailed,
    CallId,
    Event,
    LoadAdapter,
    RequestFailed,
    RequestId,
    SequenceOutput,
    StepOutputs,
)
from runtime.engine.process import IDLE_SECONDS, EngineLike
from runtime.errors import NotFound, error_of_kind
from runtime.pb.fmaas import generation_pb2 as pb

MAX_NEW_TOKENS = 256
LOCAL_ADAPTER = "local"


def run(options: argparse.Namespace) -> int:
    """Print the text as it comes, and a newline at its end."""
    if options.local is not None:
        pieces = generate_local(options.local, options.adapter, options.prompt)
    else:
        pieces = generate_remote(options.server, options.adapter, options.prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def generate_remote(address: str, adapter: str | None, prompt: str) -> Iterator[str]:
    """Pieces of text from a server."""
    from runtime.pb.fmaas.generation_pb2_grpc import GenerationServiceStub

    with connect(address) as channel:
        request = pb.SingleGenerationRequest(
            adapter_id=adapter, request=pb.GenerationRequest(text=prompt), params=_parameters(MAX_NEW_TOKENS)
        )
        for response in GenerationServiceStub(channel).GenerateStream(request):
            yield response.text


def generate_local(model: Path, adapter: str | None, prompt: str) -> Iterator[str]:
    """Pieces of text from an engine in this process: the same checks, the same text, no server."""
    config = EngineConfig(model_path=model)
    config.validate()
    from loaders.progress import progress_bar
    from loaders.tokenizer import IncrementalDetokenizer, Tokenizer
    from runtime.engine.engine import Engine
    from runtime.server.limits import Limits
    from runtime.server.text import TextStream
    from runtime.server.validation import fit_to_context, validate_parameters

    tokenizer = Tokenizer.from_dir(model)
    with progress_bar("loading the base") as progress:
        engine = Engine(config, progress)
    try:
        if adapter is not None:
            _load_local_adapter(engine, Path(adapter))
        limits = Limits(engine.ready.max_model_len)
        prompt_ids = tokenizer.encode(prompt)
        options = validate_parameters(_parameters(MAX_NEW_TOKENS), limits)
        params, _ = fit_to_context(options, len(prompt_ids), limits, "PROMPT")
        engine.submit(AddRequest(RequestId(1), prompt_ids, params, LOCAL_ADAPTER if adapter else None))
        text = TextStream(IncrementalDetokenizer(tokenizer), ())
        for output in _outputs(engine):
            if output.token_id >= 0 and output.token_id not in tokenizer.eos_token_ids:
                yield text.push(output.token_id).text
        yield text.finish().text
    finally:
        engine.close()


def _parameters(max_new_tokens: int) -> pb.Parameters:
    return pb.Parameters(stopping=pb.StoppingCriteria(max_new_tokens=max_new_tokens))


def _load_local_adapter(engine: EngineLike, folder: Path) -> None:
    if not folder.is_dir():
        raise NotFound(f"there is no adapter folder {folder}", reason="ADAPTER_PATH_NOT_FOUND")
    engine.submit(LoadAdapter(CallId(1), LOCAL_ADAPTER, str(folder.resolve())))
    for event in _events(engine):
        if isinstance(event, CallFailed):
            raise error_of_kind(event.kind, event.message, reason=event.reason, field="", problems=event.problems)
        if isinstance(event, AdapterReply):
            return


def _outputs(engine: EngineLike) -> Iterator[SequenceOutput]:
    for event in _events(engine):
        if isinstance(event, RequestFailed):
            raise error_of_kind(event.kind, event.message, reason=event.reason, field=event.field)
        for output in event.outputs if isinstance(event, StepOutputs) else ():
            yield output
            if output.finish_reason is not None:
                return


def _events(engine: EngineLike) -> Iterator[Event]:
    while True:
        engine.wait_for_work(IDLE_SECONDS)
        yield from engine.step()
