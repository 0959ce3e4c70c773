"""What goes wrong with files: one error type that carries every problem found, not only the first."""

from collections.abc import Iterable

MAX_PRINTED_PROBLEMS = 20


class LoadError(ValueError):
    """A checkpoint, adapter or tokenizer was refused; `problems` holds every reason, `str()` the first 20."""

    def __init__(self, headline: str, problems: Iterable[str] = ()) -> None:
        self.headline = headline
        self.problems: tuple[str, ...] = tuple(problems)
        super().__init__(headline)

    def __str__(self) -> str:
        lines = [self.headline]
        lines += [f"  - {problem}" for problem in self.problems[:MAX_PRINTED_PROBLEMS]]
        num_hidden = len(self.problems) - MAX_PRINTED_PROBLEMS
        if num_hidden > 0:
            lines.append(f"  ... and {num_hidden} more problems")
        return "\n".join(lines)


class CheckpointError(LoadError):
    """A base model directory (config, weights or tokenizer) cannot be used."""


class AdapterError(LoadError):
    """An adapter directory cannot be used with this base."""
