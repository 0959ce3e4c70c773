"""Whole runs on a demo task: few experts do nearly as well as all, and a trained file means the same to all readers."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.demo import MODEL_DIR, TASKS_DIR
from runtime.distributed.mesh import MeshShape, make_mesh
from runtime.pb.graft.admin.v1 import adapters_pb2 as admin_pb
from runtime.trainer.config_file import from_plain
from runtime.trainer.loop import Training
from runtime.trainer.step_data import step_data
from tests.conftest import RecordNumber
from tests.server.live import REPOSITORY, LiveServer

TASK = "name-redact"
ADAPTER_FILE = "adapter_model.safetensors"
# The largest tenth that keeps at most a quarter of the experts: 0.3 keeps 17.7 % of them, 0.4 24.0 %, 0.5 33.3 %.
THRESHOLD = 0.4
NUM_STEPS = 80
NUM_LIKELIEST = 10  # as many as a server tells
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
    """A run with every kind of module, and the adapter that it left: in float32, as it was computed."""

    training: Training
    folder: Path


@pytest.fixture(scope="module")
def trained(train_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    output = tmp_path_factory.mktemp("run")
    optimizer = {"lr": 5e-3, "warmup_steps": 5}
    training = _training(train_rows, output, steps=10, optimizer=optimizer, lora={"targets": EVERYTHING, "rank": 4})
    folder = training.run()
    assert folder == output / "adapter"
    return Trained(training, folder)


@dataclass(frozen=True)
class Scored:
    """A held-out document alone in its row: its tokens, the logits [T, V], the log-probability of each learnt token."""

    token_ids: list[int]
    logits: torch.Tensor
    log_probs: list[float]


def _scored(training: Training) -> list[Scored]:
    """All held-out documents as the trainer sees them."""
    stage = training.model.stage.eval()
    documents = training.data.evaluation
    rows = [(document,) for document in documents]
    batches = step_data(training.config, rows, 0, training.mesh.dp, CPU).micro_batches
    found = []
    with torch.no_grad():
        for document, batch in zip(documents, batches, strict=True):
            hidden = stage.hidden(None, batch)
            log_probs = (-stage.losses(hidden, batch).losses_N).tolist()
            found.append(Scored(document.token_ids.tolist(), stage.logits(hidden, batch)[: len(document)], log_probs))
    stage.train()
    return found


def test_peft_computes_the_trainers_logits_from_the_file_of_the_run(
    trained: Trained, record_number: RecordNumber
) -> None:
    from peft import PeftModel
    from transformers import DeepseekV3ForCausalLM

    base = DeepseekV3ForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    documents = _scored(trained.training)[:16]
    difference = effect = 0.0
    with torch.no_grad():
        before = base(input_ids=torch.tensor([documents[0].token_ids])).logits[0]
        effect = (documents[0].logits - before).abs().max().item()
        model = PeftModel.from_pretrained(base, str(trained.folder)).eval()
        for own in documents:
            theirs = model(input_ids=torch.tensor([own.token_ids])).logits[0]
            difference = max(difference, (own.logits - theirs).abs().max().item())
    assert effect > 1
    record_number("logits of PEFT and of the trainer", difference, at_most=1e-4)


def test_the_server_computes_the_trainers_probabilities_of_held_out_rows(
    trained: Trained, record_number: RecordNumber
) -> None:
    """Of every learnt token, and of the likeliest ones in every place of a few rows: logits, but for what all share."""
    own = _scored(trained.training)
    rows = [json.loads(line) for line in (TASKS_DIR / f"{TASK}.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [row["prompt"] + row["completion"] + END for row in rows]
    with LiveServer.demo(trained.folder.parent, "--dtype", "float32") as server:
        request = admin_pb.LoadAdapterRequest(adapter_id="names", source_path=trained.folder.name)
        server.adapters.LoadAdapter(request, timeout=60)
        with ThreadPoolExecutor(16) as clients:
            theirs = list(clients.map(lambda text: _token_infos(server, text, 0), texts))
        likeliest = [_token_infos(server, text, NUM_LIKELIEST) for text in texts[:8]]
    assert [len(infos) for infos in theirs] == [len(document.token_ids) for document in own]
    pairs = [
        (server_info.logprob, log_prob)
        for infos, document in zip(theirs, own, strict=True)
        for server_info, log_prob in zip(infos[-len(document.log_probs) :], document.log_probs, strict=True)
    ]
    assert len(pairs) == sum(len(document.log_probs) for document in own) > 1000
    record_number("log-probability of a learnt token, server and trainer", max(abs(a - b) for a, b in pairs),
                  at_most=1e-4)  # fmt: skip
    means = [sum(values) / len(pairs) for values in zip(*pairs, strict=True)]
    assert means[1] < -0.001
    record_number("mean log-probability of held-out tokens, trainer", means[1])
    record_number("the server's less the trainer's", abs(means[0] - means[1]), at_most=1e-4)
    worst = max(map(_difference_of_likeliest, likeliest, own))
    record_number("the likeliest tokens' log-probabilities, server and trainer", worst, at_most=1e-4)


def _token_infos(server: LiveServer, text: str, num_likeliest: int) -> list[Any]:
    """What the server thinks of each token of a text that is sent as input."""
    details = {"input_tokens": True, "token_logprobs": True, "top_n_tokens": num_likeliest}
    return list(server.generate(text, "names", response=details, stopping={"max_new_tokens": 1}).input_tokens)


def _difference_of_likeliest(infos: list[Any], own: Scored) -> float:
    """The largest difference of a top log-probability, over all places but the first, which nothing predicts."""
    expected_TN = own.logits.log_softmax(-1).topk(NUM_LIKELIEST).values
    seen_TN = torch.tensor([[top.logprob for top in info.top_tokens] for info in infos[1:]])
    assert seen_TN.shape == (len(own.token_ids) - 1, NUM_LIKELIEST)
    return (seen_TN - expected_TN[:-1]).abs().max().item()


def test_what_a_file_in_bfloat16_costs(trained: Trained, record_number: RecordNumber) -> None:
    """Rounding factors moves all logits a little, and a few tokens to other experts, whose logits then differ much."""
    parameters = trained.training.model.parameters
    exact = [parameter.tensor.detach().clone() for parameter in parameters]
    before = _scored(trained.training)
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.tensor.copy_(parameter.tensor.bfloat16())
        after = _scored(trained.training)
    finally:
        with torch.no_grad():
            for parameter, tensor in zip(parameters, exact, strict=True):
                parameter.tensor.copy_(tensor)
    worst = sorted((a.logits - b.logits).abs().max().item() for a, b in zip(before, after, strict=True))
    record_number("bfloat16 file: largest logit difference of a document, median", worst[len(worst) // 2])
    record_number("bfloat16 file: largest logit difference of any document", worst[-1])
    means = [sum(sum(d.log_probs) for d in ds) / sum(len(d.log_probs) for d in ds) for ds in (before, after)]
    assert means[0] != means[1]
    record_number("bfloat16 file: mean log-probability less the trainer's", abs(means[0] - means[1]), at_most=1e-2)
