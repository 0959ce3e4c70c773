"""Handing an adapter on disk to a running server, and being sure that it loaded this one."""

from __future__ import annotations

from pathlib import Path

import grpc

from loaders.adapter_folder import folder_digest
from runtime.adapters.expression import ADAPTER_ID
from runtime.commands.client import DEADLINE_SECONDS, as_graft_error
from runtime.errors import GraftError
from runtime.pb.graft.admin.v1 import adapters_pb2 as pb
from runtime.pb.graft.admin.v1.adapters_pb2_grpc import AdapterServiceStub

CHECK_SECONDS = 10.0
# What does not keep a name from being loaded.
_FREE_STATES = (pb.Adapter.STATE_FAILED, pb.Adapter.STATE_DRAINING, pb.Adapter.STATE_UNLOADED)


def check_can_publish(address: str, name: str) -> None:
    """Before a run is trained for it: the name can be one and is free, the server answers. Raises GraftError."""
    if not ADAPTER_ID.fullmatch(name):
        raise GraftError(f"--name {name!r} must match {ADAPTER_ID.pattern}", reason="NOT_PUBLISHED")
    with grpc.insecure_channel(address) as channel:
        request = pb.GetAdapterRequest(name=f"adapters/{name}")
        try:
            adapter = AdapterServiceStub(channel).GetAdapter(request, timeout=CHECK_SECONDS).adapter
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return
            problem = as_graft_error(error, address)
            raise GraftError(
                f"nothing was trained, since it could not be published: {problem}; check --publish and --name",
                reason="NOT_PUBLISHED",
            ) from error
    if adapter.state in _FREE_STATES:
        return
    raise GraftError(
        f"nothing was trained, since the name {name!r} stands for another adapter on {address} (generation "
        f"{adapter.generation}): choose another --name, or: graft adapters unload {name}",
        reason="NOT_PUBLISHED",
    )


def publish(address: str, name: str, folder: Path) -> str:
    """Load `folder` as `name`; the sentence with its generation. Raises GraftError.

    The server takes paths below its adapters root and does not tell where that is, so each end of the folder's path is
    tried, the shortest first; the digest makes sure that what it finds there is this adapter.
    """
    digest = folder_digest(folder)
    parts = folder.resolve().parts[1:]
    with grpc.insecure_channel(address) as channel:
        stub = AdapterServiceStub(channel)
        for start in range(len(parts) - 1, -1, -1):
            path = "/".join(parts[start:])
            request = pb.LoadAdapterRequest(adapter_id=name, source_path=path, expected_digest=digest)
            try:
                adapter = stub.LoadAdapter(request, timeout=DEADLINE_SECONDS).adapter
            except grpc.RpcError as error:
                if start and _is_elsewhere(error):
                    continue
                problem = as_graft_error(error, address)
                raise GraftError(
                    f"{folder} was trained, but not published: {problem}; {_what_to_do(error, name)}",
                    reason="NOT_PUBLISHED",
                    problems=problem.problems,
                ) from error
            return f"{name}: generation {adapter.generation} on {address}, {adapter.digest}"
    raise GraftError(f"{folder} has no path to publish", reason="NOT_PUBLISHED")


def _what_to_do(error: grpc.RpcError, name: str) -> str:
    load = f"graft adapters load {name} PATH"
    if _is_elsewhere(error):
        return f"its folder must lie below the server's adapters root; then: {load}"
    if error.code() is grpc.StatusCode.ALREADY_EXISTS:
        return f"choose another --name, or: graft adapters unload {name}, then {load}"
    return f"when that is mended: {load}"


def _is_elsewhere(error: grpc.RpcError) -> bool:
    """Nothing lies at that path below the root, or another adapter does."""
    return error.code() is grpc.StatusCode.NOT_FOUND or ", expected sha256:" in str(error.details())
