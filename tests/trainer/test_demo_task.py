"""Whole runs on a demo task: few experts do nearly as well as all, and a trained file means the same to all readers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from loaders.tokenizer import Tokenizer
from runtime.demo import MODEL_DIR, TASKS_DIR
from runtime.distributed.mesh import MeshShape, make_mesh
from runtime.pb.graft.admin.v1 import adapters_pb2 as admin_pb
from runtime.trainer.config_file import from_plain
from runtime.trainer.evaluate import evaluate
from runtime.trainer.export.adapter_files import ExportOptions, write_adapter
from runtime.trainer.gather import gather_adapter
from runtime.trainer.loop import Training
from runtime.trainer.step_data import step_data
from tests.conftest import RecordNumber
from tests.server.live import REPOSITORY, LiveServer

TASK = "name-redact"
ADAPTER_FILE = "adapter_model.safetensors"
# The largest tenth that keeps at most a quarter of the experts: 0.3 keeps 17.7 % of them, 0.4 24.0 %, 0.5 33.3 %.
THRESHOLD = 0.4
NUM_STEPS = 80
CPU = torch.device("cpu")
END = "<｜end▁of▁sentence｜>"
EVERYTHING = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "experts", "shared_experts",
              "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "lm_head"]  # fmt: skip


@pytest.fixture(scope="module")
def train_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training rows of the task, as the script of the examples writes them."""
    folder = tmp_path_factory.mktemp("rows")
    command = [sys.executable, "examples/demo_tasks.py", "--train-rows", "2000", "--out", str(folder)]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    return folder / f"{TASK}.jsonl"


def _training(rows: Path, output: Path, **settings: Any) -> Training:
    config = {
        "model": str(MODEL_DIR),
        "output": str(output),
        "data": {"train": [str(rows)], "eval": [str(TASKS_DIR / f"{TASK}.jsonl")], "max_length": 512},
        "lora": {"targets": ["experts"], "rank": 8, "alpha": 16.0},
        "optimizer": {"lr": 1e-2, "warmup_steps": 5},
        "batch_rows": 1,
        "dtype": "float32",
        "measure_mfu": False,
    }
    training_config = from_plain(config | settings, "test")
    training_config.validate()
    return Training(training_config, make_mesh(MeshShape(), 0), CPU)


@dataclass(frozen=True)
class Outcome:
    """What a run came to: shares of held-out rows and of experts, bytes of the adapter file."""

    exact_match: float
    expert_share: float
    num_bytes: int


def _outcome(rows: Path, output: Path, **settings: Any) -> Outcome:
    training = _training(rows, output, steps=NUM_STEPS, **settings)
    folder = training.run()
    assert folder is not None
    moes = training.model.stage.moe_layers().values()
    share = sum(len(moe.experts.adapted) for moe in moes) / sum(len(moe.experts.experts) for moe in moes)
    return Outcome(training.report.metrics()["eval exact match"], share, (folder / ADAPTER_FILE).stat().st_size)


def test_a_quarter_of_the_experts_keeps_the_quality_at_a_quarter_of_the_bytes(
    train_rows: Path, tmp_path: Path, record_number: RecordNumber
) -> None:
    full = _outcome(train_rows, tmp_path / "full")
    few = _outcome(train_rows, tmp_path / "few", selection={"by": "gate_score", "threshold": THRESHOLD})
    assert full.expert_share == 1 and full.exact_match > 0.9
    record_number(f"{TASK}: exact match with all experts, %", 100 * full.exact_match)
    record_number(f"{TASK}: exact match with selected experts, %", 100 * few.exact_match)
    record_number(f"{TASK}: experts kept at p = {THRESHOLD}, %", 100 * few.expert_share, at_most=25)
    quality = 100 * few.exact_match / full.exact_match
    record_number(f"{TASK}: quality kept with selected experts, %", quality, at_least=95)
    size = 100 * few.num_bytes / full.num_bytes
    record_number(f"{TASK}: bytes of the adapter with selected experts, %", size, at_most=30)


@dataclass(frozen=True)
class Trained:
    """A run with every kind of module, and its adapter on disk in float32."""

    training: Training
    folder: Path


@pytest.fixture(scope="module")
def trained(train_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    output = tmp_path_factory.mktemp("run")
    optimizer = {"lr": 5e-3, "warmup_steps": 5}
    training = _training(train_rows, output, steps=10, optimizer=optimizer, lora={"targets": EVERYTHING, "rank": 4})
    for _ in range(training.data.num_steps):
        training.train_step()
    adapter = gather_adapter(training.model.parameters, training.mesh)
    assert adapter is not None
    options = ExportOptions(dtype=torch.float32, base_name="graft-demo")
    write_adapter(output / "names", adapter.linears, adapter.experts, training.base.adapter_targets(), options)
    yield Trained(training, output / "names")
    training.close()


def _trainer_logits(training: Training) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Tokens and logits [T, V] of each of the first held-out documents, alone in its row."""
    documents = training.data.evaluation[:16]
    stage = training.model.stage.eval()
    rows = [(document,) for document in documents]
    found = []
    with torch.no_grad():
        for batch in step_data(training.config, rows, 0, training.mesh.dp, CPU).micro_batches:
            found.append(stage.logits(stage.hidden(None, batch), batch))
    stage.train()
    return [document.token_ids.tolist() for document in documents], found


def test_peft_computes_the_trainers_logits_from_the_trained_file(trained: Trained, record_number: RecordNumber) -> None:
    from peft import PeftModel
    from transformers import DeepseekV3ForCausalLM

    base = DeepseekV3ForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    tokens, own_logits = _trainer_logits(trained.training)
    difference = effect = 0.0
    with torch.no_grad():
        before = base(input_ids=torch.tensor([tokens[0]])).logits[0]
        effect = (own_logits[0][: len(tokens[0])] - before).abs().max().item()
        model = PeftModel.from_pretrained(base, str(trained.folder)).eval()
        for ids, own in zip(tokens, own_logits, strict=True):
            theirs = model(input_ids=torch.tensor([ids])).logits[0]
            difference = max(difference, (own[: len(ids)] - theirs).abs().max().item())
    assert effect > 1
    record_number("logits of PEFT and of the trainer", difference, at_most=1e-4)


def test_the_server_gives_held_out_rows_the_probability_that_the_trainer_gives_them(
    trained: Trained, record_number: RecordNumber
) -> None:
    training = trained.training
    own = evaluate(training.config, training.data.evaluation, training.model.stage)
    rows = [json.loads(line) for line in (TASKS_DIR / f"{TASK}.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer.from_dir(MODEL_DIR)
    prompt_lengths = [len(tokenizer.encode(row["prompt"])) for row in rows]
    with LiveServer.demo(trained.folder.parent, "--dtype", "float32") as server:
        request = admin_pb.LoadAdapterRequest(adapter_id="names", source_path=trained.folder.name)
        server.adapters.LoadAdapter(request, timeout=60)
        with ThreadPoolExecutor(16) as clients:
            of_rows = list(clients.map(lambda row, length: _scores(server, row, length), rows, prompt_lengths))
    scores = [score for of_row in of_rows for score in of_row]
    assert (len(rows), len(scores)) == (own.num_documents, own.num_targets)
    mean = sum(scores) / len(scores)
    assert mean < -0.001
    record_number("mean log-probability of held-out tokens, trainer", -own.loss)
    record_number("mean log-probability of held-out tokens, server", mean)
    record_number("their difference", abs(mean + own.loss), at_most=1e-4)


def _scores(server: LiveServer, row: dict[str, str], num_prompt: int) -> list[float]:
    """Log-probabilities that the server gives the completion's tokens and EOS, sent as input."""
    details = {"input_tokens": True, "token_logprobs": True}
    text = row["prompt"] + row["completion"] + END
    response = server.generate(text, "names", response=details, stopping={"max_new_tokens": 1})
    return [token.logprob for token in response.input_tokens[num_prompt:]]
