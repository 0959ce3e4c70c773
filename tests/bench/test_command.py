"""`graft bench` as users call it: the table, the files it writes, its exit status, and the documented JSON."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from runtime.cli import main
from tests.server.live import REPOSITORY, LiveServer

FEW = ("--requests", "12", "--output-tokens", "4", "--adapter", "a", "--adapter", "base=2")


@pytest.fixture(scope="module")
def written(paced: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder that a run has written to, and its arguments."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["bench", "--server", paced.address, "--metrics", paced.http_address, *FEW, "--adapter", "nobody=0.5"]
    arguments += ["--out", str(folder / "run.json")]
    assert main(arguments) == 0
    return folder, arguments


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def documented() -> dict[str, set[str]]:
    """Section of docs/bench.md -> the keys in its table."""
    found: dict[str, set[str]] = {}
    for section in (REPOSITORY / "docs" / "bench.md").read_text().split("\n### ")[1:]:
        name, _, body = section.partition("\n")
        rows = re.findall(r"^\| (`.*?`) \|", body, re.MULTILINE)
        found[name] = {key for row in rows for key in re.findall("`([^`]+)`", row)}
    return found


def test_the_json_file_has_the_documented_keys_and_no_others(written: tuple[Path, list[str]]) -> None:
    report = json.loads((written[0] / "run.json").read_text())
    group, docs = report["overall"], documented()
    seen = {
        "Report": report,
        "Versions": report["versions"],
        "Server": report["server"],
        "Plan": report["plan"],
        "Group": group,
        "Summary": group["ttft_seconds"],
        "Error": group["errors"][0],
        "ServerMetrics": report["server_metrics"],
        "Buckets": report["server_metrics"]["queue_seconds"],
        "Timeline": report["timeline"],
        "Request": report["requests"][0],
    }
    assert {name: set(part) for name, part in seen.items()} == docs
    assert report["schema_version"] == 1
    for part in report["adapters"]:
        assert set(part) == docs["Group"] | {"adapter"}
    for name in ("ttft_seconds", "itl_seconds", "tpot_seconds", "e2e_seconds", "queue_seconds"):
        assert set(group[name]) == docs["Summary"]
    for name in ("queue_seconds", "prefill_seconds", "decode_seconds", "step_tokens"):
        assert set(report["server_metrics"][name]) == docs["Buckets"]
    assert {tuple(row) for row in report["requests"]} == {tuple(report["requests"][0])}
    assert next(row["error"] for row in report["requests"] if row["error"]).keys() == {"code", "reason", "message"}
    assert report["percentiles"] == {"method": "linear", "minimum_counts": {"p50": 2, "p90": 10, "p99": 100}}


def test_the_json_file_says_what_was_run_and_against_what(written: tuple[Path, list[str]]) -> None:
    folder, arguments = written
    report = json.loads((folder / "run.json").read_text())
    assert report["command"] == " ".join(["graft", *arguments])
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", report["started"])
    assert report["server"]["model_kind"] == "DECODER_ONLY" and report["server"]["max_sequence_length"] == 256
    assert report["plan"]["adapters"] == [
        {"adapter": "a", "weight": 1.0},
        {"adapter": "", "weight": 2.0},
        {"adapter": "nobody", "weight": 0.5},
    ]
    assert (report["plan"]["output_tokens"], report["plan"]["prompt_tokens"]) == ("4", "64")
    assert len(report["requests"]) == 12


def test_the_picture_beside_it_is_a_png(written: tuple[Path, list[str]]) -> None:
    from PIL import Image

    with Image.open(written[0] / "run.png") as picture:
        picture.load()
        assert (picture.format, picture.size) == ("PNG", (1430, 975))
        assert len(picture.convert("RGB").getcolors(2**24)) > 20, "curves are drawn"


def test_the_picture_may_be_an_svg(paced: LiveServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "run.json", tmp_path / "run.svg"
    arguments = ("--server", paced.address, *FEW, "--out", str(out), "--picture", str(picture))
    status, printed, _ = run(capsys, "bench", *arguments)
    assert status == 0
    assert f"written: {picture}" in printed
    root = ElementTree.parse(picture).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(root.findall(".//{http://www.w3.org/2000/svg}path")) > 20


def test_the_table_has_a_row_for_each_adapter(
    paced: LiveServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--server", paced.address, *FEW, "--out", str(tmp_path / "run.json"), "--no-picture")
    status, printed, _ = run(capsys, "bench", *arguments)
    rates, latencies, remarks = printed.split("\n\n")
    assert status == 0 and not (tmp_path / "run.png").exists()
    assert [row.split()[:3] for row in rates.splitlines()[1:]] == [
        ["all", "12", "0"],
        ["(base)", str(12 - (num_a := int(rates.splitlines()[3].split()[1]))), "0"],
        ["a", str(num_a), "0"],
    ]
    assert [row.split()[:3] for row in latencies.splitlines()[1:5]] == [
        ["all", "ttft", "12"],
        ["all", "itl", "36"],
        ["all", "e2e", "12"],
        ["all", "queue", "12"],
    ]
    assert "timed from the send" in remarks


def test_without_matplotlib_the_json_file_is_written_and_the_status_tells(
    paced: LiveServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "run.json"
    arguments = ("bench", "--server", paced.address, *FEW, "--out", str(out))
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert "a picture needs matplotlib: pip install 'graft-moe[bench]'" in err
    assert json.loads(out.read_text())["overall"]["requests"] == 12
    assert run(capsys, *arguments, "--no-picture")[0] == 0


def test_a_run_in_which_nothing_succeeded_exits_1(
    paced: LiveServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--server", paced.address, "--requests", "3", "--adapter", "nobody", "--out", str(tmp_path / "x.json"))
    status, printed, _ = run(capsys, "bench", *arguments)
    assert status == 1
    assert "3 failed: INVALID_ARGUMENT ADAPTER_NOT_FOUND: there is no adapter 'nobody'" in printed
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--server", "127.0.0.1:1"), "no server answers at 127.0.0.1:1"),
        (("--requests", "0"), "--requests = 0 is out of range"),
        (("--seconds", "0"), "--seconds = 0.0 is out of range: > 0"),
        (("--rate", "nan"), "--rate = nan is out of range: > 0"),
        (("--adapter", "a=b"), "--adapter 'a=b' is not NAME=WEIGHT"),
        (("--adapter", "base", "--adapter", ""), "each name once"),
        (("--output-tokens", "9:1"), "--output-tokens = '9:1' is out of range"),
        (("--prompts", "x.jsonl", "--prompt-tokens", "5"), "--prompt-tokens is for made-up prompts"),
        (("--out", "/nowhere/x.json"), "there is no folder /nowhere for x.json"),
        (("--picture", "x.pdf"), "the name must end with .png or .svg"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_a_status(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str
) -> None:
    status, out, err = run(capsys, "bench", *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("graft: ") and sentence in err
    assert "Traceback" not in err
