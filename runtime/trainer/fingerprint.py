"""Digests of what a run's settings only name: its data and its base, so that no run goes on with others unnoticed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor

from runtime.distributed.mesh import gather_objects
from runtime.layers.norm import RmsNorm
from runtime.models.deepseek.router import Router
from runtime.trainer.data.documents import Document
from runtime.trainer.lora import LoraGroupedExperts, LoraParallelLinear, Split
from runtime.trainer.stage import TrainingStage

DIGEST_BYTES = 16


def fingerprint(train: Sequence[Document], evaluation: Sequence[Document], stage: TrainingStage) -> dict[str, str]:
    """Setting -> digest; the same for every layout. Every process calls this."""
    return {"data.train": _of_documents(train), "data.eval": _of_documents(evaluation), "model": _of_base(stage)}


def _of_documents(documents: Sequence[Document]) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for document in documents:
        digest.update(len(document).to_bytes(8, "little"))
        digest.update(document.token_ids.astype("<i4").tobytes() + document.is_target.tobytes())
    return digest.hexdigest()


def _of_base(stage: TrainingStage) -> str:
    """Norms and routers, and the beginning of every matrix: what lies whole on some process in every layout.

    The first row; the first column of a matrix whose columns are split. Bases that differ in nothing but the rest of
    their matrices are not told apart.
    """
    own: dict[str, str] = {}
    for name, module in stage.named_modules():
        if isinstance(module, RmsNorm | Router):
            own[name] = _of_tensor(module.weight)
        elif isinstance(module, LoraParallelLinear) and stage.mesh.tp.rank == 0:
            weight = module.base.weight
            own[name] = _of_tensor(weight[:, 0] if module.split is Split.ROW else weight[0])
        elif isinstance(module, LoraGroupedExperts):
            for expert, rows13, rows2 in zip(module.experts, *module.first_rows(), strict=True):
                own[f"{name}.{expert}"] = _of_tensor(rows2) + _of_tensor(rows13)
    if stage.is_first and stage.mesh.tp.rank == 0:
        own["embed_tokens"] = _of_tensor(stage.embed_tokens[0])
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    everyone: dict[str, str] = {}
    for of_stage in gather_objects(own, stage.mesh.world):
        everyone.update(of_stage)  # type: ignore[call-overload]
    for name, value in sorted(everyone.items()):
        digest.update(f"{name}={value};".encode())
    return digest.hexdigest()


def _of_tensor(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.detach().float().cpu().numpy().tobytes(), digest_size=DIGEST_BYTES).hexdigest()
