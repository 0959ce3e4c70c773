"""Writes the adapters in `written/`: stacks of experts as the imported PEFT saves them, and the deltas that it merges.

    pip install --no-deps --target /tmp/peft-0.18.1 peft==0.18.1
    PYTHONPATH=/tmp/peft-0.18.1 python tests/loaders/formats/make_peft_fixtures.py
"""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

EXPERTS, HIDDEN, INTERMEDIATE, LAYER = 3, 12, 5, 1


class Experts(nn.Module):
    """Stacked experts as transformers 5 has them: gate_up_proj [E, 2I, H] and down_proj [E, H, I]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INTERMEDIATE))

    def forward(self, x: Tensor) -> Tensor:
        """PEFT calls nothing here: only the parameters are merged."""
        return x


class Model(nn.Module):
    """Modules of the names that a DeepSeek model has."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Module(), nn.Module()]
        for layer in layers:
            layer.mlp = nn.Module()
        layers[LAYER].mlp.experts = Experts()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Never called."""
        return x


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights by the names that DeepSeek checkpoints have on disk."""
    state = model.state_dict()
    prefix = f"model.layers.{LAYER}.mlp.experts"
    result = {}
    for expert in range(EXPERTS):
        gate, up = state[f"{prefix}.gate_up_proj"][expert].chunk(2)
        parts = {"gate": gate, "up": up, "down": state[f"{prefix}.down_proj"][expert]}
        result |= {f"{prefix}.{expert}.{name}_proj.weight": part.clone() for name, part in parts.items()}
    return result


def main() -> None:
    """Write one folder named after PEFT's version."""
    torch.manual_seed(0)
    base = Model()
    before = weights_of(base)
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=stacks)
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    path = Path(__file__).parent / "written" / f"peft-{peft.__version__}"
    model.save_pretrained(path)
    (path / "README.md").unlink()
    merged = weights_of(model.merge_and_unload())
    save_file({name: merged[name] - before[name] for name in before}, path.with_suffix(path.suffix + ".deltas"))


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
