"""What the bench records of each launch: operator, inputs, bytes and operations, on CPU and on meta tensors."""

from __future__ import annotations

import torch
import torch_npu

from tests.npu import bench


def test_a_grouped_product_reads_the_weights_of_groups_that_have_rows_only() -> None:
    x, weight = torch.randn(8, 16), torch.randn(4, 16, 32)
    before = bench.calls["npu_grouped_matmul"]
    with bench.record() as launches:
        torch_npu.npu_grouped_matmul([x], [weight], group_list=torch.tensor([2, 0, 4, 0]), group_list_type=1,
                                     group_type=0, split_item=2)
    (launch,) = launches
    assert bench.calls["npu_grouped_matmul"] == before + 1
    assert launch.operator == "npu_grouped_matmul"
    assert launch.inputs == (((8, 16), torch.float32), ((4, 16, 32), torch.float32), ((4,), torch.int64))
    assert launch.bytes_read == (6 * 16 + 2 * 16 * 32) * 4 + 4 * 8
    assert launch.bytes_written == 6 * 32 * 4
    assert launch.flops == 2 * 6 * 16 * 32


def test_meta_tensors_are_recorded_without_running_a_kernel() -> None:
    x, gamma = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((3, 7168), (7168,)))
    before = bench.calls["npu_rms_norm"]
    with bench.record() as launches:
        torch_npu.npu_rms_norm(x, gamma)
    assert [launch.operator for launch in launches] == ["npu_rms_norm"]
    assert launches[0].bytes_read == 4 * 7168 * 2 and launches[0].bytes_written == 3 * 7168 * 2 + 3 * 4
    assert bench.calls["npu_rms_norm"] == before


def test_pytorchs_own_launches_are_recorded_on_demand_without_views() -> None:
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    with bench.record(all_operators=True) as launches:
        y = torch.nn.functional.linear(x, weight).view(2, 6) + 1
        torch_npu.npu_swiglu(y)
    assert [launch.operator for launch in launches] == ["aten.mm", "aten.add", "npu_swiglu"]
    assert launches[0].flops == 2 * 3 * 8 * 4


def test_what_inference_mode_leaves_whole_is_recorded_by_its_parts() -> None:
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    with torch.inference_mode(), bench.record(all_operators=True) as launches:
        torch.nn.functional.linear(x, weight).contiguous()
    assert [(launch.operator, launch.flops) for launch in launches] == [("aten.mm", 2 * 3 * 8 * 4)]


def test_rows_of_a_table_are_read_not_the_table() -> None:
    table, index = torch.zeros(1000, 64), torch.tensor([4, 7])
    with bench.record(all_operators=True) as launches:
        table.index_select(0, index)
        torch.nn.functional.embedding(index, table)
        table[index]
    assert [(launch.bytes_read, launch.bytes_written) for launch in launches] == [(2 * 64 * 4 + 2 * 8, 2 * 64 * 4)] * 3


def test_decode_reads_each_sequences_latents_once_for_all_heads() -> None:
    latents, ropes = torch.zeros(4, 1, 16, 512).bfloat16(), torch.zeros(4, 1, 16, 64).bfloat16()
    query, rope = torch.zeros(2, 8, 512).bfloat16(), torch.zeros(2, 8, 64).bfloat16()
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    with bench.record() as launches:
        torch_npu.npu_fused_infer_attention_score(
            query, latents, latents, query_rope=rope, key_rope=ropes, block_table=table, block_size=16, num_heads=8,
            num_key_value_heads=1, actual_seq_lengths=[1, 2], actual_seq_lengths_kv=[5, 20], input_layout="TND",
        )
    own = 2 * 8 * 576 * 2 + 4 * 4
    assert launches[0].bytes_read == own + 25 * 576 * 2
    assert launches[0].flops == 2 * 8 * 25 * (576 + 512)


def test_writing_the_cache_moves_the_new_rows_not_the_cache() -> None:
    cache, rows = torch.zeros(1000, 64), torch.ones(2, 64)
    with bench.record() as launches:
        torch_npu.npu_scatter_nd_update_(cache, torch.tensor([[4], [7]]), rows)
    assert launches[0].bytes_written == 2 * 64 * 4 and launches[0].bytes_read == 2 * 64 * 4 + 2 * 8


def test_a_causal_prefill_counts_the_pairs_below_the_diagonal() -> None:
    parts = [torch.zeros(5, 2, 128).bfloat16() for _ in range(3)]
    mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    ropes = torch.zeros(5, 2, 64).bfloat16()
    with bench.record() as launches:
        torch_npu.npu_fused_infer_attention_score(
            *parts, query_rope=ropes, key_rope=ropes, num_heads=2, num_key_value_heads=2, sparse_mode=3,
            atten_mask=mask, actual_seq_lengths=[2, 5], actual_seq_lengths_kv=[2, 5], input_layout="TND",
        )
    assert launches[0].flops == 2 * 2 * (3 + 6) * (192 + 128)
