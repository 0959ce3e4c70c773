"""The program of a guide process: `python -m runtime.engine.guides.worker FD`.

llguidance bounds what a grammar may cost, but some grammars get past its bounds, in time and in memory
(`docs/guided-decoding.md`). So it runs here, where the kernel ends what takes too much, and where nothing else is lost.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection

from runtime.engine.guides.grammar import GuideError
from runtime.engine.guides.matchers import Matchers
from runtime.engine.guides.protocol import (
    AdvanceGuide,
    Allowed,
    Answer,
    CheckGuide,
    CloseGuide,
    Job,
    OpenGuide,
    Refused,
    WorkerSetup,
    receive_jobs,
    receive_setup,
    send_answer,
)


def main(arguments: Sequence[str]) -> int:
    """Serve the engine until it closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the front-end to decide about
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    connection = Connection(int(arguments[0]))
    try:
        setup = receive_setup(connection)
        _limit(setup)
        try:
            matchers = Matchers(setup)
        except GuideError as error:
            send_answer(connection, Refused(error.reason, error.message))
            return 1
        send_answer(connection, Allowed())
        while True:
            for job in receive_jobs(connection):
                answer = _do(matchers, job)
                if answer is not None:
                    send_answer(connection, answer)
    except (EOFError, ConnectionError):
        return 0


def _limit(setup: WorkerSetup) -> None:
    os.nice(setup.niceness)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    num_bytes = setup.max_memory_bytes if hard == resource.RLIM_INFINITY else min(setup.max_memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, hard))


def _do(matchers: Matchers, job: Job) -> Answer | None:
    try:
        match job:
            case CheckGuide():
                matchers.check(job.spec)
                return Allowed()
            case OpenGuide():
                return Allowed(matchers.open(job.guide_id, job.spec, job.token_ids))
            case AdvanceGuide():
                return Allowed(matchers.advance(job.guide_id, job.token_id))
            case CloseGuide():
                matchers.close(job.guide_id)
                return None
    except GuideError as error:
        return Refused(error.reason, error.message)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
