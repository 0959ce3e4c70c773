"""The command line: what it prints, and one clear sentence when something is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runtime.cli import main
from runtime.commands.adapters import table
from tests.server.live import DEMO_MODEL, LiveServer


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Status, stdout and stderr."""
    status = main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_generate_streams_the_text(server: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "generate", "--server", server.address, "Hello 世界") == (0, "Hello 世界\n", "")
    assert run(capsys, "generate", "--server", server.address, "--adapter", "dates", "ab") == (0, "abab\n", "")


def test_an_adapter_is_loaded_listed_shown_and_unloaded(server: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    admin = ("--admin", server.admin_address)
    status, out, _ = run(capsys, "adapters", "load", "cli", "other", *admin)
    assert (status, out.startswith("cli loaded: generation ")) == (0, True)
    header, *rows, total = run(capsys, "adapters", "list", *admin)[1].splitlines()
    assert header.split()[:4] == ["NAME", "STATE", "PLACE", "GENERATION"]
    assert [row.split()[:2] for row in rows] == [["cli", "READY"], ["dates", "READY"]]
    assert total.startswith("2 of 64 slots, 2,000 of ")
    assert "digest                sha256:other" in run(capsys, "adapters", "show", "cli", *admin)[1]
    unloaded = "cli: UNLOADED, 1,000 bytes of the device and 0 of the host freed\n"
    assert run(capsys, "adapters", "unload", "cli", *admin)[1] == unloaded


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("generate", "--server", "{grpc}", "--adapter", "nobody", "x"), "no adapter 'nobody' (adapter_id)"),
        (("generate", "--server", "127.0.0.1:1", "x"), "no server answers at 127.0.0.1:1"),
        (("adapters", "list", "--admin", "127.0.0.1:1"), "no server answers at 127.0.0.1:1"),
        (("adapters", "compose", "x", "--from", "a=zero", "--admin", "127.0.0.1:1"), "'zero' is not a weight"),
        (("adapters", "load", "x", "../y", "--admin", "{admin}"), "relative to the adapters root"),
        (("adapters", "load", "x", "broken", "--admin", "{admin}"), "  - layer 4: not finite"),
        (("serve", "/nowhere"), "model = '/nowhere' is out of range: an existing directory"),
        (("serve", str(DEMO_MODEL), "--max-batch-size", "0"), "max_batch_size = 0 is out of range"),
        (("serve", str(DEMO_MODEL), "--adapter", "a=/nowhere"), "there is no folder /nowhere"),
        (("serve", str(DEMO_MODEL), "--adapter", "a/b=."), "the name 'a/b' must match"),
        (("generate", "--local", "/nowhere", "x"), "model = '/nowhere' is out of range"),
        (("inspect", "/nowhere", "--base", str(DEMO_MODEL)), "there is no folder /nowhere"),
    ],
)
def test_a_failure_is_one_sentence_and_a_status(
    server: LiveServer, capsys: pytest.CaptureFixture[str], arguments: tuple, sentence: str
) -> None:
    filled = [argument.format(grpc=server.address, admin=server.admin_address) for argument in arguments]
    status, out, err = run(capsys, *filled)
    assert (status, out) == (1, "")
    assert err.startswith("graft: ") and sentence in err
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [[], ["serve", "--adapter", "x"], ["generate"], ["nothing"]])
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_help_is_quick_and_imports_no_torch() -> None:
    code = "import sys; sys.argv = ['graft', '--help']\ntry: import runtime.cli; runtime.cli.main()\n"
    code += "finally: print('torch' in sys.modules or 'grpc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout.rstrip().endswith("False")
    assert "serve a model over gRPC" in done.stdout


def test_serve_without_a_model_takes_the_bundled_one() -> None:
    from runtime import demo
    from runtime.cli import build_parser
    from runtime.commands.serve import build_config

    config = build_config(build_parser().parse_args(["serve", "--adapter", f"a={Path.cwd()}", "--grpc-port", "0"]))
    assert config.engine.model_path == demo.MODEL_DIR
    assert (config.adapters, config.grpc_port, config.admin_host) == ({"a": Path.cwd()}, 0, "127.0.0.1")


def test_a_table_aligns_words_left_and_numbers_right() -> None:
    assert list(table(("NAME", "N"), [("a", "1"), ("bcdef", "1,000")])) == [
        "NAME       N",
        "a          1",
        "bcdef  1,000",
    ]
    assert list(table(("N",), [("1,000",), ("-",)])) == ["    N", "1,000", "    -"]
