"""graft.admin.v1.AdapterService on a live server."""

from __future__ import annotations

import grpc
import pytest

from runtime.pb.graft.admin.v1 import adapters_pb2 as pb
from tests.server.live import LiveServer, refused


@pytest.fixture
def other(server: LiveServer) -> pb.Adapter:
    """A second adapter, for one test."""
    request = pb.LoadAdapterRequest(adapter_id="other", source_path="other")
    yield server.adapters.LoadAdapter(request).adapter
    server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="other", allow_missing=True))


def test_a_loaded_adapter_is_described_in_full(other: pb.Adapter) -> None:
    assert other.name == "adapters/other"
    assert other.generation > 1
    assert (other.state, other.placement) == (pb.Adapter.STATE_READY, pb.Adapter.PLACEMENT_DEVICE)
    assert (other.digest, other.source_path, other.base_model) == ("sha256:other", "other", "model")
    assert (other.bytes_device, other.bytes_tensors, other.rank) == (1000, 990, 8)
    assert other.load_time.ToMilliseconds() == 250


def test_loading_the_same_bytes_again_says_so_and_other_bytes_are_a_conflict(server: LiveServer, other: object) -> None:
    again = server.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter_id="other", source_path="other"))
    assert again.already_loaded
    conflict = pb.LoadAdapterRequest(adapter_id="other", source_path="dates")
    code, reason, field = refused(lambda: server.adapters.LoadAdapter(conflict))
    assert (code, reason, field) == (grpc.StatusCode.ALREADY_EXISTS, "ADAPTER_EXISTS", "adapter_id")


def test_a_load_serves_at_once_and_an_unload_ends_that(server: LiveServer) -> None:
    server.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter_id="brief", source_path="other"))
    assert server.generate("abc", "brief").text == "abcabc"
    unloaded = server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="adapters/brief")).adapter
    assert unloaded.state == pb.Adapter.STATE_UNLOADED
    assert refused(lambda: server.generate("abc", "brief"))[1] == "ADAPTER_NOT_FOUND"


def test_adapters_are_listed_by_name_page_by_page(server: LiveServer, other: object) -> None:
    first = server.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=1))
    second = server.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=1, page_token=first.next_page_token))
    assert [adapter.name for adapter in (*first.adapters, *second.adapters)] == ["adapters/dates", "adapters/other"]
    assert second.next_page_token == ""
    assert (first.slots_used, first.slots_total, first.bytes_used, first.bytes_limit) == (2, 64, 2000, 1 << 30)
    server.generate("abc", "other")
    assert server.adapters.ListAdapters(pb.ListAdaptersRequest()).bytes_vacant == 500
    loading = server.adapters.ListAdapters(pb.ListAdaptersRequest(state=pb.Adapter.STATE_LOADING))
    assert not loading.adapters


@pytest.mark.parametrize("name", ["dates", "adapters/dates"])
def test_one_adapter_is_found_by_name_or_by_id(server: LiveServer, name: str) -> None:
    assert server.adapters.GetAdapter(pb.GetAdapterRequest(name=name)).adapter.digest == "sha256:dates"


def test_what_is_not_loaded_is_not_found(server: LiveServer) -> None:
    for call in (
        lambda: server.adapters.GetAdapter(pb.GetAdapterRequest(name="nobody")),
        lambda: server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="nobody")),
    ):
        assert refused(call)[:2] == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
    allowed = server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="nobody", allow_missing=True))
    assert not allowed.HasField("adapter")


def test_a_broken_file_is_refused_with_all_its_problems_and_changes_nothing(server: LiveServer) -> None:
    from google.rpc import error_details_pb2
    from grpc_status import rpc_status

    with pytest.raises(grpc.RpcError) as caught:
        server.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter_id="bad", source_path="broken"))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    failure = error_details_pb2.PreconditionFailure()
    assert any(detail.Unpack(failure) for detail in rpc_status.from_call(caught.value).details)
    assert [v.description for v in failure.violations] == ["broken: layer 3: wrong shape", "layer 4: not finite"]
    assert refused(lambda: server.generate("abc", "bad"))[1] == "ADAPTER_NOT_FOUND"


@pytest.mark.parametrize("path", ["../outside", "/etc", "leads_out", "linked_file"])
def test_a_path_outside_the_root_is_refused(server: LiveServer, path: str) -> None:
    request = pb.LoadAdapterRequest(adapter_id="x", source_path=path)
    expected = (grpc.StatusCode.INVALID_ARGUMENT, "PATH_NOT_ALLOWED", "source_path")
    assert refused(lambda: server.adapters.LoadAdapter(request)) == expected


@pytest.mark.parametrize("adapter_id", ["", "-a", "a/b", "a b", "a\n", "x" * 64, "ä"])
def test_an_id_that_is_no_id_is_refused(server: LiveServer, adapter_id: str) -> None:
    request = pb.LoadAdapterRequest(adapter_id=adapter_id, source_path="dates")
    expected = (grpc.StatusCode.INVALID_ARGUMENT, "ADAPTER_ID_INVALID", "adapter_id")
    assert refused(lambda: server.adapters.LoadAdapter(request)) == expected


def test_another_digest_than_expected_is_refused(server: LiveServer) -> None:
    request = pb.LoadAdapterRequest(adapter_id="x", source_path="other", expected_digest="sha256:zzz")
    code, reason, _ = refused(lambda: server.adapters.LoadAdapter(request))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "DIGEST_MISMATCH")
