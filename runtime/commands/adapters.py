"""`graft adapters load|unload|list|show`, against the admin port of a running server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from runtime.commands.client import DEADLINE_SECONDS, connect
from runtime.pb.graft.admin.v1 import adapters_pb2 as pb
from runtime.pb.graft.admin.v1.adapters_pb2_grpc import AdapterServiceStub

COLUMNS = ("NAME", "STATE", "GENERATION", "RANK", "EXPERTS", "RUNNING", "DEVICE BYTES", "SOURCE")


def run(options: argparse.Namespace) -> int:
    """Do one action and print its result."""
    with connect(options.admin) as channel:
        lines = _ACTIONS[options.action](AdapterServiceStub(channel), options)
        for line in lines:
            sys.stdout.write(line + "\n")
    return 0


def _load(stub: AdapterServiceStub, options: argparse.Namespace) -> Iterator[str]:
    request = pb.LoadAdapterRequest(adapter_id=options.name, source_path=options.path)
    response = stub.LoadAdapter(request, timeout=DEADLINE_SECONDS)
    adapter = response.adapter
    verb = "was already loaded" if response.already_loaded else "loaded"
    yield (
        f"{options.name} {verb}: generation {adapter.generation}, {adapter.bytes_tensors:,} bytes, "
        f"{adapter.load_time.ToMilliseconds() / 1000:.2f} s"
    )
    yield from (f"warning: {warning}" for warning in adapter.warnings)


def _unload(stub: AdapterServiceStub, options: argparse.Namespace) -> Iterator[str]:
    adapter = stub.UnloadAdapter(pb.UnloadAdapterRequest(name=options.name), timeout=DEADLINE_SECONDS).adapter
    yield f"{options.name}: {_state(adapter)}, {adapter.inflight_requests} requests still running"


def _list(stub: AdapterServiceStub, options: argparse.Namespace) -> Iterator[str]:
    page = stub.ListAdapters(pb.ListAdaptersRequest(), timeout=DEADLINE_SECONDS)
    adapters = [*page.adapters]
    while page.next_page_token:
        page = stub.ListAdapters(pb.ListAdaptersRequest(page_token=page.next_page_token), timeout=DEADLINE_SECONDS)
        adapters.extend(page.adapters)
    yield from table(COLUMNS, [_row(adapter) for adapter in adapters])
    used = f"{page.bytes_used:,} of {page.bytes_limit:,} bytes on the device"
    yield f"{page.slots_used} of {page.slots_total} slots, {used}"


def _show(stub: AdapterServiceStub, options: argparse.Namespace) -> Iterator[str]:
    adapter = stub.GetAdapter(pb.GetAdapterRequest(name=options.name), timeout=DEADLINE_SECONDS).adapter
    rows = [
        ("name", adapter.name.removeprefix("adapters/")),
        ("generation", str(adapter.generation)),
        ("digest", adapter.digest),
        ("state", _state(adapter)),
        ("placement", pb.Adapter.Placement.Name(adapter.placement).removeprefix("PLACEMENT_")),
        ("device slots", ", ".join(map(str, adapter.device_slots)) or "-"),
        ("bytes on device", f"{adapter.bytes_device:,}"),
        ("bytes on host", f"{adapter.bytes_host:,}"),
        ("bytes of its tensors", f"{adapter.bytes_tensors:,}"),
        ("largest rank", str(adapter.rank)),
        ("expert pages", str(adapter.expert_count)),
        ("target modules", ", ".join(adapter.target_modules)),
        ("running requests", str(adapter.inflight_requests)),
        ("loaded", f"{adapter.create_time.ToJsonString()} in {adapter.load_time.ToMilliseconds() / 1000:.2f} s"),
        ("last used", adapter.last_used_time.ToJsonString() if adapter.HasField("last_used_time") else "never"),
        ("source", adapter.source_path or "-"),
    ]
    yield from labelled(rows)
    yield from (f"warning: {warning}" for warning in adapter.warnings)


def _row(adapter: pb.Adapter) -> tuple[str, ...]:
    return (
        adapter.name.removeprefix("adapters/"),
        _state(adapter),
        str(adapter.generation),
        str(adapter.rank),
        str(adapter.expert_count),
        str(adapter.inflight_requests),
        f"{adapter.bytes_device:,}",
        adapter.source_path or "-",
    )


def _state(adapter: pb.Adapter) -> str:
    return pb.Adapter.State.Name(adapter.state).removeprefix("STATE_")


def labelled(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    """A line for each (label, value), the values below each other."""
    width = max(len(label) for label, _ in rows)
    yield from (f"{label:<{width}}  {value}" for label, value in rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines with aligned columns; cells that look like numbers go to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if all(_is_number(r[column]) for r in rows) and rows else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.rstrip("%").replace(",", "").replace(".", "").isdigit()


_ACTIONS = {"load": _load, "unload": _unload, "list": _list, "show": _show}
