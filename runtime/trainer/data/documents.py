"""JSONL files -> documents: token ids with a mask of what is learnt, and a report of what was cut or dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loaders.tokenizer import Tokenizer
from runtime.trainer.config import DataConfig
from runtime.trainer.data.errors import DataError, RowError
from runtime.trainer.data.formats import Example, detect_format, read_example
from runtime.trainer.data.jsonl import read_rows
from runtime.trainer.data.segments import SegmentEncoder
from runtime.trainer.data.template import Template

__all__ = ["DataError", "DataReport", "Document", "read_documents", "split_documents"]

MAX_BAD_ROWS = 1000
_BLOCK_ROWS = 1024  # tokenised together: enough for every core, little beside the result


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """One example: `token_ids` int32 [n]; `is_target` bool [n], whether token i is learnt.

    A learnt token is predicted from those before it. Attention and positions never cross into another document.
    """

    token_ids: NDArray[np.int32]
    is_target: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class DataReport:
    """What became of the rows: `num_rows` were read; tokens are counted in the documents that were kept."""

    num_rows: int
    num_dropped: int
    num_truncated: int
    num_tokens: int
    num_target_tokens: int

    def describe(self) -> str:
        """One line for the log."""
        share = 100 * self.num_target_tokens / max(self.num_tokens, 1)
        return (
            f"{self.num_rows:,} rows: {self.num_rows - self.num_dropped:,} kept ({self.num_truncated:,} truncated), "
            f"{self.num_dropped:,} dropped; {self.num_tokens:,} tokens, {share:.1f} % of them learnt"
        )


class _Problems:
    """The bad rows of one set, which is called by its role."""

    def __init__(self, role: str) -> None:
        self.role, self.found = role, list[str]()

    def add(self, problem: str) -> None:
        """Keep it; raises DataError when there are too many."""
        self.found.append(problem)
        if len(self.found) >= MAX_BAD_ROWS:
            self.raise_any()

    def raise_any(self) -> None:
        """Raises DataError if there are any."""
        if not self.found:
            return
        stopped = f" (reading stopped after {MAX_BAD_ROWS})" if len(self.found) >= MAX_BAD_ROWS else ""
        rows = "1 row" if len(self.found) == 1 else f"{len(self.found)} rows"
        raise DataError(f"{rows} of the {self.role} data cannot be used{stopped}", self.found)


def read_documents(
    paths: Sequence[Path], data: DataConfig, tokenizer: Tokenizer, *, role: str = "training"
) -> tuple[list[Document], DataReport]:
    """Read, check and tokenise all rows, in the order of the files.

    Raises DataError naming `role` and every bad row as `file:line: what is wrong`, or if there is nothing to learn.
    """
    documents: list[Document] = []
    problems = _Problems(role)
    num_rows = num_truncated = 0
    for where, document in _read_all(paths, data, tokenizer, problems):
        num_rows += 1
        if len(document) <= data.max_length:
            documents.append(document)
        elif data.overlong == "error":
            problems.add(f"{where}: {len(document)} tokens, more than data.max_length = {data.max_length}")
        elif data.overlong == "truncate" and document.is_target[: data.max_length].any():
            documents.append(_truncated(document, data.max_length))
            num_truncated += 1
    problems.raise_any()
    num_tokens = sum(len(document) for document in documents)
    num_targets = sum(int(document.is_target.sum()) for document in documents)
    report = DataReport(num_rows, num_rows - len(documents), num_truncated, num_tokens, num_targets)
    _require_targets(paths, data, report)
    return documents, report


def split_documents(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """(for training, for evaluation): about `fraction` go to evaluation, chosen by a hash of their token ids.

    Neither the order nor other documents matter, and equal documents stay together. Raises DataError if a side would
    be empty though `fraction` is above 0.
    """
    if fraction == 0:
        return list(documents), []
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        digest = hashlib.blake2b(document.token_ids.astype("<i4").tobytes(), digest_size=8).digest()
        sides[int.from_bytes(digest, "little") < fraction * 2**64].append(document)
    for side, name in zip(sides, ("training", "evaluation"), strict=True):
        if not side:
            raise DataError(
                f"data.eval_fraction = {fraction} of {len(documents)} documents leaves none for {name}: "
                "change it, give more rows, or name files in data.eval"
            )
    return sides


def _read_all(
    paths: Sequence[Path], data: DataConfig, tokenizer: Tokenizer, problems: _Problems
) -> Iterator[tuple[str, Document]]:
    """Every good row as (`file:line`, document); after a problem, rows are tokenised only where that can find more."""
    encoder = SegmentEncoder(tokenizer)
    template = Template(data.template, encoder)
    for path in paths:
        examples = _read_examples(path, data.format, problems)
        while block := list(islice(examples, _BLOCK_ROWS)):
            if problems.found and data.overlong != "error":
                continue
            encoded = encoder.encode([template.segments(example) for _, example in block])
            for (where, _), (token_ids, is_target) in zip(block, encoded, strict=True):
                yield where, Document(token_ids, is_target)


def _read_examples(path: Path, format_name: str, problems: _Problems) -> Iterator[tuple[str, Example]]:
    """With format auto, the first row whose keys are known decides for the file."""
    for number, row in read_rows(path):
        try:
            if isinstance(row, RowError):
                raise row
            if format_name == "auto":
                format_name = detect_format(row)
            yield f"{path}:{number}", read_example(row, format_name)
        except RowError as cause:
            problems.add(f"{path}:{number}: {cause}")


def _truncated(document: Document, max_length: int) -> Document:
    """The head, so that the prompt stays as it is served; the EOS is cut with the tail and cannot be learnt early."""
    return Document(document.token_ids[:max_length].copy(), document.is_target[:max_length].copy())


def _require_targets(paths: Sequence[Path], data: DataConfig, report: DataReport) -> None:
    names = ", ".join(str(path) for path in paths)
    if report.num_rows == 0:
        raise DataError(f"{names}: no rows, only empty lines or nothing at all")
    if report.num_target_tokens == 0:
        raise DataError(
            f"{names}: no token is left to learn, since all {report.num_rows} rows are too long for "
            f"data.max_length = {data.max_length} (data.overlong: {data.overlong}): raise data.max_length"
        )
