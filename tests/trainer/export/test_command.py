"""`graft export` and the model card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from loaders.adapter import load_adapter
from runtime.cli import main
from runtime.models.deepseek.config import DeepseekConfig
from runtime.trainer.export.card import model_card

DEMO = Path(__file__).parents[3] / "runtime" / "demo"
BASE, ADAPTER = DEMO / "model", DEMO / "adapters" / "date-iso"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Status, stdout and stderr."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def front_matter(card: str) -> dict[str, object]:
    fields: dict[str, object] = yaml.safe_load(card.split("---")[1])
    return fields


@pytest.mark.parametrize("layout", ["per-expert", "peft-v5"])
def test_an_exported_demo_adapter_means_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    out = tmp_path / "dates"
    status, printed, _ = run(
        capsys, "export", ADAPTER, "--base", BASE, "--out", out, "--format", layout, "--dtype", "float32"
    )
    assert status == 0
    assert printed.startswith(f"{out}: {layout}, ")
    targets = DeepseekConfig.from_dir(BASE).adapter_targets()
    before, after = load_adapter(ADAPTER, targets), load_adapter(out, targets)
    assert before.linears.keys() == after.linears.keys()
    assert {layer: list(adapted) for layer, adapted in before.experts.items()} == {
        layer: list(adapted) for layer, adapted in after.experts.items()
    }
    for layer, adapted in before.experts.items():
        for expert, lora in adapted.items():
            again = after.experts[layer][expert]
            assert lora.up is not None and again.up is not None
            assert torch.equal(lora.up.a.float(), again.up.a) and torch.equal(lora.up.b.float(), again.up.b)
    base_name = json.loads((ADAPTER / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert front_matter((out / "README.md").read_text())["base_model"] == base_name


def test_a_merged_demo_model_is_written_beside_its_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    status, printed, _ = run(capsys, "export", ADAPTER, "--base", BASE, "--out", out, "--merge", "--dtype", "float32")
    assert status == 0
    assert "weights changed" in printed
    assert (out / "tokenizer.json").read_bytes() == (BASE / "tokenizer.json").read_bytes()
    assert front_matter((out / "README.md").read_text())["base_model_relation"] == "merge"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("/nowhere", "--base", BASE, "--out", "{tmp}/x"), "there is no folder /nowhere"),
        ((ADAPTER, "--base", "/nowhere", "--out", "{tmp}/x"), "there is no folder /nowhere"),
        ((BASE, "--base", BASE, "--out", "{tmp}/x"), "no adapter_config.json"),
        ((ADAPTER, "--base", BASE, "--out", BASE), "which would be lost: name a new folder"),
        ((ADAPTER, "--base", BASE, "--out", BASE, "--merge"), "which would be lost: name a new folder"),
        ((ADAPTER, "--base", BASE, "--out", "/proc/x"), "/proc/x: cannot be written"),
    ],
)
def test_a_failure_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], sentence: str
) -> None:
    status, out, err = run(capsys, "export", *(str(argument).format(tmp=tmp_path) for argument in arguments))
    assert (status, out) == (1, "")
    assert err.startswith("graft: ") and sentence in err and "Traceback" not in err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [("--format", "onnx"), ("--dtype", "int8"), ("--format", "peft-v5", "--merge")])
def test_wrong_usage_exits_2(wrong: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", str(ADAPTER), "--base", str(BASE), "--out", "x", *wrong])
    assert caught.value.code == 2


def test_a_card_has_metrics_settings_and_how_to_serve_it() -> None:
    settings = {"lora.rank": 16, "data.train": "a|b\nc"}
    card = model_card(settings, {"eval loss": 0.123456789}, ["A note."], name="x", base_name="org/b: c")
    fields = front_matter(card)
    assert fields["base_model"] == "org/b: c"
    assert fields["library_name"] == "peft"
    assert "| lora.rank | 16 |" in card
    assert "| data.train | a\\|b c |" in card
    assert "| eval loss | 0.123457 |" in card
    assert "- A note." in card
    assert "graft adapters load x PATH" in card
    assert "base_model" not in front_matter(model_card({}, {}, []))
    assert "## Metrics" not in model_card({}, {}, [])
    assert json.dumps(fields)  # plain values only
