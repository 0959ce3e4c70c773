"""`graft doctor` as a user runs it, on the CPU: its exit status, what it prints, the report that it writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from runtime import cli
from runtime.commands import doctor
from runtime.doctor import run
from runtime.doctor.cases import operations
from runtime.doctor.report import read_report
from runtime.ops.base import make_ops
from tests.doctor.broken import SwappedSwiglu


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "NUM_SAMPLES", 1)
    monkeypatch.setattr(run, "MAX_CALLS", 1)


def test_a_small_run_on_the_cpu_passes_and_its_report_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HCCL_BUFFSIZE", "200")
    path = tmp_path / "report.md"
    assert cli.main(["doctor", "--device", "cpu", "--small", "--output", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    data = read_report(text)
    assert text.startswith("# graft doctor, cpu: passed\n")
    assert (data["device"], data["scale"], data["failed"], data["unfinished"]) == ("cpu", "small", [], [])
    assert data["versions"]["torch"].startswith(torch.__version__)
    assert data["environment"]["HCCL_BUFFSIZE"] == "200"
    assert {row["shapes"] for row in data["rows"]} == {"demo"}
    assert {row["operation"] for row in data["rows"]} == set(operations()) - {"pack_linear", "make_cache", "pack_mla"}
    assert "rms_norm" in data["plain_operations"] and "grouped_matmul" not in data["plain_operations"]
    findings = {finding["name"]: finding for finding in data["findings"]}
    assert findings["demo end to end"]["facts"]["exact_answers"] >= 11
    assert {finding["status"] for finding in findings.values()} == {"passed", "skipped"}
    printed = capsys.readouterr().out
    assert f"written: {path}" in printed and "lora_add_" in printed
    assert "torch_npu" not in sys.modules


def test_a_wrong_operation_gives_status_1_and_a_sentence_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "make_ops", lambda device: SwappedSwiglu())
    path = tmp_path / "report.md"
    assert cli.main(["doctor", "--small", "--output", str(path)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("graft: ") and "swiglu (decode), demo, bfloat16" in said and "training step, float32" in said
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# graft doctor, cpu: FAILED\n")
    assert any(name.startswith("swiglu (prefill)") for name in read_report(text)["failed"])


@pytest.mark.parametrize("device", ["cuda", "npu"])
def test_a_device_that_is_not_there_is_one_sentence_and_status_2(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # importing it fails
    path = tmp_path / "report.md"
    assert cli.main(["doctor", "--device", device, "--output", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"graft: device = '{device}'") and said.count("\n") == 1
    assert device != "npu" or ("graft-moe[npu]" in said and "deploy/docker/ascend.Dockerfile" in said)
    assert not path.exists()


def test_a_report_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", "--output", str(tmp_path / "absent" / "report.md")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert cli.main(["doctor", "--output", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_a_run_that_is_cut_off_leaves_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report is written after every part, and names the parts that are missing."""

    def lost(*_: object) -> list[object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "check_demo", lost)
    path, device = tmp_path / "report.md", torch.device("cpu")
    with pytest.raises(KeyboardInterrupt):
        doctor.diagnose(device, make_ops(device), "small", "graft doctor", path)
    data = read_report(path.read_text(encoding="utf-8"))
    assert data["unfinished"] == ["demo end to end", "training step", "all-reduce"]
    assert len(data["rows"]) > 50
