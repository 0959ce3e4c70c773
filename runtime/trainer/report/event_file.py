"""Scalars for TensorBoard: one event file per start of a run, written in place so that a full disk is seen here."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.trainer.report.append_file import AppendFile


class EventFile:
    """Records in the format of TensorFlow's event files; raises ImportError without the package `tensorboard`."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open a new file; TensorBoard then hides what earlier files hold from `first_step` on. Raises OSError."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}.{os.getpid()}"
        self._event: Any = Event
        self._file = AppendFile(folder / name)
        self._records: Any = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append one event with all of `scalars` by tag; raises OSError, and then nothing of it was kept."""
        values = [{"tag": tag, "simple_value": value} for tag, value in scalars.items()]
        self._write(step=step, summary={"value": values})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
