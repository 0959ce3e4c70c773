"""A server's engine on CPU has the threads of a step keep a core each, for as long as the step computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from runtime.config import EngineConfig
from runtime.engine.batch import Batch
from runtime.engine.engine import Engine
from runtime.engine.messages import AddRequest, RequestId
from runtime.engine.runner import StepResult
from runtime.engine.sampling_params import SamplingParams
from runtime.ops.step_cores import StepCores
from tests.oracle.base_models import Oracle
from tests.oracle.shapes import V3, Shape


class Recorded(StepCores):
    """Notes when it is used."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self._seen = seen

    def __enter__(self) -> None:
        self._seen.append("kept")

    def __exit__(self, *_: object) -> None:
        self._seen.append("left")


@pytest.mark.parametrize("reading_process", [True, False])
def test_cores_are_kept_while_a_batch_is_computed_if_a_process_reads_beside_it(
    oracle: Callable[[Shape], Oracle], monkeypatch: pytest.MonkeyPatch, *, reading_process: bool
) -> None:
    seen: list[str] = []
    monkeypatch.setattr("runtime.engine.start.keep_cores", lambda: Recorded(seen))
    config = EngineConfig(
        oracle(V3).path, device="cpu", max_model_len=64, kv_cache_tokens=64, reading_process=reading_process
    )
    engine = Engine(config)
    try:
        run = engine.runner.run

        def noted_run(batch: Batch) -> StepResult:
            seen.append("run")
            return run(batch)

        monkeypatch.setattr(engine.runner, "run", noted_run)
        engine.submit(AddRequest(RequestId(1), [5, 6, 7], SamplingParams(max_new_tokens=2, min_new_tokens=2)))
        while engine.has_work():
            engine.step()
    finally:
        engine.close()
    assert seen == (["kept", "run", "left"] * 2 if reading_process else ["run"] * 2)
