"""Adapters as the admin API shows them: one resource, and pages of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runtime.adapters.info import AdapterInfo
from runtime.pb.graft.admin.v1 import adapters_pb2 as pb
from runtime.server.paths import display_path
from runtime.server.refusal import invalid

NAME_PREFIX = "adapters/"
DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000


def adapter_resource(info: AdapterInfo, *, root: Path | None, base_model: str) -> pb.Adapter:
    """The message for one generation; paths are shown relative to the adapters root."""
    adapter = pb.Adapter(
        name=NAME_PREFIX + info.name,
        generation=info.generation,
        digest=info.digest,
        state=f"STATE_{info.state}",
        placement=_placement(info),
        device_slots=[info.slot] if info.slot >= 0 else [],
        bytes_host=info.host_bytes,
        bytes_device=info.device_bytes,
        bytes_tensors=info.tensor_bytes,
        rank=info.lora_rank_max,
        target_modules=info.target_modules,
        expert_count=info.num_expert_pages,
        base_model=base_model,
        pinned=info.pinned,
        inflight_requests=info.num_running,
        source_path=display_path(root, info.source_path),
        warnings=info.warnings,
        layers=[pb.Adapter.LayerCoverage(layer=item.layer, experts=item.num_experts) for item in info.layers],
        error_message=info.error,
        parts=[
            pb.Adapter.Part(adapter_id=part.name, generation=part.generation, weight=part.weight) for part in info.parts
        ],
        derived=info.derived,
    )
    if info.last_used:
        adapter.last_used_time.FromMicroseconds(int(info.last_used * 1e6))
    if info.created:
        adapter.create_time.FromMicroseconds(int(info.created * 1e6))
    adapter.load_time.FromMicroseconds(int(info.load_seconds * 1e6))
    return adapter


def page_of(everything: Sequence[AdapterInfo], request: pb.ListAdaptersRequest) -> tuple[list[AdapterInfo], str]:
    """The asked page of what is wanted of `everything`, and the token of the next page, "" after the last."""
    if not 0 <= request.page_size <= MAX_PAGE_SIZE:
        message = f"page_size = {request.page_size} is out of range: 0 (default)..{MAX_PAGE_SIZE}"
        raise invalid("INVALID_PARAMETER", "page_size", message)
    if request.state not in pb.Adapter.State.values():
        message = f"state = {request.state} is not one of {', '.join(pb.Adapter.State.keys())}"
        raise invalid("INVALID_PARAMETER", "state", message)
    state = pb.Adapter.State.Name(request.state).removeprefix("STATE_") if request.state else None
    after = _parse_token(request.page_token)
    wanted = sorted(
        (
            info
            for info in everything
            if _place(info) > after and state in (None, info.state) and info.name.startswith(request.name_prefix)
        ),
        key=_place,
    )
    page = wanted[: request.page_size or DEFAULT_PAGE_SIZE]
    return page, "{}@{}".format(*_place(page[-1])) if len(page) < len(wanted) else ""


def _place(info: AdapterInfo) -> tuple[str, int]:
    return info.name, info.generation


def _parse_token(token: str) -> tuple[str, int]:
    if not token:
        return "", 0
    name, _, generation = token.rpartition("@")
    if not generation.isascii() or not generation.isdigit():
        message = f"page_token {token[:80]!r} was not given by this server"
        raise invalid("INVALID_PARAMETER", "page_token", message)
    return name, int(generation)


def _placement(info: AdapterInfo) -> pb.Adapter.Placement:
    if info.slot >= 0:
        return pb.Adapter.PLACEMENT_DEVICE
    if info.host_bytes:
        return pb.Adapter.PLACEMENT_HOST
    return pb.Adapter.PLACEMENT_DISK if info.state == "REGISTERED" else pb.Adapter.PLACEMENT_UNSPECIFIED
