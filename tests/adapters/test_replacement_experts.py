"""ESFT adapters in a store: room for their experts, who leaves for whom, refusals with the numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loaders.replacement_experts import load_replacement_experts, most_experts_of_a_layer
from runtime.adapters.host_adapter import new_pages
from runtime.adapters.info import AdapterInfo, AdapterState
from runtime.adapters.replacement_experts import SpareRoom, read_replacement
from runtime.errors import Exhausted, GraftError, Precondition
from runtime.models.deepseek.config import DeepseekConfig
from runtime.models.deepseek.moe import ExpertGroups
from tests.adapters.conftest import MakeStore, StoreDriver
from tests.oracle.replacement_experts import RandomReplacement, moe_layers, write_replacement

Files = dict[str, Path]
Esft = dict[str, RandomReplacement]


@pytest.fixture(scope="session")
def esft(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Esft:
    """Three adapters of two experts in every layer, and one of five in the last layer."""
    folder = tmp_path_factory.mktemp("esft")
    layers = moe_layers(base_dir)
    chosen = {name: {layer: [number, 9] for layer in layers} for number, name in enumerate(("two-a", "two-b", "two-c"))}
    chosen["five"] = {layers[-1]: [1, 3, 5, 7, 11]}
    return {
        name: write_replacement(base_dir, folder / name, experts, seed=seed)
        for seed, (name, experts) in enumerate(chosen.items())
    }


def _load(store: StoreDriver, esft: Esft, *names: str, **options: object) -> None:
    for name in names:
        info = store.load(name, esft[name].path, **options)
        assert isinstance(info, AdapterInfo), info


def _refusal(answer: AdapterInfo | GraftError) -> GraftError:
    assert isinstance(answer, GraftError), answer
    return answer


def test_without_room_one_is_refused_with_the_setting_that_makes_room(make: MakeStore, esft: Esft) -> None:
    refused = _refusal(make().load("two-a", esft["two-a"].path))
    assert isinstance(refused, Precondition) and refused.reason == "ADAPTER_REFUSED"
    assert "has room for none in a layer: start it with --replacement-experts 2 or more" in refused.message


def test_one_that_needs_more_than_the_room_is_refused_with_the_numbers(
    make: MakeStore, esft: Esft, base_dir: Path
) -> None:
    store = make(replacement_experts=4)
    message = _refusal(store.load("five", esft["five"].path)).message
    layer = moe_layers(base_dir)[-1]
    assert f"replaces 5 experts of layer {layer}, and this server has room for 4 in a layer" in message
    assert store.store.infos() == [] and store.store.pages.num_bytes == 0
    assert most_experts_of_a_layer(esft["five"].path) == 5


def test_it_takes_the_bytes_of_its_own_weights_in_both_tiers_and_gives_them_back(make: MakeStore, esft: Esft) -> None:
    store = make(replacement_experts=5)
    _load(store, esft, "two-a", "five")
    for name in ("two-a", "five"):
        store.use(name)
        info = store.store.info(name)
        assert (info.device_bytes, info.host_bytes, info.tensor_bytes) == (esft[name].num_bytes,) * 3
    assert store.store.pages.num_bytes == esft["five"].num_bytes  # the other had to leave for it
    store.unload("five")
    (gone,) = store.wait()
    assert isinstance(gone, AdapterInfo) and gone.state is AdapterState.UNLOADED
    assert (gone.freed_device_bytes, gone.freed_host_bytes) == (esft["five"].num_bytes,) * 2
    assert store.store.pages.num_bytes == 0


def test_for_experts_those_leave_that_hold_experts_and_no_lora_adapter(
    make: MakeStore, esft: Esft, files: Files
) -> None:
    store = make(replacement_experts=4)
    for name in ("one", "two"):
        store.load(name, files[name])
    _load(store, esft, "two-a", "two-b", "two-c")
    assert store.on_device() == {"one", "two", "two-a", "two-b"}
    store.use("two-c")
    assert store.on_device() == {"one", "two", "two-b", "two-c"}
    store.use("one")
    store.use("two-a")
    assert store.on_device() == {"one", "two", "two-c", "two-a"}


def test_for_a_slot_the_least_recently_used_one_leaves_of_either_kind(
    make: MakeStore, esft: Esft, files: Files
) -> None:
    store = make(replacement_experts=6, max_adapters=2)
    _load(store, esft, "two-a")
    store.load("one", files["one"])
    assert store.on_device() == {"two-a", "one"}
    store.load("two", files["two"])
    store.use("two")
    assert store.on_device() == {"one", "two"}
    _load(store, esft, "two-b")
    store.use("two-b")
    assert store.on_device() == {"two", "two-b"}


def test_experts_take_nothing_of_the_memory_for_lora_pages(make: MakeStore, esft: Esft, files: Files) -> None:
    lora = make().load("one", files["one"])
    assert isinstance(lora, AdapterInfo)
    store = make(replacement_experts=5, max_bytes=lora.device_bytes)
    store.load("one", files["one"])
    _load(store, esft, "two-a")
    assert store.on_device() == {"one", "two-a"}
    assert store.store.pages.num_bytes == lora.device_bytes + esft["two-a"].num_bytes


def test_who_waits_for_experts_keeps_no_lora_adapter_waiting(make: MakeStore, esft: Esft, files: Files) -> None:
    store = make(replacement_experts=2)
    _load(store, esft, "two-a", "two-b")
    store.load("one", files["one"], lazy=True)
    held = store.store.acquire("two-a")
    store.until(lambda: held.is_resident)
    waiting, other = store.store.acquire("two-b"), store.store.acquire("one")
    store.until(lambda: other.is_resident)
    assert not waiting.is_resident and store.store.waits_for_place(waiting)
    message = store.store.no_place(waiting, 3.0).message
    assert "2 experts a layer: raise --replacement-experts" in message
    store.store.release(held)
    store.until(lambda: waiting.is_resident)


def test_those_that_wait_for_pinned_experts_do_not_keep_lora_adapters_from_taking_turns(
    make: MakeStore, esft: Esft, files: Files
) -> None:
    store = make(replacement_experts=2, max_adapters=2, cycle_seconds=0.0)
    _load(store, esft, "two-a", pinned=True)
    _load(store, esft, "two-b")
    for name in ("one", "two"):
        store.load(name, files[name])
    running = store.store.acquire("one")
    store.until(lambda: running.is_resident)
    running.has_run, running.num_running = True, 1
    never, turn = store.store.acquire("two-b"), store.store.acquire("two")
    store.until(lambda: running.is_yielding)
    running.num_running = 0
    store.until(lambda: turn.is_resident)
    assert not never.is_resident and store.on_device() == {"two-a", "two"}


def test_as_many_yield_as_it_takes_and_only_those_that_hold_experts(make: MakeStore, esft: Esft, files: Files) -> None:
    """Two that are in use have to leave for one; the LoRA adapter, in use for longest, is left alone."""
    store = make(replacement_experts=5, cycle_seconds=0.0)
    store.load("one", files["one"])
    _load(store, esft, "two-a", "two-b", "five")
    held = {name: store.store.acquire(name) for name in ("one", "two-a", "two-b")}
    store.until(lambda: all(record.is_resident for record in held.values()))
    for record in held.values():
        record.has_run, record.num_running = True, 1
    waiting = store.store.acquire("five")
    for _ in range(5):
        store.store.advance(whole=True)
    assert {name for name, record in held.items() if record.is_yielding} == {"two-a", "two-b"}
    for record in held.values():
        record.num_running = 0
    store.until(lambda: waiting.is_resident)
    assert store.on_device() == {"one", "five"}


def test_pins_leave_together_no_layer_short(make: MakeStore, esft: Esft) -> None:
    store = make(replacement_experts=3)
    _load(store, esft, "two-a", pinned=True)
    _load(store, esft, "two-b")
    refused = _refusal(store.pin("two-b"))
    assert isinstance(refused, Exhausted) and refused.reason == "PINS_FULL"
    assert "would replace 4 experts of layer 1, and there is room for 3" in refused.message


def test_two_that_come_at_once_do_not_get_the_same_room(make: MakeStore, esft: Esft) -> None:
    store = make(replacement_experts=4)
    for name in ("two-a", "two-b", "two-c"):
        store.start(name, esft[name].path)
    assert all(isinstance(answer, AdapterInfo) for answer in store.wait(3))
    assert len(store.on_device()) == 2
    table = store.store.pages.spare.groups_of(1, {0, 1})
    assert table is not None
    brought = table[table >= 16].tolist()
    assert sorted(brought) == [16, 17, 18, 19]


def test_a_copy_that_fails_gives_its_room_back(make: MakeStore, esft: Esft, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(replacement_experts=2)

    def fail(*_: object) -> object:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("runtime.adapters.spare_experts._SpareLayer.install", fail)
        refused = _refusal(store.load("two-a", esft["two-a"].path))
    assert isinstance(refused, Exhausted) and refused.reason == "DEVICE_MEMORY_FULL"
    assert store.store.pages.num_bytes == 0 and store.store.infos() == []
    _load(store, esft, "two-a")
    assert store.on_device() == {"two-a"}


def test_weights_that_overflow_the_devices_type_are_refused(make: MakeStore, base_dir: Path, tmp_path: Path) -> None:
    huge = write_replacement(base_dir, tmp_path / "huge", {1: [0], 2: [3]}, gain=1e6)
    problems = _refusal(make(replacement_experts=1, dtype=torch.float16).load("huge", huge.path)).problems
    assert problems == ("layer 1: weights overflow float16", "layer 2: weights overflow float16")


def test_files_beyond_twice_the_room_are_not_read(make: MakeStore, esft: Esft, base_dir: Path, tmp_path: Path) -> None:
    """However few experts the configuration names."""
    path = write_replacement(base_dir, tmp_path / "padded", {1: [0]}).path
    save_file({"model.norm.weight": torch.zeros(5 * 10**6)}, path / "more.safetensors")
    refused = _refusal(make(replacement_experts=1).load("padded", path))
    assert "bytes of weights, at most" in refused.message


def test_one_that_left_host_memory_is_read_again_and_other_files_are_refused(
    make: MakeStore, esft: Esft, base_dir: Path, tmp_path: Path
) -> None:
    path = write_replacement(base_dir, tmp_path / "own", {1: [0, 1]}, seed=3).path
    store = make(replacement_experts=2, max_host_bytes=esft["two-a"].num_bytes)
    store.load("own", path)
    _load(store, esft, "two-a")
    store.use("two-a")
    assert store.in_host_memory() == {"two-a"}
    store.use("own")
    assert store.on_device() == {"own"}
    store.use("two-a")
    (path / "expert_cfg.json").write_text(json.dumps({"experts": {"1": [0, 1]}}))
    record = store.store.acquire("own")
    store.until(lambda: bool(store.store.memory.failures))
    ((failed, error),) = store.store.take_failures()
    assert failed is record and error.reason == "ADAPTER_FILES_CHANGED"


@pytest.mark.parametrize(("hidden_columns", "width_columns"), [(64, 80), (16, 8)])
def test_experts_lie_on_the_device_as_the_bases_own_do(
    esft: Esft, base_dir: Path, hidden_columns: int, width_columns: int
) -> None:
    """Against the product with the weights on disk, by the definition of panels."""
    targets = DeepseekConfig.from_dir(base_dir).adapter_targets()
    room = SpareRoom(5, 2**20, width_columns, hidden_columns)
    _, layers = read_replacement(esft["two-b"].path, targets, room, torch.float32, new_pages)
    stored = load_replacement_experts(esft["two-b"].path, targets).experts
    x = torch.randn(3, 64)
    for layer, replacement in layers.items():
        assert replacement.experts == [1, 9]
        for place, expert in enumerate(replacement.experts):
            own = stored[layer][expert]
            gate_up = _product(x, replacement.groups, place, "w13")
            assert torch.allclose(gate_up, torch.cat((x @ own.gate.T, x @ own.up.T), dim=1), atol=1e-5)
            inner = gate_up[:, :40]
            down = _product(inner, replacement.groups, place, "w2")
            assert torch.allclose(down, inner @ own.down.T, atol=1e-5)


def _product(x: torch.Tensor, groups: ExpertGroups, place: int, name: str) -> torch.Tensor:
    panels: torch.Tensor = getattr(groups, name)[place]
    return torch.cat([x @ panel for panel in panels], dim=1)
