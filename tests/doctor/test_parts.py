"""The parts beside the operations: versions, the report's form, a training step, collectives."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from runtime.doctor import versions
from runtime.doctor.collectives import check_collectives
from runtime.doctor.finding import Finding, found
from runtime.doctor.report import Report, markdown, read_report
from runtime.doctor.run import FAILED, PASSED, SKIPPED, Row
from runtime.doctor.training import check_training
from runtime.ops.cpu import CpuOps
from tests.doctor.broken import DoubledGradient

CPU = torch.device("cpu")


def test_versions_of_cann_are_read_where_its_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "aarch64-linux"
    folder.mkdir()
    text = "package_name=Ascend-cann-toolkit\nversion=9.1.0\ninnerversion=V100R001\npath=here\n"
    (folder / "ascend_toolkit_install.info").write_text(text)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    told = dict(versions.software("npu"))
    assert "version=9.1.0" in told[str(folder / "ascend_toolkit_install.info")]
    assert dict(versions.software("cpu")) == {}


def test_absent_and_hanging_commands_are_told_and_do_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.command_output(("no-such-npu-smi", "info")) == "absent"
    refused = (sys.executable, "-c", "raise SystemExit('no driver')")
    assert versions.command_output(refused) == "exit status 1: no driver"
    monkeypatch.setattr(versions, "COMMAND_SECONDS", 0.2)
    assert versions.command_output((sys.executable, "-c", "import time; time.sleep(9)")) == "no answer within 0 s"


def test_the_environment_shows_device_settings_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("GRAFT_API_TOKEN", "hunter2")
    monkeypatch.setenv("TORCH_HOME", "https://me:hunter2@example.org/")
    monkeypatch.setenv("UNRELATED", "hunter2")
    shown = versions.environment()
    assert shown["TASK_QUEUE_ENABLE"] == "2" and shown["ASCEND_RT_VISIBLE_DEVICES"] == "0,1"
    assert "UNRELATED" not in shown and "hunter2" not in " ".join(shown.values())


def test_a_report_survives_bars_line_ends_and_infinity() -> None:
    report = Report("npu", "normal", "graft doctor", "now", {"npu-smi info": "| 0 910B |\n| OK |"}, {}, ["linear"])
    report.rows.append(Row("a", "linear", "decode", "demo", "float32", "x [1]", FAILED, error=float("inf"), bound=1e-4))
    report.rows.append(Row("b", "linear", "decode", "demo", "float32", "x [1]", SKIPPED, note="needs 7 bytes"))
    report.findings.append(Finding("demo", PASSED, {"tokens_per_second": 3.5}))
    text = markdown(report)
    assert "| npu-smi info | \\| 0 910B \\|<br>\\| OK \\| |" in text
    data = read_report(text)
    assert data["rows"][0]["error"] == "inf" and data["failed"] == ["a"]
    assert data["findings"][0]["facts"] == {"tokens_per_second": 3.5}
    assert data["verdict"] == "1 passed, 1 skipped, 1 failed in 0 s: a"
    with pytest.raises(ValueError, match="no report"):
        read_report("# something else")


def test_a_part_that_raises_is_a_failed_finding() -> None:
    def broken() -> list[Finding]:
        raise OSError("the device\nis gone")

    assert found("demo", broken) == [Finding("demo", FAILED, note="OSError: the device is gone")]


def test_a_training_step_with_wrong_gradients_is_found() -> None:
    [right] = check_training(CpuOps(), CPU, (torch.float32,))
    assert right.status == PASSED and float(right.facts["gradient_error"]) < 1e-5
    [wrong] = check_training(DoubledGradient(), CPU, (torch.float32,))
    assert wrong.status == FAILED and "gradients differ" in wrong.note
    assert float(wrong.facts["loss_error"]) < 1e-5


def test_two_processes_sum_what_they_hold() -> None:
    finding = check_collectives("cpu", 2)
    assert finding.status == PASSED, finding.note
    assert finding.facts["processes"] == 2
    assert check_collectives("cpu", 1).status == SKIPPED
