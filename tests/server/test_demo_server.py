"""`graft serve` with the real engine, the bundled model and adapters, over real ports."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runtime.demo import ADAPTERS_DIR, TASKS_DIR
from runtime.pb.fmaas import generation_pb2 as pb
from runtime.pb.graft.admin.v1 import adapters_pb2 as admin_pb
from tests.conftest import RecordNumber
from tests.server.live import LiveServer, refused

TASKS = sorted(path.stem for path in TASKS_DIR.glob("*.jsonl"))
NUM_CLIENTS = 48
PROMPT = "Input:\nMarch 4th, 1999\nOutput:\n"


def _rows(task: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (TASKS_DIR / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled adapters."""
    folder = tmp_path_factory.mktemp("root")
    for task in TASKS:
        shutil.copytree(ADAPTERS_DIR / task, folder / task)
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[LiveServer]:
    with LiveServer.demo(root) as live:
        for task in TASKS:
            _load(live, task)
        yield live


def _load(live: LiveServer, name: str, path: str | None = None) -> admin_pb.Adapter:
    request = admin_pb.LoadAdapterRequest(adapter_id=name, source_path=path or name)
    return live.adapters.LoadAdapter(request, timeout=60).adapter


def _exact_match(live: LiveServer, task: str, adapter: str | None) -> float:
    """Share of a task's held-out rows that are answered to the letter, in per cent."""

    def is_right(row: dict[str, str]) -> bool:
        response = live.generate(row["prompt"], adapter, stopping={"max_new_tokens": 64})
        return response.text.strip() == row["completion"].strip()

    rows = _rows(task)
    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        return 100 * sum(clients.map(is_right, rows)) / len(rows)


@pytest.mark.parametrize("task", TASKS)
def test_an_adapter_is_right_where_the_base_is_not(server: LiveServer, task: str, record_number: RecordNumber) -> None:
    assert len(_rows(task)) >= 200
    record_number(f"{task}: exact match with its adapter, %", _exact_match(server, task, task), at_least=90)
    record_number(f"{task}: exact match of the base, %", _exact_match(server, task, None), at_most=20)


def test_two_adapters_touch_routed_experts_only_and_one_touches_few_of_them() -> None:
    """Read off the files: module names, and the number of experts that have weights."""
    from safetensors import safe_open

    names = {}
    for task in TASKS:
        with safe_open(ADAPTERS_DIR / task / "adapter_model.safetensors", framework="pt") as file:
            names[task] = list(file.keys())
    experts_only = [task for task, keys in names.items() if all(".mlp.experts." in key for key in keys)]
    per_expert = [task for task in experts_only if all(".mlp.experts.base" not in key for key in names[task])]
    touched = {task: {key.split("_proj")[0].rsplit(".", 1)[0] for key in names[task]} for task in per_expert}
    num_experts = 3 * 32
    assert len(TASKS) >= 4 and len(experts_only) >= 2
    assert any(len(experts) > 3 and len(experts) < num_experts / 2 for experts in touched.values()), touched


def test_a_load_and_an_unload_leave_running_streams_as_they_are(server: LiveServer) -> None:
    long = {"max_new_tokens": 150, "min_new_tokens": 150}
    alone = {task: server.generate(PROMPT, task, stopping=long).text for task in TASKS}
    texts: dict[str, str] = {}

    def stream(task: str) -> None:
        texts[task] = "".join(part.text for part in server.stream(PROMPT, task, stopping=long))

    threads = [threading.Thread(target=stream, args=(task,)) for task in TASKS]
    for thread in threads:
        thread.start()
    loaded = _load(server, "late", TASKS[0])
    answer = server.generate(PROMPT, "late", stopping={"max_new_tokens": 20}).text
    server.adapters.UnloadAdapter(admin_pb.UnloadAdapterRequest(name=loaded.name), timeout=60)
    for thread in threads:
        thread.join(60)
    assert texts == alone
    assert answer == server.generate(PROMPT, TASKS[0], stopping={"max_new_tokens": 20}).text
    assert refused(lambda: server.generate("x", "late"))[1] == "ADAPTER_NOT_FOUND"


def test_on_sigterm_running_requests_finish_and_the_exit_is_clean(root: Path) -> None:
    with LiveServer.demo(root, "--adapter", f"{TASKS[0]}={root / TASKS[0]}") as live:
        stopping = {"max_new_tokens": 400, "min_new_tokens": 400}
        call = live.stream(PROMPT, TASKS[0], stopping=stopping)
        next(call)
        live.process.send_signal(signal.SIGTERM)
        parts = list(call)
        assert parts[-1].generated_token_count == 400 and parts[-1].stop_reason == pb.MAX_TOKENS
        assert live.process.wait(30) == 0
