"""`graft serve` with the marked base (`benchmarks/marked_model.py`), for tests of what files and processes suffer."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc

from benchmarks.marked_model import expected_tokens, text_of, token_of, tokens_of
from runtime.env import child_environment
from runtime.pb.graft.admin.v1 import adapters_pb2 as pb
from tests.server.live import LiveServer

FLAGS = ("--grpc-port", "0", "--admin-port", "0", "--http-port", "0", "--drain-delay", "0", "--dtype", "float32",
         "--max-model-len", "64")  # fmt: skip
PROMPT = [token_of(2, 0)]
NUM_TOKENS = 12
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def marked_server(
    base: Path, root: Path, *flags: str, limits: Sequence[str] = (), temporary: Path | None = None
) -> LiveServer:
    """`limits` are those of `limited`; `temporary` is where its processes would put files of their own."""
    module = ["tests.server.limited", *limits] if limits else ["runtime.cli"]
    command = [sys.executable, "-m", *module, "serve", str(base), "--adapters-root", str(root), *FLAGS, *flags]
    environment = child_environment()
    if temporary is not None:
        environment["TMPDIR"] = str(temporary)
    return LiveServer(command, environment)


def load(server: LiveServer, name: str, path: str = "", **options: object) -> pb.Adapter:
    """Load a folder under a name, by default the folder of that name."""
    request = pb.LoadAdapterRequest(adapter_id=name, source_path=path or name, **options)
    return server.adapters.LoadAdapter(request, timeout=60).adapter


def answers(server: LiveServer, adapter: str | None, mark: int | None) -> bool:
    """Whether a request is answered by the adapter of this mark in channel 0, None for the base."""
    told = server.generate(text_of(PROMPT), adapter, stopping={"max_new_tokens": NUM_TOKENS}).text
    return tokens_of(told) == expected_tokens(PROMPT[-1], {} if mark is None else {0: mark}, NUM_TOKENS)


def listed(server: LiveServer) -> list[pb.Adapter]:
    """Everything that ListAdapters tells, but for when it was used last."""
    adapters = list(server.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=1000), timeout=20).adapters)
    for adapter in adapters:
        adapter.ClearField("last_used_time")
    return adapters


def failure(error: grpc.RpcError) -> str:
    """Code and message in one line."""
    return f"{error.code().name}: {error.details()}"


def contents(root: Path) -> dict[str, str]:
    """What lies below a folder: digests by path."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    folders = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_dir())
    told = {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return told | dict.fromkeys(folders, "a folder")
