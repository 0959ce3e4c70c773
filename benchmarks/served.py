"""A real server of the bench model for benchmarks: its folder with a tokenizer, its processes, its stubs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from benchmarks.make_model import FULL, TINY, base_dir, make_all
from runtime.env import child_environment
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.pb.graft.admin.v1 import adapters_pb2 as admin
from runtime.pb.graft.admin.v1 import server_pb2 as server
from runtime.pb.graft.admin.v1.adapters_pb2_grpc import AdapterServiceStub
from runtime.pb.graft.admin.v1.server_pb2_grpc import ServerServiceStub

ROOT = Path(__file__).resolve().parents[1]
STOP_SECONDS = 20.0
_READY = re.compile(r"ready: grpc (\S+), admin (\S+), http (\S+)")


@dataclass(frozen=True)
class Served:
    """A running server; `steps_file` has its engine's steps once it has ended. The stubs are grpc's."""

    process: subprocess.Popen[str]
    address: str
    adapters: Any
    admin: Any
    models: Path
    steps_file: Path

    def load(self, name: str, folder: Path, *, replace: bool = False, lazy: bool = False) -> admin.Adapter:
        """Load a folder under the models' and wait until it is ready, or only registered."""
        path = str(folder.relative_to(self.models))
        request = admin.LoadAdapterRequest(adapter_id=name, source_path=path, replace=replace, lazy=lazy)
        return self.adapters.LoadAdapter(request, timeout=120).adapter

    def get(self, name: str) -> admin.Adapter:
        """The adapter as it is now."""
        return self.adapters.GetAdapter(admin.GetAdapterRequest(name=name), timeout=30).adapter

    def unload(self, name: str) -> None:
        """Unload and wait until its memory is free."""
        self.adapters.UnloadAdapter(admin.UnloadAdapterRequest(name=name), timeout=120)

    def wait_idle(self) -> None:
        """Until no request runs any more."""
        while True:
            load = self.admin.GetLoad(server.GetLoadRequest(), timeout=30)
            if not load.request_count and not load.sequences_running:
                return
            time.sleep(0.05)

    def stop(self) -> None:
        """End it, by force if it does not listen."""
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def models_dir(out: Path, *, tiny: bool) -> Path:
    """Where the model and its adapters lie, made if they are not there; with a folder `served` for a server."""
    models = out / ("tiny" if tiny else "full")
    config = TINY if tiny else FULL
    make_all(models, config)
    served = served_dir(models)
    if not (served / "tokenizer.json").exists():
        served.mkdir(exist_ok=True)
        for file in base_dir(models).iterdir():
            if not (served / file.name).exists():
                (served / file.name).hardlink_to(file)
        _save_tokenizer(served, config["vocab_size"])
    return models


def served_dir(models: Path) -> Path:
    """The base with a tokenizer."""
    return models / "served"


@contextmanager
def serving(models: Path, *flags: str, niceness: str = "") -> Iterator[Served]:
    """A server on free ports, whose adapters root is `models`; it is ended at the end.

    `niceness` is that of its reading process, the server's own choice if it is empty.
    """
    with tempfile.TemporaryDirectory() as folder:
        steps_file = Path(folder) / "steps.jsonl"
        ports = ("--grpc-port", "0", "--admin-port", "0", "--http-port", "0", "--drain-delay", "0")
        arguments = [str(served_dir(models)), "--adapters-root", str(models), *ports, *flags]
        command = [sys.executable, "-m", "benchmarks.timed_engine", str(steps_file), *arguments]
        environment = child_environment() | ({"GRAFT_READING_NICENESS": niceness} if niceness else {})
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        match = _READY.match(process.stdout.readline() if process.stdout else "")
        if match is None:
            process.kill()
            raise RuntimeError("the server did not start")
        with grpc.insecure_channel(match[2]) as channel, process:
            stubs = AdapterServiceStub(channel), ServerServiceStub(channel)
            served = Served(process, match[1], *stubs, models, steps_file)
            try:
                yield served
            finally:
                served.stop()


def stream_request(adapter: str, prompt: str, num_tokens: int) -> pb.SingleGenerationRequest:
    """A greedy request of exactly so many tokens."""
    stopping = pb.StoppingCriteria(max_new_tokens=num_tokens, min_new_tokens=num_tokens)
    parameters = pb.Parameters(stopping=stopping)
    return pb.SingleGenerationRequest(adapter_id=adapter, request=pb.GenerationRequest(text=prompt), params=parameters)


def read_steps(file: Path) -> list[tuple[float, float, float, int]]:
    """What `timed_engine` has written."""
    return [tuple(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def _save_tokenizer(folder: Path, vocab_size: int) -> None:
    """ASCII, and words without meaning up to the size of the model's vocabulary.

    Each token is whole characters, so that no token is kept for the next message and gaps are those between tokens.
    """
    alphabet = sorted(letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter.isascii() or letter == "Ġ")
    words = ["<s>", "</s>", *alphabet]
    words += [f"Ġw{index}" for index in range(len(words), vocab_size)]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
