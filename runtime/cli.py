"""The command `graft`: parse arguments here, do the work in `runtime.commands`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from runtime.config import DEVICES, DTYPES, EngineConfig, ServerConfig
from runtime.env import configure_logging, default_admin, default_server
from runtime.errors import GraftError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a failure is one sentence on stderr and a status that is not 0."""
    options = build_parser().parse_args(arguments)
    try:
        configure_logging()
        command = importlib.import_module(f"runtime.commands.{options.module}")
        status: int = command.run(options)
        return status
    except KeyboardInterrupt:
        return 130
    except GraftError as error:
        print(f"graft: {error}", *(f"  - {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"graft: {error}", file=sys.stderr)
    return 1


def build_parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    parser = argparse.ArgumentParser(
        prog="graft", description="Serve one DeepSeek MoE base with a routed-expert LoRA adapter per request."
    )
    parser.add_argument("--version", action="version", version=f"graft {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_generate(commands)
    _add_adapters(commands)
    _add_inspect(commands)
    demo = commands.add_parser("demo", help="serve the bundled model and adapters, send requests, print a table")
    demo.set_defaults(module="demo")
    return parser


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    engine, server = EngineConfig(Path()), ServerConfig(EngineConfig(Path()))
    serve = commands.add_parser(
        "serve", help="serve a model over gRPC", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    serve.set_defaults(module="serve")
    add = serve.add_argument
    add("model", nargs="?", type=Path, metavar="MODEL", help="a Hugging Face model folder; without it, the demo model")
    add("--adapters-root", type=Path, metavar="DIR", help="adapters may be loaded from below this folder")
    add("--adapter", action="append", default=[], type=_name_and_path, metavar="NAME=PATH", help="load at the start")
    add("--host", default=server.host, help="address of the gRPC and HTTP ports; the admin port stays on loopback")
    add("--grpc-port", type=int, default=server.grpc_port, help="generation API; 0 takes any free port")
    add("--admin-port", type=int, default=server.admin_port, help="adapter administration")
    add("--http-port", type=int, default=server.http_port, help="/metrics, /healthz, /readyz, /v1/models")
    add(
        "--slow-reader-seconds",
        type=float,
        default=server.slow_reader_seconds,
        metavar="X",
        help="end a request whose client reads nothing for so long while its output waits",
    )
    add("--device", choices=DEVICES, default=engine.device, help="where the model runs")
    add("--dtype", choices=DTYPES, default=engine.dtype, help="of weights and activations")
    add(
        "--max-model-len",
        type=int,
        default=engine.max_model_len,
        metavar="N",
        help="prompt and output tokens of one request; 0 takes the model's own",
    )
    add(
        "--kv-cache-tokens",
        type=int,
        default=engine.kv_cache_tokens,
        metavar="N",
        help="tokens in the KV cache; 0 lets the engine choose",
    )
    add(
        "--adapter-memory-gib",
        type=float,
        default=engine.adapter_memory_gib,
        metavar="X",
        help="device memory for adapters",
    )
    add("--max-adapters", type=int, default=engine.max_adapters, metavar="N", help="adapters that are loaded at once")
    add("--max-batch-tokens", type=int, default=engine.max_batch_tokens, metavar="N", help="tokens in one step")
    add("--max-batch-size", type=int, default=engine.max_batch_size, metavar="N", help="sequences in one step")


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = commands.add_parser("generate", help="stream the answer to one prompt")
    generate.set_defaults(module="generate")
    where = generate.add_mutually_exclusive_group()
    where.add_argument("--server", default=default_server(), metavar="H:P", help="a server (default %(default)s)")
    where.add_argument("--local", type=Path, metavar="MODEL", help="run this model folder in this process instead")
    generate.add_argument("--adapter", metavar="NAME", help="an adapter on the server; with --local, its folder")
    generate.add_argument("prompt", metavar="PROMPT")


def _add_adapters(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    adapters = commands.add_parser("adapters", help="load, unload and show adapters of a running server")
    adapters.set_defaults(module="adapters")
    actions = adapters.add_subparsers(dest="action", required=True, metavar="load|unload|list|show")
    load = actions.add_parser("load", help="load an adapter folder under a name")
    load.add_argument("name", metavar="NAME")
    load.add_argument("path", metavar="PATH", help="relative to the server's adapters root")
    unload = actions.add_parser("unload", help="take no new requests for an adapter and free it")
    unload.add_argument("name", metavar="NAME")
    listing = actions.add_parser("list", help="all adapters")
    show = actions.add_parser("show", help="everything about one adapter")
    show.add_argument("name", metavar="NAME")
    for action in (load, unload, listing, show):
        action.add_argument("--admin", default=default_admin(), metavar="H:P", help="admin port (default %(default)s)")


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = commands.add_parser("inspect", help="print what an adapter would change in a base model")
    inspect.set_defaults(module="inspect")
    inspect.add_argument("adapter", type=Path, metavar="ADAPTER", help="an adapter folder")
    inspect.add_argument("--base", type=Path, required=True, metavar="MODEL", help="a model folder")


def _name_and_path(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, Path(path)


def _version() -> str:
    try:
        return metadata.version("graft-moe")
    except metadata.PackageNotFoundError:
        return "from source"


if __name__ == "__main__":
    sys.exit(main())
