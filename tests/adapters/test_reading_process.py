"""Adapters are read by a process of its own: what it gives equals what a thread reads, and what its end costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runtime.adapters import lent_pages
from runtime.adapters.folder_reader import FolderReader, FolderRules, ReadAdapter
from runtime.adapters.host_adapter import FactorLayout, HostAdapter
from runtime.adapters.info import AdapterInfo, AdapterState
from runtime.adapters.page_pool import HostPages
from runtime.adapters.reading_process import ReadingProcess, folders_reader
from runtime.adapters.replacement_experts import SpareRoom
from runtime.env import child_environment
from runtime.errors import GraftError, Precondition, Unavailable
from runtime.models.deepseek.config import DeepseekConfig
from tests.adapters.conftest import MakeStore, StoreDriver
from tests.adapters.test_other_layouts import draw_for_v3
from tests.loaders.formats import layouts
from tests.oracle.adapters import AdapterRecipe, write_adapter
from tests.oracle.replacement_experts import moe_layers, write_replacement

MAPPINGS = Path("/proc/self/maps")


@pytest.fixture(scope="module")
def rules(base_dir: Path) -> FolderRules:
    targets = DeepseekConfig.from_dir(base_dir).adapter_targets()
    room = SpareRoom(4, 2**20, targets.experts[max(targets.experts)].intermediate, targets.experts[1].hidden)
    return FolderRules(targets, 64, 2**30, torch.bfloat16, FactorLayout(), room)


@pytest.fixture(scope="module")
def process(rules: FolderRules) -> Iterator[ReadingProcess]:
    reading = ReadingProcess(rules)
    yield reading
    reading.close()


@pytest.fixture(scope="module")
def mixed(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the experts, and linear modules, at two ranks."""
    recipe = AdapterRecipe(
        ("routed_experts", "o_proj", "shared_experts"),
        lora_rank=6,
        rank_pattern={"mlp.experts.2.down_proj": 12, "o_proj": 24},
        covers=lambda _, expert: expert % 2 == 0,
    )
    return write_adapter(base_dir, tmp_path_factory.mktemp("mixed") / "mixed", recipe).path


def _pages(host: HostAdapter) -> dict[str, HostPages]:
    pages = dict(host.linears)
    for layer, own in host.shared_outer.items():
        pages |= {f"{layer}, outer": own.outer, f"{layer}, inner": own.inner}
    for layer, by_rank in host.experts.items():
        pages |= {f"{layer}, rank {item.lora_rank}": item for item in by_rank}
    return pages


@pytest.fixture(scope="module")
def folders(base_dir: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter of each form that pages have: own factors, outer factors for all experts, whole experts."""
    folder = tmp_path_factory.mktemp("forms")
    shared = folder / "shared"
    shared.mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        written = draw_for_v3(monkeypatch, "SGLang shared-outer factors")
    save_file(written.tensors, shared / "adapter_model.safetensors")
    settings = {"r": layouts.RANK, "lora_alpha": layouts.RANK} | written.config
    (shared / "adapter_config.json").write_text(layouts.as_json(settings))
    layer = moe_layers(base_dir)[0]
    replacement = write_replacement(base_dir, folder / "whole", {layer: [1, 3]})
    return {"own": mixed, "shared": shared, "whole": replacement.path}


@pytest.mark.parametrize("form", ["own", "shared", "whole"])
def test_the_process_gives_what_a_thread_reads(
    process: ReadingProcess, rules: FolderRules, folders: dict[str, Path], form: str
) -> None:
    own, other = (reader.read("m", str(folders[form]), "") for reader in (FolderReader(rules), process))
    assert (own.digest, own.facts) == (other.digest, other.facts)
    assert bool(own.host.shared_outer) is (form == "shared") and bool(own.host.replaced) is (form == "whole")
    ours, theirs = _pages(own.host), _pages(other.host)
    assert ours.keys() == theirs.keys() and (len(ours) > 1 or form == "whole")
    for name, pages in ours.items():
        assert (pages.lora_rank, pages.regions) == (theirs[name].lora_rank, theirs[name].regions)
        assert pages.factors.keys() == theirs[name].factors.keys()
        for factor, tensor in pages.factors.items():
            assert torch.equal(tensor, theirs[name].factors[factor]), (name, factor)
    assert own.host.replaced.keys() == other.host.replaced.keys()
    for layer, replacement in own.host.replaced.items():
        twin = other.host.replaced[layer]
        assert replacement.experts == twin.experts
        assert torch.equal(replacement.groups.w13, twin.groups.w13)
        assert torch.equal(replacement.groups.w2, twin.groups.w2)


@pytest.mark.parametrize("fault", ["no folder", "digest", "truncated", "rank"])
def test_refusals_are_those_of_a_thread(
    process: ReadingProcess, rules: FolderRules, files: dict[str, Path], tmp_path: Path, base_dir: Path, fault: str
) -> None:
    path, digest = files["one"], ""
    if fault == "no folder":
        path = tmp_path / "nothing"
    elif fault == "digest":
        digest = "sha256:" + "0" * 64
    elif fault == "rank":
        path = write_adapter(base_dir, tmp_path / "wide", AdapterRecipe(("o_proj",), lora_rank=65)).path
    else:
        path = write_adapter(base_dir, tmp_path / "short", AdapterRecipe(("o_proj",))).path
        weights = path / "adapter_model.safetensors"
        os.truncate(weights, weights.stat().st_size - 8)
    told = []
    for reader in (FolderReader(rules), process):
        with pytest.raises(Precondition) as caught:
            reader.read("a", str(path), digest)
        error = caught.value
        told.append((error.message, error.reason, error.field, error.problems))
    assert told[0] == told[1]


def test_the_process_stands_back_as_the_environment_says(
    rules: FolderRules, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_READING_NICENESS", "20")
    with pytest.raises(ValueError, match="GRAFT_READING_NICENESS = '20' is not a number from 0 to 19, nor idle"):
        ReadingProcess(rules)
    monkeypatch.setenv("GRAFT_READING_NICENESS", "17")
    reading = ReadingProcess(rules)
    try:
        reading.read("m", str(mixed), "")
        assert os.getpriority(os.PRIO_PROCESS, reading.pid or 0) == 17
    finally:
        reading.close()


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="Linux has it")
def test_the_process_has_what_nobody_wants_where_steps_need_the_cores(rules: FolderRules, mixed: Path) -> None:
    reading = folders_reader(rules, own_process=True, steps_need_cores=True)
    assert isinstance(reading, ReadingProcess)
    try:
        reading.read("m", str(mixed), "")
        tasks = Path(f"/proc/{reading.pid}/task").iterdir()
        assert {os.sched_getscheduler(int(task.name)) for task in tasks} == {os.SCHED_IDLE}
    finally:
        reading.close()


def test_memory_is_used_again_when_the_last_tensor_over_it_is_gone_and_not_before(
    rules: FolderRules, folders: dict[str, Path]
) -> None:
    reading = ReadingProcess(rules)
    try:
        path = str(folders["own"])
        read: ReadAdapter | None = reading.read("m", path, "")
        last = next(iter(read.host.linears.values())).factors["a"] if read else None
        assert last is not None
        first, content = last.data_ptr(), last.clone()
        del read
        others = [reading.read(f"other {form}", str(folders[form]), "") for form in ("own", "shared", "whole", "own")]
        assert torch.equal(last, content)
        taken = {_place_of_first(other) for other in (others[0], others[-1])}
        assert len(taken | {first}) == 3
        del last
        again: list[ReadAdapter] = []
        assert _comes_true(lambda: again.append(reading.read("m", path, "")) or _place_of_first(again[-1]) == first)  # type: ignore[func-returns-value]
        assert torch.equal(next(iter(others[0].host.linears.values())).factors["a"], content)
    finally:
        reading.close()


def test_all_memory_is_unmapped_when_the_process_is_closed_and_the_last_tensor_is_gone(
    rules: FolderRules, mixed: Path
) -> None:
    before = _mapped_files()
    reading = ReadingProcess(rules)
    read: ReadAdapter | None = reading.read("m", str(mixed), "")
    reading.read("n", str(mixed), "")
    assert len(_mapped_files() - before) == 2
    reading.close()
    assert _comes_true(lambda: len(_mapped_files() - before) == 1)
    assert read is not None and torch.isfinite(next(iter(read.host.linears.values())).factors["a"]).all()
    del read
    assert _comes_true(lambda: _mapped_files() <= before)


def test_a_process_whose_memory_cannot_be_mapped_is_lost_and_the_next_load_has_a_new_one(
    rules: FolderRules, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = ReadingProcess(rules)

    def no_room(*_: object) -> None:
        raise OSError(12, "no room")

    try:
        with monkeypatch.context() as full:
            full.setattr(lent_pages, "map_memory", no_room)
            with pytest.raises(Unavailable, match="'m' was not loaded"):
                reading.read("m", str(mixed), "")
        assert reading.read("m", str(mixed), "").facts.num_expert_pages > 0
    finally:
        reading.close()


def test_an_adapter_in_host_memory_holds_no_descriptor(process: ReadingProcess, mixed: Path) -> None:
    process.read("m", str(mixed), "")
    before = len(os.listdir("/proc/self/fd"))
    kept = [process.read("m", str(mixed), "") for _ in range(5)]
    assert (len(os.listdir("/proc/self/fd")), len(kept)) == (before, 5)
    files = [os.readlink(file) for file in Path(f"/proc/{process.pid}/fd").iterdir()]
    assert sum("graft-adapter" in file for file in files) <= 1  # that which is ready for the next one


def test_a_killed_process_fails_the_load_under_way_and_the_next_load_has_a_new_one(
    rules: FolderRules, mixed: Path
) -> None:
    reading = ReadingProcess(rules)
    try:
        reading.read("m", str(mixed), "")
        first = reading.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)  # it will be in the middle of the load when it is killed
        subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(0.3); os.kill({first}, 9)"])
        with pytest.raises(Unavailable, match=r"'m' was not loaded.*SIGKILL") as caught:
            reading.read("m", str(mixed), "")
        assert caught.value.reason == "ADAPTER_READER_LOST"
        assert caught.value.retry_seconds is not None
        assert reading.read("m", str(mixed), "").facts.num_expert_pages > 0
        second = reading.pid
        assert second not in (None, first)
        os.kill(second or 0, signal.SIGKILL)
        # Between two loads, and to the end of its last thread: no load is lost by that.
        os.waitid(os.P_PID, second or 0, os.WEXITED | os.WNOWAIT)
        assert reading.read("m", str(mixed), "").digest.startswith("sha256:")
    finally:
        reading.close()


def test_a_store_goes_on_when_its_reading_process_is_killed(make: MakeStore, files: dict[str, Path]) -> None:
    driver: StoreDriver = make(reading_process=True)
    assert isinstance(driver.load("one", files["one"]), AdapterInfo)
    process = driver.reading_process
    assert process is not None and process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    driver.start("one", files["two"], replace=True)
    driver.start("three", files["three"])
    os.kill(process.pid, signal.SIGKILL)
    lost, third = driver.wait(2)
    assert isinstance(lost, GraftError) and lost.reason == "ADAPTER_READER_LOST"
    assert isinstance(third, AdapterInfo) and third.state == AdapterState.READY
    (one,) = [info for info in driver.store.infos() if info.name == "one"]
    assert (one.generation, one.state) == (1, AdapterState.READY)
    assert isinstance(driver.load("one", files["two"], replace=True), AdapterInfo)


def test_sums_are_made_of_pages_that_the_process_has_read(make: MakeStore, files: dict[str, Path]) -> None:
    expected, seen = make(), make(reading_process=True)
    for driver in (expected, seen):
        for name in ("one", "two"):
            driver.load(name, files[name])
        driver.compose("both", "0.5*one+2*two")
    (own,), (other,) = expected.wait(), seen.wait()
    assert isinstance(own, AdapterInfo) and isinstance(other, AdapterInfo)
    assert (own.digest, own.device_bytes, own.lora_rank_max) == (other.digest, other.device_bytes, other.lora_rank_max)


def test_the_process_ends_with_a_parent_that_is_killed(base_dir: Path) -> None:
    program = (
        "import sys, time, torch\n"
        "from pathlib import Path\n"
        "from runtime.adapters.folder_reader import FolderRules\n"
        "from runtime.adapters.host_adapter import FactorLayout\n"
        "from runtime.adapters.reading_process import ReadingProcess\n"
        "from runtime.models.deepseek.config import DeepseekConfig\n"
        "targets = DeepseekConfig.from_dir(Path(sys.argv[1])).adapter_targets()\n"
        "reading = ReadingProcess(FolderRules(targets, 64, 2**30, torch.float32, FactorLayout()))\n"
        "reading.start()\n"
        "print(reading.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(base_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_environment()) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert _state(child) not in ("", "Z")
        parent.kill()
        assert _comes_true(lambda: _state(child) in ("", "Z"))


def _place_of_first(read: ReadAdapter) -> int:
    return next(iter(read.host.linears.values())).factors["a"].data_ptr()


def _mapped_files() -> set[str]:
    """Inodes of the memory of adapters that this process maps."""
    lines = MAPPINGS.read_text(encoding="utf-8").splitlines()
    return {line.split()[4] for line in lines if "graft-adapter" in line}


def _state(pid: int) -> str:
    """The letter of a process's state, empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _comes_true(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
