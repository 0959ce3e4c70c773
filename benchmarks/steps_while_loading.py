"""Inter-token latency of 16 running requests while adapters are loaded, replaced or unloaded, one every second.

    python -m benchmarks.steps_while_loading [--tiny] [--rounds N] [--seconds S] [--models DIR] [--results DIR]

A real server, the bench model, adapters of 66 MB. A round begins with 16 new streams over six adapters, and while they
go on, segments without (A) and with operations (B) follow each other: A B A B in one round, B A B A in the next. As
contexts grow, so do steps; over two rounds that is the same for A and B, and ratios are told by the place in the round
too. What does not count: the time before each stream has had its eighth token; the first operations of a segment, so
that as many are under way at its beginning as at its end; and the time that the last ones take beyond it. Gaps are
those between messages at the client, which is this process, and between steps in the engine.

A second that is a multiple of three loads one of three adapters, the next second replaces the one that was loaded three
seconds before that, and the next one unloads the one that was replaced before. So an operation begins every second
however long one takes; only the one before of the same adapter is waited for.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc

from benchmarks import machine
from benchmarks.make_model import DEFAULT_OUT, adapter_dir
from benchmarks.served import Served, models_dir, read_steps, serving, stream_request
from runtime.pb.fmaas.generation_pb2_grpc import GenerationServiceStub

NUM_STREAMS = 16
NUM_USED_ADAPTERS = 6
NUM_WARM_TOKENS = 8
NUM_PROMPT_CHARACTERS = 32
MAX_TOKENS = 4000
ASKED_MEDIAN_RATIO, ASKED_P99_RATIO = 1.05, 1.25
LEAD_SECONDS = 1.5  # of operations before a segment with them counts, which begins between two
SETTLE_SECONDS = 0.5  # an operation's work may go on after its answer
ORDERS = ((False, True, False, True), (True, False, True, False))  # of segments with operations in a round
OPERATIONS = ("load", "replace", "unload")
NUM_CHANGING = len(OPERATIONS)


@dataclass(frozen=True)
class Operation:
    """One change of adapters; times are monotonic seconds."""

    kind: str
    begun: float
    answered: float


class Changes:
    """The operations in their order, and for each adapter the one after the other."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._turns = itertools.count()
        self._locks = [asyncio.Lock() for _ in range(NUM_CHANGING)]
        for turn in (-3, -6):  # what the first turns replace and unload
            self._operate("load", self._index(turn))

    async def next(self, segment: Segment) -> None:
        """One more operation, from now on."""
        turn = next(self._turns)
        kind = OPERATIONS[turn % len(OPERATIONS)]
        index = self._index(turn - NUM_CHANGING * (turn % len(OPERATIONS)))
        begun = time.monotonic()
        async with self._locks[index]:
            await asyncio.to_thread(self._operate, kind, index)
        if begun >= segment.begun:
            segment.operations.append(Operation(kind, begun, time.monotonic()))

    def _index(self, turn: int) -> int:
        return turn // len(OPERATIONS) % NUM_CHANGING

    def _operate(self, kind: str, index: int) -> None:
        """An adapter that no stream uses."""
        name = f"changing-{index}"
        if kind == "unload":
            self._served.unload(name)
        else:
            folder = adapter_dir(self._served.models, NUM_USED_ADAPTERS + (kind == "replace"), "per-expert")
            self._served.load(name, folder, replace=kind == "replace")


@dataclass
class Segment:
    """What one segment gave: (moment, seconds) of each gap at the client, and the span in which steps count."""

    is_loading: bool
    begun: float = 0.0
    ended: float = 0.0
    gaps: list[tuple[float, float]] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)

    def take_gaps(self, moments: Sequence[float]) -> None:
        """Those of one stream, whose messages came at these moments, that lie in the span."""
        pairs = itertools.pairwise(moment for moment in moments if self.begun <= moment <= self.ended)
        self.gaps += [(later, later - earlier) for earlier, later in pairs]


def main() -> None:
    """Command line: see the module's text."""
    arguments = _parse()
    models = models_dir(arguments.models, tiny=arguments.tiny)
    with serving(models, "--max-new-tokens", str(MAX_TOKENS), niceness=arguments.niceness) as served:
        for index in range(NUM_USED_ADAPTERS):
            served.load(f"used-{index}", adapter_dir(models, index, "per-expert"))
        segments = asyncio.run(_measure(served, arguments.rounds, arguments.seconds))
        time.sleep(SETTLE_SECONDS)
        steps_file = served.steps_file
        served.stop()
        steps = read_steps(steps_file)
    report = summarise(segments, steps)
    report |= {"model": "tiny" if arguments.tiny else "0.79 B, bfloat16", "machine": machine.describe()}
    report["niceness"] = arguments.niceness or "as the server chooses"
    text = as_text(report)
    print(text)
    arguments.results.mkdir(parents=True, exist_ok=True)
    stem = arguments.results / ("steps_while_loading_tiny" if arguments.tiny else "steps_while_loading")
    raw = report | {"segments": [asdict(segment) for segment in segments], "steps": steps}
    stem.with_suffix(".json").write_text(json.dumps(raw) + "\n", encoding="utf-8")
    stem.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")


async def _measure(served: Served, num_rounds: int, seconds: float) -> list[Segment]:
    segments: list[Segment] = []
    changes = Changes(served)
    async with grpc.aio.insecure_channel(served.address) as channel:
        for number in range(num_rounds):
            order = ORDERS[number % len(ORDERS)]
            segments += await _round(channel, served, changes, [Segment(is_loading) for is_loading in order], seconds)
            print(f"round {number + 1} of {num_rounds}", flush=True)
    return segments


async def _round(
    channel: grpc.aio.Channel, served: Served, changes: Changes, segments: list[Segment], seconds: float
) -> list[Segment]:
    """The segments one after the other while the same streams go on."""
    warm = asyncio.Semaphore(0)
    moments: list[list[float]] = [[] for _ in range(NUM_STREAMS)]
    streams = [asyncio.create_task(_stream(own, channel, index, warm)) for index, own in enumerate(moments)]
    for _ in streams:
        await asyncio.wait_for(warm.acquire(), 120)
    for segment in segments:
        await _run(segment, changes, seconds)
    if any(stream.done() for stream in streams):
        raise RuntimeError(f"a stream ended before its {MAX_TOKENS} tokens, or had them before the round was over")
    for stream in streams:
        stream.cancel()
    for stream in streams:
        with suppress(asyncio.CancelledError):
            await stream
    for segment in segments:
        for own in moments:
            segment.take_gaps(own)
    await asyncio.to_thread(served.wait_idle)
    return segments


async def _run(segment: Segment, changes: Changes, seconds: float) -> None:
    """One segment; returns when its operations and their work are done."""
    if not segment.is_loading:
        segment.begun = time.monotonic()
        await asyncio.sleep(seconds)
        segment.ended = time.monotonic()
        return
    first = time.monotonic()
    segment.begun = first + LEAD_SECONDS
    segment.ended = segment.begun + seconds
    under_way = []
    for second in itertools.count(1):
        under_way.append(asyncio.create_task(changes.next(segment)))
        if first + second > segment.ended:
            break
        await asyncio.sleep(max(0.0, first + second - time.monotonic()))
    await asyncio.gather(*under_way)
    await asyncio.sleep(SETTLE_SECONDS)


async def _stream(moments: list[float], channel: grpc.aio.Channel, index: int, warm: asyncio.Semaphore) -> None:
    """Read one stream until it is cancelled, and note when its messages come."""
    prompt = "".join(chr(97 + (7 * index + 3 * position) % 26) for position in range(NUM_PROMPT_CHARACTERS))
    stub: Any = GenerationServiceStub(channel)
    request = stream_request(f"used-{index % NUM_USED_ADAPTERS}", prompt, MAX_TOKENS)
    is_warm = False
    async for response in stub.GenerateStream(request):
        moments.append(time.monotonic())
        if not is_warm and response.generated_token_count >= NUM_WARM_TOKENS:
            is_warm = True
            warm.release()


def summarise(segments: Sequence[Segment], steps: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Medians and 99th percentiles with and without operations, their ratios, and what each kind of operation does."""
    report: dict[str, Any] = {}
    for end in ("client", "engine"):
        gaps = {
            is_loading: [
                gap
                for segment in segments
                if segment.is_loading is is_loading
                for _, gap in (segment.gaps if end == "client" else _step_gaps(segment, steps))
            ]
            for is_loading in (False, True)
        }
        report[end] = _compared(gaps[False], gaps[True])
    report["places"] = by_place(segments)
    return report | {"operations": {kind: _about(kind, segments, steps) for kind in OPERATIONS}}


def _compared(without: Sequence[float], during: Sequence[float]) -> dict[str, Any]:
    found = {"without": distribution(without), "with": distribution(during)}
    ratios = {f"{key}_ratio": found["with"][f"{key}_ms"] / found["without"][f"{key}_ms"] for key in ("median", "p99")}
    return found | ratios


def by_place(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """The client's gaps compared for each place in a round that segments of both kinds have had."""
    found = []
    for place in range(len(ORDERS[0])):
        gaps: dict[bool, list[float]] = {False: [], True: []}
        for segment in segments[place :: len(ORDERS[0])]:
            gaps[segment.is_loading] += [gap for _, gap in segment.gaps]
        if gaps[False] and gaps[True]:
            found.append(_compared(gaps[False], gaps[True]))
    return found


def _step_gaps(segment: Segment, steps: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """(moment, seconds since the step before) of the segment's steps."""
    ends = [step[0] for step in steps if segment.begun <= step[0] <= segment.ended]
    return [(later, later - earlier) for earlier, later in itertools.pairwise(ends)]


def _about(kind: str, segments: Sequence[Segment], steps: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Operations of one kind: how long they took, and the steps from their beginning to a moment after their end."""
    operations = [(segment, item) for segment in segments for item in segment.operations if item.kind == kind]
    gaps, adapter_ms = [], []
    for segment, item in operations:
        end = item.answered + SETTLE_SECONDS
        gaps += [gap for moment, gap in _step_gaps(segment, steps) if item.begun <= moment <= end]
        adapter_ms.append(max((1e3 * step[2] for step in steps if item.begun <= step[0] <= end), default=0.0))
    seconds = [item.answered - item.begun for _, item in operations]
    return {
        "count": len(operations),
        "median_seconds": statistics.median(seconds) if seconds else None,
        "steps": distribution(gaps) if gaps else None,
        "worst_adapter_ms_median": statistics.median(adapter_ms) if adapter_ms else None,
    }


def distribution(gaps: Sequence[float]) -> dict[str, float]:
    """Milliseconds; the 99th percentile is the smallest value that 99 % do not exceed."""
    ordered = sorted(gaps)
    return {
        "count": len(ordered),
        "median_ms": 1e3 * statistics.median(ordered),
        "p90_ms": 1e3 * ordered[-(-len(ordered) * 90 // 100) - 1],
        "p99_ms": 1e3 * ordered[-(-len(ordered) * 99 // 100) - 1],
        "max_ms": 1e3 * ordered[-1],
    }


def as_text(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    lines = [f"{NUM_STREAMS} running requests over {NUM_USED_ADAPTERS} adapters; model: {report['model']}"]
    lines += [f"niceness of the process that reads adapters: {report['niceness']}", ""]
    lines.append(f"  {'inter-token latency, ms':<34} {'median':>8} {'p90':>8} {'p99':>8} {'max':>8} {'gaps':>8}")
    for place in ("client", "engine"):
        for name, key in (("no operations", "without"), ("one every second", "with")):
            lines.append(_row(f"{place}, {name}", report[place][key]))
    lines.append("")
    for place in ("client", "engine"):
        median, p99 = report[place]["median_ratio"], report[place]["p99_ratio"]
        asked = f"asked <= {ASKED_MEDIAN_RATIO} and <= {ASKED_P99_RATIO}"
        lines.append(f"  {place}: median {median:.3f}x, p99 {p99:.3f}x   {asked}")
    for key in ("median", "p99"):
        told = ", ".join(f"{place[f'{key}_ratio']:.3f}x" for place in report["places"])
        lines.append(f"  client, {key} at the same place of a round, first to last: {told}")
    lines += ["", "  steps from the beginning of an operation to half a second after its end:"]
    for kind, about in report["operations"].items():
        if about["steps"]:
            worst = about["worst_adapter_ms_median"]
            lines.append(_row(f"{kind} ({about['count']}x, {about['median_seconds']:.2f} s)", about["steps"]))
            lines.append(f"      most that one step did for adapters: {worst:.1f} ms (median over operations)")
    return "\n".join([*lines, "", *(f"  {name}: {value}" for name, value in report["machine"].items())])


def _row(name: str, about: dict[str, float]) -> str:
    numbers = " ".join(f"{about[key]:>8.1f}" for key in ("median_ms", "p90_ms", "p99_ms", "max_ms"))
    return f"  {name:<34} {numbers} {about['count']:>8}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--tiny", action="store_true", help="a small float32 model, to try the script")
    parser.add_argument("--rounds", type=int, default=12, help="of four segments; an even number")
    parser.add_argument("--seconds", type=int, default=6, help="of one segment that count")
    parser.add_argument("--niceness", default="", help="of the process that reads adapters: 0 to 19, or idle")
    arguments = parser.parse_args()
    if arguments.rounds % len(ORDERS):
        parser.error("--rounds must be even: only then both kinds of segments come as late")
    return arguments


if __name__ == "__main__":
    main()
