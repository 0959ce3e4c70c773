"""A tokenizer with tokens that the base has no embedding for: refused by name before any weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from tests.trainer.runs.demo import MODEL, Graft, Said, finish, start, write_config, write_rows

SENTENCE = "uses the token '<my_tool>' with id 1024, but the base's vocabulary has 1024 entries"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with one token more in its tokenizer, and none in its weights."""
    path = tmp_path_factory.mktemp("foreign") / "base"
    shutil.copytree(MODEL, path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<my_tool>", special=False)])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def foreign_rows(path: Path) -> Path:
    rows = [{"prompt": f"a <my_tool> {n}", "completion": f" b <my_tool> {n}"} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check(said: Said, role: str) -> None:
    assert said.status == 1 and len(said.messages) == 1, said.err
    assert f"the {role} data {SENTENCE}" in said.err and "Traceback" not in said.err


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_one_process_refuses_them(graft: Graft, tmp_path: Path, base: Path, flags: list[str]) -> None:
    rows = foreign_rows(tmp_path / "rows.jsonl")
    config = write_config(tmp_path / "run.yaml", rows, tmp_path / "out", model=str(base))
    check(graft("train", config, *flags), "training")


def test_processes_that_split_the_vocabulary_refuse_them(tmp_path: Path, base: Path) -> None:
    """Among them no process has such an id, so nothing else would stop the run."""
    rows = foreign_rows(tmp_path / "rows.jsonl")
    config = write_config(tmp_path / "run.yaml", rows, tmp_path / "out", model=str(base), parallel={"tp": 2})
    check(finish(start("runtime.cli", "train", config)), "training")
    assert not (tmp_path / "out" / "adapter").exists()


def test_they_are_refused_in_evaluation_data_too(graft: Graft, tmp_path: Path, base: Path) -> None:
    foreign, rows = foreign_rows(tmp_path / "eval.jsonl"), write_rows(tmp_path / "rows.jsonl")
    config = write_config(tmp_path / "run.yaml", rows, tmp_path / "out", model=str(base))
    changes = [f"--set=data.eval=[{foreign}]", "--set=data.eval_fraction=0"]
    check(graft("train", config, *changes), "evaluation")
