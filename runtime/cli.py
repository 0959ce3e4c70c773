"""The command `graft`: parse arguments here, do the work in `runtime.commands`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.commands.adapter_arguments import add_adapters
from runtime.config import ADAPTER_WRITERS, DEVICES, DTYPES, EngineConfig, ServerConfig
from runtime.env import configure_logging, default_admin, default_server
from runtime.errors import GraftError
from runtime.trainer.config import EXPORT_FORMATS
from runtime.version import version

FORMAT_HINT = "what wrote flat stacks of experts whose order of numbers the files do not tell (docs/formats.md)"
LENGTHS = "LENGTHS: N, LOW:HIGH (uniform), or lognormal:MEDIAN:SIGMA"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a failure is one sentence on stderr and a status that is not 0."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(arguments, argparse.Namespace(arguments=list(arguments)))
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
    parser.add_argument("--version", action="version", version=f"graft {version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_generate(commands)
    add_adapters(commands)
    _add_server(commands)
    _add_inspect(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_bench(commands)
    _add_train(commands)
    _add_doctor(commands)
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
    add("--max-adapters", type=int, default=engine.max_adapters, metavar="N", help="adapters on the device at once")
    add(
        "--metrics-max-adapters",
        type=int,
        default=server.metrics_max_adapters,
        metavar="N",
        help="adapters with request counts of their own in /metrics",
    )
    add("--max-batch-tokens", type=int, default=engine.max_batch_tokens, metavar="N", help="tokens in one step")
    add("--max-batch-size", type=int, default=engine.max_batch_size, metavar="N", help="sequences in one step")
    _add_tiers(serve)
    _add_limits(serve)
    _add_times(serve)


def _add_tiers(serve: argparse.ArgumentParser) -> None:
    engine = EngineConfig(Path())
    add = serve.add_argument
    add("--adapters-on-demand", action="store_true", help="requests may name any folder right under the adapters root")
    add(
        "--adapters-manifest",
        type=Path,
        metavar="FILE",
        help="JSON or YAML list of adapters that are to be there (name, path, digest, pinned, aliases); followed",
    )
    add(
        "--adapter-host-memory-gib",
        type=float,
        default=engine.adapter_host_memory_gib,
        metavar="X",
        help="host memory for adapters; 0 takes twice what they may take on the device",
    )
    add(
        "--replacement-experts",
        type=int,
        default=engine.replacement_experts,
        metavar="N",
        help="set aside device memory for so many experts of each layer that ESFT adapters replace",
    )
    add(
        "--adapter-cycle-seconds",
        type=float,
        default=engine.adapter_cycle_seconds,
        metavar="S",
        help="how long an adapter keeps its place on the device while others wait for one",
    )
    add(
        "--max-adapter-wait-seconds",
        type=float,
        default=engine.max_adapter_wait_seconds,
        metavar="S",
        help="how long a request waits for its adapter's place on the device before it is refused",
    )


def _add_limits(serve: argparse.ArgumentParser) -> None:
    engine, server = EngineConfig(Path()), ServerConfig(EngineConfig(Path()))
    serve.add_argument(
        "--max-waiting-requests",
        type=int,
        default=engine.max_waiting_requests,
        metavar="N",
        help="requests that may wait for a place; more are refused",
    )
    serve.add_argument(
        "--max-adapter-requests",
        type=int,
        default=server.max_adapter_requests,
        metavar="N",
        help="requests that one adapter may have in the server; 0: no bound",
    )
    serve.add_argument(
        "--max-adapter-tokens",
        type=int,
        default=server.max_adapter_tokens,
        metavar="N",
        help="tokens that these may have together, prompts and answers; 0: no bound",
    )
    serve.add_argument(
        "--max-new-tokens",
        type=int,
        default=server.max_new_tokens_limit,
        metavar="N",
        help="the most new tokens that a request may ask for",
    )
    serve.add_argument(
        "--default-max-new-tokens",
        type=int,
        default=server.default_max_new_tokens,
        metavar="N",
        help="new tokens of a request that does not say how many",
    )


def _add_times(serve: argparse.ArgumentParser) -> None:
    server = ServerConfig(EngineConfig(Path()))
    times = (
        ("--drain-delay", server.drain_delay_seconds, "on SIGTERM, go on answering so long at least"),
        ("--drain-timeout", server.drain_timeout_seconds, "on SIGTERM, wait for running requests so long at most"),
        ("--stall-seconds", server.stall_seconds, "call the engine stalled after so long without a step"),
        ("--max-connection-age", server.max_connection_age_seconds, "renew client connections after so long"),
    )
    for flag, default, text in times:
        serve.add_argument(flag, type=float, default=default, metavar="S", help=f"{text}, in seconds")


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = commands.add_parser("generate", help="stream the answer to one prompt")
    generate.set_defaults(module="generate")
    where = generate.add_mutually_exclusive_group()
    where.add_argument("--server", default=default_server(), metavar="H:P", help="a server (default %(default)s)")
    where.add_argument("--local", type=Path, metavar="MODEL", help="run this model folder in this process instead")
    generate.add_argument("--adapter", metavar="NAME", help="an adapter on the server; with --local, its folder")
    generate.add_argument("prompt", metavar="PROMPT")


def _add_server(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    server = commands.add_parser("server", help="look at a running server, drain it, end requests")
    server.set_defaults(module="server")
    actions = server.add_subparsers(dest="action", required=True, metavar="info|load|drain|abort")
    info = actions.add_parser("info", help="what runs there, its state and its limits")
    load = actions.add_parser("load", help="how busy it is, and the requests that it works on")
    drain = actions.add_parser("drain", help="take it out of traffic and wait for its running requests")
    drain.add_argument("--timeout", type=float, metavar="S", help="seconds to wait (default: the server's own)")
    abort = actions.add_parser("abort", help="end running requests")
    target = abort.add_mutually_exclusive_group(required=True)
    target.add_argument("--request", metavar="ID", help="the request with this id")
    target.add_argument("--correlation", metavar="ID", help="all that came with this x-correlation-id")
    target.add_argument("--adapter", metavar="NAME", help="all that name this adapter")
    target.add_argument("--all", action="store_true", help="all of them")
    for action in (info, load, drain, abort):
        action.add_argument("--admin", default=default_admin(), metavar="H:P", help="admin port (default %(default)s)")


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = commands.add_parser("inspect", help="print what an adapter would change in a base model")
    inspect.set_defaults(module="inspect")
    inspect.add_argument("adapter", type=Path, metavar="ADAPTER", help="an adapter folder")
    inspect.add_argument("--base", type=Path, required=True, metavar="MODEL", help="a model folder")
    inspect.add_argument("--format-hint", choices=ADAPTER_WRITERS, help=FORMAT_HINT)


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    convert = commands.add_parser("convert", help="write an adapter of any known layout as the standard file")
    convert.set_defaults(module="convert")
    add = convert.add_argument
    add("adapter", type=Path, metavar="ADAPTER", help="an adapter folder, or a checkpoint with mp_rank_* folders")
    add("--base", type=Path, required=True, metavar="MODEL", help="the model folder that it belongs to")
    add("--output", type=Path, required=True, metavar="DIR", help="the folder to write; an adapter there is replaced")
    add("--format-hint", choices=ADAPTER_WRITERS, help=FORMAT_HINT)
    add("--rank", type=int, metavar="N", help="of MindSpeed-LLM shards, which do not state it (its --lora-r)")
    add("--alpha", type=float, metavar="X", help="of MindSpeed-LLM shards (its --lora-alpha)")
    add("--dtype", choices=DTYPES, default="auto", help="of what is written (default: that of the source)")


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = commands.add_parser("export", help="write an adapter for other programs, or merged into its base")
    export.set_defaults(module="export")
    add = export.add_argument
    add("adapter", type=Path, metavar="ADAPTER", help="an adapter folder, or a checkpoint of a training run")
    add("--base", type=Path, required=True, metavar="MODEL", help="the model folder that it belongs to")
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to write; an adapter there is replaced")
    form = export.add_mutually_exclusive_group()
    form.add_argument(
        "--format", choices=EXPORT_FORMATS, help=f"layout (default {EXPORT_FORMATS[0]}, which vLLM and SGLang read too)"
    )
    form.add_argument("--merge", action="store_true", help="write the base with the adapter merged into it instead")
    dtypes = [dtype for dtype in DTYPES if dtype != "auto"]
    add("--dtype", choices=dtypes, help="of what is written (default: a checkpoint's as its run says, else bfloat16)")


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser(
        "bench", help="send load to a server: throughput, latencies, a JSON file and a picture", epilog=LENGTHS
    )
    bench.set_defaults(module="bench")
    add, end = bench.add_argument, bench.add_mutually_exclusive_group()
    add("--server", default=default_server(), metavar="H:P", help="the server (default %(default)s)")
    end.add_argument("--requests", type=int, metavar="N", help="end after this many requests (default 100)")
    end.add_argument("--seconds", type=float, metavar="S", help="send requests for so long")
    add("--concurrency", type=int, metavar="N", help="requests at once (default 8); with --rate, the most at once")
    add("--rate", type=float, metavar="R", help="Poisson arrivals, requests a second, instead of a closed loop")
    add("--adapter", action="append", default=[], metavar="NAME=WEIGHT", help="one of the mix; `base` is the base")
    add("--prompt-tokens", metavar="LENGTHS", help="tokens of a prompt (default 64)")
    add("--output-tokens", metavar="LENGTHS", help="tokens to generate (default 64)")
    add("--prompts", type=Path, metavar="FILE", help='rows of {"prompt": ..., "adapter": ...} instead of random words')
    add("--stop-at-eos", action="store_true", help="let the model end before the wanted output length")
    add("--temperature", type=float, default=0.0, metavar="T", help="sample with this temperature (default 0: greedy)")
    add("--seed", type=int, default=0, help="of lengths, prompts, adapters, arrivals and sampling (default 0)")
    add("--warmup", type=int, metavar="N", help="requests before the measured ones (default 4, or one per adapter)")
    add("--timeout", type=float, default=600.0, metavar="S", help="deadline of each request (default 600)")
    add("--connections", type=int, default=1, metavar="N", help="HTTP/2 connections to spread over (default 1)")
    add("--metrics", metavar="H:P", help="the server's HTTP port: also report what its /metrics say of the run")
    add("--out", type=Path, default=Path("graft-bench.json"), metavar="FILE", help="default %(default)s")
    add("--picture", type=Path, metavar="FILE", help=".png or .svg; default: beside the JSON file, as .png")
    add("--no-picture", action="store_true", help="write none; matplotlib is not needed then")


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser("train", help="train an adapter, as a YAML file says (docs/training.md)")
    train.set_defaults(module="train")
    add = train.add_argument
    add("config", type=Path, metavar="CONFIG.yaml", help="the run's settings")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting (optimizer.lr=1e-4)")
    begin = train.add_mutually_exclusive_group()
    begin.add_argument("--resume", nargs="?", const="latest", metavar="CHECKPOINT",
                       help="go on from the newest checkpoint of the output folder, or from this one")  # fmt: skip
    begin.add_argument("--overwrite", action="store_true", help="replace the run that lies in the output folder")
    add("--dry-run", action="store_true", help="print trainable tensors, memory per process and work, and stop")
    add("--publish", metavar="H:P", help="load the result into the server with this admin port")
    add("--name", metavar="NAME", help="the name that it gets there")


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser("doctor", help="check and time every device operation, run the demo, write a report")
    doctor.set_defaults(module="doctor")
    doctor.add_argument("--device", choices=DEVICES, default="cpu", help="what to look at (default %(default)s)")
    scale = doctor.add_mutually_exclusive_group()
    scale.add_argument("--small", action="store_true", help="the demo model's sizes alone, without DeepSeek-V3's")
    scale.add_argument("--full", action="store_true", help="DeepSeek-V3's sizes whole, on a CPU too (minutes)")
    doctor.add_argument(
        "--output", type=Path, metavar="FILE", help="the report (default: graft-doctor-DEVICE-DATE.md, here)"
    )


def _name_and_path(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, Path(path)


if __name__ == "__main__":
    sys.exit(main())
