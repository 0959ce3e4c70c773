"""`graft adapters ...`, against the admin port of a running server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from google.protobuf import json_format

from runtime.adapters.expression import parse_expression
from runtime.commands.client import DEADLINE_SECONDS, connect
from runtime.errors import InvalidRequest
from runtime.pb.graft.admin.v1 import adapters_pb2 as pb
from runtime.pb.graft.admin.v1.adapters_pb2_grpc import AdapterServiceStub

COLUMNS = ("NAME", "STATE", "PLACE", "GENERATION", "RANK", "EXPERTS", "RUNNING", "DEVICE BYTES", "SOURCE")


def run(options: argparse.Namespace) -> int:
    """Do one action and print its result."""
    with connect(options.admin) as channel:
        lines = _ACTIONS[options.action](AdapterServiceStub(channel), options)
        for line in lines:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
    return 0


def _load(stub: AdapterServiceStub, options: argparse.Namespace) -> Iterator[str]:
    request = pb.LoadAdapterRequest(
        adapter_id=options.name,
        source_path=options.path,
        replace=options.replace,
        expected_generation=options.expected_generation,
        expected_digest=options.expected_digest,
        validate_only=options.validate_only,
        pinned=options.pin,
        lazy=options.lazy,
    )
    response = stub.LoadAdapter(request, timeout=DEADLINE_SECONDS)
    adapter = response.adapter
    if options.validate_only:
        size = f"{adapter.bytes_tensors:,} bytes, rank {adapter.rank}, {adapter.expert_count} expert pages"
        yield f"{options.path} can be loaded: {size}, {adapter.digest}"
    elif options.lazy:
        yield f"{options.name} registered: generation {adapter.generation}"
    else:
        verb = "was already loaded" if response.already_loaded else "loaded"
        yield (
            f"{options.name} {verb}: generation {adapter.generation}, {adapter.bytes_tensors:,} bytes, "
            f"{adapter.load_time.ToMilliseconds() / 1000:.2f} s"
        )
    yield from (f"warning: {warning}" for warning in adapter.warnings)


def _compose(stub: AdapterServiceStub, options: argparse.Namespace) -> Iterator[str]:
    terms = (part.partition("=") for part in options.parts)
    expression = "+".join(f"{weight}*{name}" if sign else name for name, sign, weight in terms)
    parse_expression(expression, "expression")
    request = pb.ComposeAdapterRequest(
        adapter_id=options.name,
        expression=expression,
        replace=options.replace,
        expected_generation=options.expected_generation,
        validate_only=options.validate_only,
        pinned=options.pin,
    )
    response = stub.ComposeAdapter(request, timeout=DEADLINE_SECONDS)
    adapter = response.adapter
    told = f"{_parts(adapter)}: rank {adapter.rank}, {adapter.expert_count} expert pages"
    if options.validate_only:
        yield f"can be made of {told}"
    else:
        verb = "was already made of" if response.already_loaded else "made of"
        yield f"{options.name} {verb} {told}, generation {adapter.generation}"
    yield from (f"warning: {warning}" for warning in adapter.warnings)


def _unload(stub: AdapterServiceStub, options: argparse.Namespace) -> Iterator[str]:
    request = pb.UnloadAdapterRequest(
        name=options.name,
        force=options.force,
        expected_generation=options.expected_generation,
        allow_missing=options.allow_missing,
    )
    if options.drain_timeout is not None:
        request.drain_timeout.FromMilliseconds(int(options.drain_timeout * 1000))
    response = stub.UnloadAdapter(request, timeout=DEADLINE_SECONDS)
    if not response.HasField("adapter"):
        yield f"{options.name}: nothing was loaded"
        return
    freed = f"{response.bytes_device_freed:,} bytes of the device and {response.bytes_host_freed:,} of the host freed"
    yield f"{options.name}: {_state(response.adapter)}, {freed}"


def _list(stub: AdapterServiceStub, options: argparse.Namespace) -> Iterator[str]:
    state = _state_named(options.state)
    request = pb.ListAdaptersRequest(name_prefix=options.prefix, state=state)
    page = stub.ListAdapters(request, timeout=DEADLINE_SECONDS)
    adapters = [*page.adapters]
    while page.next_page_token:
        request.page_token = page.next_page_token
        page = stub.ListAdapters(request, timeout=DEADLINE_SECONDS)
        adapters.extend(page.adapters)
    if options.json:
        yield from (_json(adapter) for adapter in adapters)
        return
    yield from table(COLUMNS, [_row(adapter) for adapter in adapters])
    used = f"{page.bytes_used:,} of {page.bytes_limit:,} bytes on the device"
    host = f"{page.bytes_host_used:,} of {page.bytes_host_limit:,} bytes in host memory"
    yield f"{page.slots_used} of {page.slots_total} slots, {used}, {host}"


def _watch(stub: AdapterServiceStub, options: argparse.Namespace) -> Iterator[str]:
    for response in stub.WatchAdapters(pb.WatchAdaptersRequest()):
        if response.snapshot_complete:
            yield "--"
        else:
            yield "  ".join(_row(response.adapter))


def _pin(stub: AdapterServiceStub, options: argparse.Namespace) -> Iterator[str]:
    stub.PinAdapter(pb.PinAdapterRequest(name=options.name), timeout=DEADLINE_SECONDS)
    yield f"{options.name}: pinned"


def _unpin(stub: AdapterServiceStub, options: argparse.Namespace) -> Iterator[str]:
    stub.UnpinAdapter(pb.UnpinAdapterRequest(name=options.name), timeout=DEADLINE_SECONDS)
    yield f"{options.name}: not pinned"


def _alias(stub: AdapterServiceStub, options: argparse.Namespace) -> Iterator[str]:
    if options.delete and options.alias:
        stub.DeleteAlias(pb.DeleteAliasRequest(alias=options.alias), timeout=DEADLINE_SECONDS)
        yield f"{options.alias}: deleted"
    elif options.name:
        request = pb.SetAliasRequest(alias=options.alias, adapter_id=options.name)
        alias = stub.SetAlias(request, timeout=DEADLINE_SECONDS).alias
        yield f"{alias.alias} -> {alias.adapter_id}"
    elif options.alias or options.delete:
        message = "name the adapter that the alias is to stand for, or --delete"
        raise InvalidRequest(message, reason="INVALID_PARAMETER", field="name")
    else:
        aliases = stub.ListAliases(pb.ListAliasesRequest(), timeout=DEADLINE_SECONDS).aliases
        yield from (f"{alias.alias} -> {alias.adapter_id}" for alias in aliases)


def _show(stub: AdapterServiceStub, options: argparse.Namespace) -> Iterator[str]:
    adapter = stub.GetAdapter(pb.GetAdapterRequest(name=options.name), timeout=DEADLINE_SECONDS).adapter
    rows = [
        ("name", adapter.name.removeprefix("adapters/")),
        ("generation", str(adapter.generation)),
        ("digest", adapter.digest),
        ("state", _state(adapter)),
        ("placement", _place(adapter)),
        ("device slots", ", ".join(map(str, adapter.device_slots)) or "-"),
        ("bytes on device", f"{adapter.bytes_device:,}"),
        ("bytes on host", f"{adapter.bytes_host:,}"),
        ("bytes of its tensors", f"{adapter.bytes_tensors:,}"),
        ("largest rank", str(adapter.rank)),
        ("expert pages", str(adapter.expert_count)),
        ("experts by layer", ", ".join(f"{item.layer}: {item.experts}" for item in adapter.layers) or "-"),
        ("target modules", ", ".join(adapter.target_modules)),
        ("pinned", "yes" if adapter.pinned else "no"),
        ("running requests", str(adapter.inflight_requests)),
        ("loaded", f"{adapter.create_time.ToJsonString()} in {adapter.load_time.ToMilliseconds() / 1000:.2f} s"),
        ("last used", adapter.last_used_time.ToJsonString() if adapter.HasField("last_used_time") else "never"),
        ("source", adapter.source_path or "-"),
        ("sum of", _parts(adapter) or "-"),
    ]
    yield from labelled(rows)
    if adapter.error_message:
        yield f"error: {adapter.error_message}"
    yield from (f"warning: {warning}" for warning in adapter.warnings)


def _row(adapter: pb.Adapter) -> tuple[str, ...]:
    return (
        adapter.name.removeprefix("adapters/"),
        _state(adapter),
        _place(adapter) + (" pinned" if adapter.pinned else ""),
        str(adapter.generation),
        str(adapter.rank),
        str(adapter.expert_count),
        str(adapter.inflight_requests),
        f"{adapter.bytes_device:,}",
        adapter.source_path or _parts(adapter) or "-",
    )


def _parts(adapter: pb.Adapter) -> str:
    return " + ".join(f"{part.weight:.10g}*{part.adapter_id}@{part.generation}" for part in adapter.parts)


def _state(adapter: pb.Adapter) -> str:
    return pb.Adapter.State.Name(adapter.state).removeprefix("STATE_")


def _place(adapter: pb.Adapter) -> str:
    return pb.Adapter.Placement.Name(adapter.placement).removeprefix("PLACEMENT_")


def _state_named(name: str) -> str:
    states = {state.removeprefix("STATE_").lower(): state for state, value in pb.Adapter.State.items() if value}
    if name and name.lower() not in states:
        message = f"state {name!r} is not one of {', '.join(states)}"
        raise InvalidRequest(message, reason="INVALID_PARAMETER", field="state")
    return states[name.lower()] if name else "STATE_UNSPECIFIED"


def _json(adapter: pb.Adapter) -> str:
    text = json_format.MessageToJson(
        adapter, indent=None, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return text.replace("\n", "")


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


_ACTIONS = {
    "load": _load,
    "compose": _compose,
    "unload": _unload,
    "list": _list,
    "show": _show,
    "watch": _watch,
    "pin": _pin,
    "unpin": _unpin,
    "alias": _alias,
}
