"""Reading optimised HLO: literal modules, and what must be counted in them."""

import pytest

from pallas_kernels.h100.hlo import Module

WEIGHT = 1024 * 1024 * 2

COPIES = Module("""\
HloModule jit_f, input_output_alias={ {0}: (1, {}, may-alias), {1}: (2, {}, may-alias) }

%fused_concatenate (p0: bf16[1024,1024], p1: bf16[1024,1024]) -> bf16[1024,2048] {
  %p0 = bf16[1024,1024]{1,0} parameter(0)
  %p1 = bf16[1024,1024]{1,0} parameter(1)
  ROOT %concatenate.1 = bf16[1024,2048]{1,0} concatenate(%p0, %p1), dimensions={1}
}

%fused_update (p0.1: bf16[1024,1024], p1.1: bf16[16,1024], p2: s32[]) -> bf16[1024,1024] {
  %p0.1 = bf16[1024,1024]{1,0} parameter(0)
  %p1.1 = bf16[16,1024]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = bf16[1024,1024]{1,0} dynamic-update-slice(%p0.1, %p1.1, %p2, %zero)
}

%fused_gather (p0.2: bf16[1024,1024], p1.2: s32[8,1]) -> f32[8,1024] {
  %p0.2 = bf16[1024,1024]{1,0} parameter(0)
  %p1.2 = s32[8,1]{1,0} parameter(1)
  %half = bf16[512,1024]{1,0} slice(%p0.2), slice={[0:512], [0:1024]}
  %rows = bf16[8,1024]{1,0} gather(%half, %p1.2), offset_dims={1}, slice_sizes={1,1024}
  ROOT %wide = f32[8,1024]{1,0} convert(%rows)
}

ENTRY %main (w: bf16[1024,1024], k: bf16[1024,1024], v: bf16[1024,1024]) -> bf16[1024,1024] {
  %w = bf16[1024,1024]{1,0} parameter(0)
  %k = bf16[1024,1024]{1,0} parameter(1)
  %v = bf16[1024,1024]{1,0} parameter(2)
  %new = bf16[16,1024]{1,0} parameter(3)
  %at = s32[] parameter(4)
  %ids = s32[8,1]{1,0} parameter(5)
  %joined = bf16[1024,2048]{1,0} fusion(%w, %k), kind=kLoop, calls=%fused_concatenate
  %copy.1 = bf16[1024,1024]{1,0} copy(%v)
  %looked = f32[8,1024]{1,0} fusion(%w, %ids), kind=kLoop, calls=%fused_gather
  %product = (f32[8,1024]{1,0}, s8[4194304]{0}) custom-call(%looked, %w), custom_call_target="__cublas$lt$matmul"
  ROOT %out = bf16[1024,1024]{1,0} fusion(%k, %new, %at), kind=kLoop, calls=%fused_update
}
""")  # noqa: E501


def test_copies_and_concatenations_of_arguments_are_found_and_updates_in_place_are_not():
    assert COPIES.large_copies(WEIGHT) == [
        "joined: bf16[1024,2048] fusion",
        "copy.1: bf16[1024,1024] copy",
    ]
    assert COPIES.large_copies(3 * WEIGHT) == []
    assert COPIES.aliases() == 2


def test_a_widened_weight_is_found():
    assert COPIES.large_floats(2 * 1024 * 1024) == ["joined: bf16[1024,2048] fusion"]
    assert COPIES.large_floats(1024 * 1024)[1:] == ["copy.1: bf16[1024,1024] copy"]


def test_traffic_counts_what_is_touched():
    joined, copied = 4 * WEIGHT, 2 * WEIGHT
    looked = 8 * 1024 * (2 + 4) + 8 * 4  # rows read, rows written, indices
    product = WEIGHT + 2 * 8 * 1024 * 4  # without cuBLAS's scratch memory
    update = 2 * 16 * 1024 * 2 + 4  # rows read, rows written, position
    assert COPIES.moved_bytes() == joined + copied + looked + product + update
    assert COPIES.launches() == 5


LOOP = Module("""\
HloModule jit_g

%body (c: (s32[], f32[64])) -> (s32[], f32[64]) {
  %c = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[64]{0} get-tuple-element(%c), index=1
  %y = f32[64]{0} negate(%x)
  ROOT %next = (s32[], f32[64]{0}) tuple(%i, %y)
}

%condition (c.1: (s32[], f32[64])) -> pred[] {
  %c.1 = (s32[], f32[64]{0}) parameter(0)
  %j = s32[] get-tuple-element(%c.1), index=0
  ROOT %less = pred[] compare(%j, %j), direction=LT
}

%greedy (g: f32[64]) -> f32[64] {
  %g = f32[64]{0} parameter(0)
  ROOT %same = f32[64]{0} abs(%g)
}

%sampled (s: f32[64]) -> f32[64] {
  %s = f32[64]{0} parameter(0)
  %sent = token[] outfeed(%s), outfeed_config=""
  ROOT %other = f32[64]{0} sine(%s)
}

ENTRY %main (start: s32[], x0: f32[64], p: pred[]) -> f32[64] {
  %start = s32[] parameter(0)
  %x0 = f32[64]{0} parameter(1)
  %p = pred[] parameter(2)
  %carry = (s32[], f32[64]{0}) tuple(%start, %x0)
  %loop = (s32[], f32[64]{0}) while(%carry), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %last = f32[64]{0} get-tuple-element(%loop), index=1
  ROOT %end = f32[64]{0} conditional(%p, %last, %last), true_computation=%sampled, false_computation=%greedy
}
""")  # noqa: E501


def test_loops_count_their_trips_and_conditionals_their_false_branch():
    assert LOOP.launches() == 7 * 2 + 1
    assert LOOP.moved_bytes() == 7 * (2 * 64 * 4 + 4 + 4 + 1) + 2 * 64 * 4


def test_a_transfer_to_the_host_is_found_in_any_branch():
    assert LOOP.host_transfers() == ["sent"]


GROUPED = """\
HloModule jit_f, num_partitions={devices}

ENTRY %main (tiles: s32[40], rows: bf16[8,256], weights: bf16[32,256,128]) -> f32[8,128] {
  %tiles = s32[40]{0} parameter(2)
  %rows = bf16[8,256]{1,0} parameter(0)
  %weights = bf16[32,256,128]{2,1,0} parameter(1)
  %out = f32[8,128]{1,0} custom-call(%tiles, %tiles, %tiles, %rows, %weights), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(grouped_matmul_triton)"}
  ROOT %sum = f32[8,128]{1,0} all-reduce(%out), to_apply=%add
}
"""  # noqa: E501


@pytest.mark.parametrize("devices, read", [(1, 8), (4, 2)])
def test_matrices_of_groups_without_rows_are_not_read(devices, read):
    module = Module(GROUPED.replace("{devices}", str(devices)))
    rows, sums, tiles = 8 * 256 * 2 + 8 * 128 * 4, 2 * 8 * 128 * 4, 3 * 40 * 4
    assert module.moved_bytes() == tiles + rows + read * (256 * 128 * 2) + sums
    assert module.exchanged_bytes() == 8 * 128 * 4
