"""What goes wrong with training data: one row, or the whole set with every bad row named."""

from loaders.errors import LoadError


class RowError(ValueError):
    """One row cannot be used; `str()` says why, without the file and line that only the reader knows."""


class DataError(LoadError):
    """Training data that cannot be used; `problems` names rows as `file:line: what is wrong`, `str()` the first 20."""
