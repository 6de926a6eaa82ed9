"""What `compile` reads from an optimised HLO adds up, and its arithmetic is what can be worked out by hand."""

import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax import cli, flops
from mlm_jax.bench import profile
from mlm_jax.compile import cost, hlo, links
from mlm_jax.compile.chips import CHIPS, TPUS
from mlm_jax.compile.estimate import COLLECTIVES, estimate_step
from mlm_jax.compile.topology import Topology, parse_topology
from mlm_jax.errors import UserError

# As XLA:TPU writes it: a loop over a product and an all-reduce, then an asynchronous all-gather beside a fusion.
TPU_HLO = """HloModule jit_step, is_scheduled=true

%fused (p0: bf16[64,32]) -> bf16[64,64] {
  %p0 = bf16[64,32]{1,0} parameter(0)
  ROOT %convolution.1 = bf16[64,64]{1,0} convolution(%p0, %p0), metadata={op_name="jit(step)/jvp(mlp)/dot_general"}
}

%body (arg: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %arg = (s32[], bf16[64,32]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %fusion.1 = bf16[64,64]{1,0} fusion(%x), kind=kOutput, calls=%fused, backend_config={"estimated_cycles":"1000"}
  %narrow = f32[] constant(0)
  %wide = f32[1000]{0:T(1024)S(1)} broadcast(%narrow), metadata={op_name="jit(step)/embedding/mul"}
  %all-reduce.1 = (f32[1000]{0}, f32[]{:T(128)}) all-reduce(%wide, %narrow), replica_groups=mesh['a'=2,'b'=2] {'b'}
  %counter = s32[] get-tuple-element(%arg), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%counter, %two)
  ROOT %tuple.1 = (s32[], bf16[64,32]{1,0}) tuple(%next, %x)
}

%condition (arg.1: (s32[], bf16[64,32])) -> pred[] {
  %arg.1 = (s32[], bf16[64,32]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(24)
  %index = s32[] get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[] compare(%index, %limit), direction=LT
}

ENTRY %main (param: bf16[64,32]) -> bf16[64,32] {
  %param = bf16[64,32]{1,0} parameter(0)
  %one = s32[] constant(1)
  %start = s32[] copy(%one)
  %first = (s32[], bf16[64,32]{1,0}) tuple(%start, %param)
  %while.1 = (s32[], bf16[64,32]{1,0}) while(%first), condition=%condition, body=%body
  %big = f32[1000000]{0} get-tuple-element(%while.1), index=1
  %gather = (f32[1000000]{0}, f32[4000000]{0}) all-gather-start(%big), replica_groups=[1,4]<=[4], dimensions={0}
  %fusion.2 = f32[8]{0} fusion(%big), metadata={op_name="optimizer/mul"}, backend_config={"estimated_cycles":"15000"}
  %gathered = f32[4000000]{0} all-gather-done(%gather)
  %copied = f32[1000000]{0} copy(%big), metadata={op_name="jit(step)/transpose(jvp(norm))/mul"}
  ROOT %result = bf16[64,32]{1,0} get-tuple-element(%while.1), index=1
}
"""
KERNEL = """  %splash_mha_dkv_x.1 = f32[] custom-call(%q, %k, %v), custom_call_target="tpu_custom_call", attributes={data={
"xprof_metadata":"{\\"use_fused_bwd_kernel\\": false}"
}}, metadata={op_name="jit(step)/transpose(jvp(attention))/attention_core/pallas_call"}
"""


class Device(types.SimpleNamespace):
    """The facts of a TPU device that the arithmetic reads."""

    def __hash__(self) -> int:
        return self.id


def topology_of(generation: str, shape: tuple[int, ...], slices: int = 1) -> Topology:
    kind = {"v5e": "TPU v5 lite", "v5p": "TPU v5"}[generation]
    places = [(piece, *place) for piece in range(slices) for place in np.ndindex(*shape)]
    devices = [
        Device(id=number, slice_index=piece, coords=place, platform="tpu", device_kind=kind)
        for number, (piece, *place) in enumerate(places)
    ]
    return Topology(f"{generation}:test", generation, shape, slices, tuple(devices))


def mesh_of(topology: Topology, **axes: int) -> types.SimpleNamespace:
    devices = np.empty(len(topology.devices), object)
    devices[:] = topology.devices
    return types.SimpleNamespace(
        devices=devices.reshape(tuple(axes.values())), axis_names=tuple(axes), shape=axes, size=devices.size
    )


def test_a_schedule_adds_up():
    topology = topology_of("v5e", (2, 2))
    line = estimate_step(TPU_HLO, mesh_of(topology, data=2, fsdp=2), topology)
    clock = 197e12 / 131_072
    assert line.groups["mlp"] == pytest.approx(12 * 1000 / clock)
    assert line.products["mlp"] == line.groups["mlp"]
    assert line.groups["optimizer"] == pytest.approx(15_000 / clock)
    # A copy reads and writes 4 MB each; of a broadcast to the chip's own memory only the four bytes read are traffic.
    assert line.groups["embedding"] == pytest.approx(12 * 4 / 819e9)
    assert line.groups["norm"] == pytest.approx(8e6 / 819e9)
    assert line.backward["norm"] == line.groups["norm"]
    # 4004 bytes over two chips on one link, there and back: half of it, and a microsecond of latency each way.
    one = 2 * (4004 / 2 / 45e9 + 1e-6)
    # 16 MB among four chips of a square, two links each, behind 15,000 cycles of other work.
    gather = 0.75 * 16e6 / 90e9 + 2e-6
    assert line.groups[COLLECTIVES] == pytest.approx(12 * one + gather - 15_000 / clock)
    assert line.seconds == pytest.approx(sum(line.groups.values()))
    found = {(each.kind, each.axes): (each.bytes, count) for each, count in line.collectives.items()}
    assert found == {("all-reduce", "fsdp"): (4004, 12), ("all-gather", "data×fsdp"): (16_000_000, 1)}


def test_cycles_that_the_compiler_does_not_know_give_way_to_arithmetic():
    """XLA:TPU writes -1, as 64 bits without a sign, for an instruction of GPT-BERT-small in rows of 256."""
    topology = topology_of("v5e", (2, 2))
    unknown = TPU_HLO.replace('"estimated_cycles":"15000"', f'"estimated_cycles":"{2**64 - 1}"')
    line = estimate_step(unknown, mesh_of(topology, data=2, fsdp=2), topology)
    assert line.groups["optimizer"] == pytest.approx((4e6 + 32) / 819e9)  # it reads 4 MB and writes 32 bytes
    assert line.roofline >= line.groups["optimizer"]


@pytest.mark.parametrize("shape", ["2,4,256,64", "2,4,64,256", "8,256,64", "8,64,256"])
def test_a_kernel_counts_its_products_at_the_fill_of_its_head_dimension(shape):
    """Whether the length or a head's numbers come last (as the step has it), and for a row alone, of three dimensions."""
    # 2 rows, 4 heads, 256 positions, 64 numbers a head: four products of 2·256·256·64 each, at half of the peak.
    heads = "".join(f"  %{name} = bf16[{shape}]{{2,1,0}} parameter({i})\n" for i, name in enumerate("qkv"))
    text = f"ENTRY %main (q: bf16[{shape}]) -> f32[] {{\n" + heads + KERNEL + "}\n"
    topology = topology_of("v5e", (2, 2))
    line = estimate_step(text, mesh_of(topology, data=4), topology)
    assert line.groups == {"attention core": pytest.approx(4 * 2 * 4 * 2 * 256 * 256 * 64 / (197e12 / 2))}
    assert line.kernels == line.seconds == line.backward["attention core"]


def test_a_backward_kernel_of_all_three_gradients_has_a_fifth_product():
    """It yields dQ once for each block of keys, in one more dimension; XLA:TPU keeps no other word of it."""
    heads = "".join(f"  %{name} = bf16[2,4,64,256]{{3,2,1,0}} parameter({i})\n" for i, name in enumerate("qkv"))
    three = "(f32[2,256,64], bf16[2,1,4,256,64], bf16[2,4,256,64], bf16[2,4,256,64])"
    topology, seconds = topology_of("v5e", (2, 2)), []
    for result in ("f32[]", three):
        kernel = KERNEL.replace("= f32[] custom-call", f"= {result} custom-call")
        text = f"ENTRY %main (q: bf16[2,4,64,256]) -> {result} {{\n{heads}{kernel}}}\n"
        seconds.append(estimate_step(text, mesh_of(topology, data=4), topology).kernels)
    assert seconds[1] == pytest.approx(seconds[0] * 5 / 4)


def test_a_library_s_product_is_told_to_be_missing():
    text = """ENTRY %main (x: bf16[64,64]) -> bf16[64,64] {
  %x = bf16[64,64]{1,0} parameter(0)
  %hint = bf16[64,64]{1,0} custom-call(%x), custom_call_target="AssumeGatherIndicesInBound"
  ROOT %y = bf16[64,64]{1,0} custom-call(%hint, %x), custom_call_target="__cublas$gemm"
}
"""
    topology = topology_of("v5e", (2, 2))
    line = estimate_step(text, mesh_of(topology, data=4), topology)
    assert dict(line.unknown) == {"products of a library counted as free": 1} and line.seconds == 0


def test_a_kernel_of_a_local_layer_counts_the_blocks_that_it_visits():
    """Of four blocks of keys each block of queries visits at most three, and of each four blocks of queries three."""
    heads = "".join(f"  %{name} = bf16[2,4,256,64]{{3,2,1,0}} parameter({i})\n" for i, name in enumerate("qkv"))
    topology, seconds = topology_of("v5e", (2, 2)), []
    for grid in ("1,4,4", "1,4,3", "1,3,4"):
        visits = f"  %blocks = s8[{grid}]{{2,1,0}} parameter(3)\n"
        kernel = KERNEL.replace("custom-call(%q", "custom-call(%blocks, %blocks, %q")
        text = "ENTRY %main (q: bf16[2,4,256,64]) -> f32[] {\n" + heads + visits + kernel + "}\n"
        seconds.append(estimate_step(text, mesh_of(topology, data=4), topology).kernels)
    assert seconds[0] == pytest.approx(4 * 2 * 4 * 2 * 256 * 256 * 64 / (197e12 / 2))
    assert seconds[1:] == [pytest.approx(0.75 * seconds[0])] * 2


def test_traffic_counts_what_is_sliced_and_updated_and_not_the_whole():
    text = """%fused (a: f32[100,10], b: f32[10], c: s32[]) -> (f32[10], f32[100,10]) {
  %a = f32[100,10]{1,0} parameter(0)
  %b = f32[10]{0} parameter(1)
  %c = s32[] parameter(2)
  %row = f32[1,10]{1,0} dynamic-slice(%a, %c, %c), dynamic_slice_sizes={1,10}
  %one = f32[10]{0} bitcast(%row)
  %sum = f32[10]{0} add(%one, %b)
  %new = f32[1,10]{1,0} bitcast(%sum)
  %whole = f32[100,10]{1,0} dynamic-update-slice(%a, %new, %c, %c)
  ROOT %both = (f32[10]{0}, f32[100,10]{1,0}) tuple(%sum, %whole)
}

ENTRY %main (x: f32[100,10], y: f32[10], z: s32[]) -> (f32[10], f32[100,10]) {
  %x = f32[100,10]{1,0} parameter(0)
  %y = f32[10]{0} parameter(1)
  %z = s32[] parameter(2)
  %lone = f32[1,10]{1,0} dynamic-slice(%x, %z, %z), dynamic_slice_sizes={1,10}
  ROOT %f = (f32[10]{0}, f32[100,10]{1,0}) fusion(%x, %y, %z), kind=kLoop, calls=%fused
}
"""
    module = hlo.parse_module(text)
    main = module.by_name("main")
    # Read: a row of ten, ten more and an index; written: ten, and a row of ten in place.
    assert cost.traffic(main["f"], module) == 4 * (10 + 10 + 1) + 4 * (10 + 10)
    assert cost.traffic(main["lone"], module) == 2 * 4 * 10


def test_on_a_gpu_products_and_traffic_bound_the_time():
    text = """%gemm (a: bf16[4096,1024], b: bf16[1024,2048]) -> bf16[4096,2048] {
  %a = bf16[4096,1024]{1,0} parameter(0)
  %b = bf16[1024,2048]{1,0} parameter(1)
  ROOT %dot.1 = bf16[4096,2048]{1,0} dot(%a, %b), lhs_contracting_dims={1}, metadata={op_name="jvp(mlp)/dot_general"}
}

ENTRY %main (x: bf16[4096,1024], w: bf16[1024,2048], m: pred[8,1,512,512]) -> bf16[8,512,12,64] {
  %x = bf16[4096,1024]{1,0} parameter(0)
  %w = bf16[1024,2048]{1,0} parameter(1)
  %m = pred[8,1,512,512]{3,2,1,0} parameter(2)
  %gemm.1 = bf16[4096,2048]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm
  %q = bf16[8,512,12,64]{3,2,1,0} bitcast(%x)
  %core = (bf16[8,512,12,64]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q, %m), \
custom_call_target="__cudnn$fmhaScaleBiasSoftmax", metadata={op_name="jvp(attention)/attention_core/x"}
  %all-reduce-start.1 = bf16[4096,1024]{1,0} all-reduce-start(%x), replica_groups=[1,16]<=[16]
  ROOT %all-reduce-done.1 = bf16[4096,1024]{1,0} all-reduce-done(%all-reduce-start.1)
}
""".replace("\\\n", "")
    devices = tuple(Device(id=number, platform="gpu", device_kind="NVIDIA H200") for number in range(16))
    topology = Topology("h200:2x8", "h200", (), 2, devices)
    line = estimate_step(text, mesh_of(topology, data=16), topology)
    assert line.groups["mlp"] == pytest.approx(2 * 4096 * 1024 * 2048 / 989e12)
    assert line.groups["attention core"] == line.kernels == pytest.approx(2 * 2 * 8 * 12 * 512 * 512 * 64 / 989e12)
    # 8 MB on 450 GB/s within a host of eight, then an eighth of it to the other host and back.
    size = 2 * 4096 * 1024
    assert line.groups[COLLECTIVES] == pytest.approx(2 * size * 7 / 8 / 450e9 + size / 8 / 50e9)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=1] {'b','c'}, use_global_device_ids=true", [[0, 1], [2, 3]]),
        ("channel_id=1", [[0, 1, 2, 3]]),
    ],
)
def test_replica_groups_in_every_notation(text, groups):
    assert hlo.replica_groups(text, 4) == groups


def test_array_bytes():
    assert hlo.array_bytes("(s32[], bf16[2,3]{1,0:T(8,128)(2,1)}, pred[5]{0}, u16[7]{0})") == 4 + 12 + 5 + 14
    assert hlo.array_bytes("(f32[4]{0:T(128)S(1)}, f32[2]{0})", of_main_memory=True) == 8


def test_the_loops_and_collectives_of_a_program_that_runs():
    """What XLA writes for 8 devices of the CPU is read too: 5 steps of a scan, each with an all-reduce over one axis."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)

    def step(x):
        def body(carry, _):
            square = jnp.einsum("bi,bj->ij", carry, carry, out_sharding=jax.P(None, None))
            return carry @ square, None

        return jax.lax.scan(body, x, None, length=5)[0]

    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((8, 16), np.float32, sharding=jax.NamedSharding(mesh, jax.P("data", None)))
        text = jax.jit(step).lower(x).compile().as_text()
    module = hlo.parse_module(text)
    loops = [one for body in module.computations.values() for one in body if one.opcode == "while"]
    assert [hlo.trip_count(module, loop) for loop in loops] == [5]
    reduces = [one for one in module.computations[loops[0].attribute("body")] if one.opcode == "all-reduce"]
    assert [links.axes_of(hlo.replica_groups(one.attributes, 8), mesh) for one in reduces] == ["data"]
    assert set(profile.parse_hlo(text)) >= {one.name for body in module.computations.values() for one in body}


def test_links_of_a_ring_a_line_and_between_slices():
    def seconds(topology, kind="all-reduce", size=1_000_000_000, **axes):
        mesh = mesh_of(topology, **axes)
        return links._seconds(kind, size, range(mesh.size), mesh, topology)

    line = seconds(topology_of("v5e", (4, 4)), data=16)
    ring = seconds(topology_of("v5e", (16, 16)), data=256)
    # Twice the bytes pass in either; a closed dimension has two links into each chip where an open one has one.
    assert line == pytest.approx(2 * (1e9 * 15 / 16 / 90e9 + 6e-6))
    assert ring == pytest.approx(2 * (1e9 * 255 / 256 / 180e9 + 16e-6))
    assert seconds(topology_of("v5e", (4, 4)), "all-gather", data=16) == pytest.approx(line / 2)
    # Between two slices each chip sends and receives half of its sixteenth, twice.
    both = seconds(topology_of("v5e", (4, 4), slices=2), data=32)
    assert both == pytest.approx(line + 1e9 / 16 / CHIPS["v5e"].dcn_bytes_per_second)


def test_what_passes_between_slices_takes_the_hosts_network():
    text = """ENTRY %main (x: f32[1024,8]) -> f32[1024,8] {
  %x = f32[1024,8]{1,0} parameter(0)
  %t = token[] after-all()
  %send = (f32[1024,8]{1,0}, u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true
  %recv = (f32[1024,8]{1,0}, u32[], token[]) recv(%t), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %received = (f32[1024,8]{1,0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %y = f32[1024,8]{1,0} get-tuple-element(%received), index=0
}
"""
    topology = topology_of("v5e", (2, 2), slices=4)
    line = estimate_step(text, mesh_of(topology, slice=4, data=4), topology)
    assert [(each.kind, each.axes, each.bytes) for each in line.collectives] == [("all-reduce", "slice", 32_768)]
    assert line.seconds == line.groups[COLLECTIVES] == pytest.approx(2 * 0.75 * 32_768 / 3.125e9)


FUSED_HLO = """%start (p: bf16[128,64]) -> (bf16[128,64], bf16[1024,64]) {
  %p = bf16[128,64]{1,0} parameter(0)
  %gather.1 = bf16[1024,64]{1,0} all-gather(%p), channel_id=6, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %s = (bf16[128,64]{1,0}, bf16[1024,64]{1,0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%along (q: bf16[128,64]) -> bf16[64,64] {
  %q = bf16[128,64]{1,0} parameter(0)
  %gather.2 = bf16[1024,64]{1,0} all-gather(%q), channel_id=6, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %dot = bf16[64,64]{1,0} convolution(%q, %q), metadata={op_name="jvp(mlp)/dot_general"}
}

%done (r: bf16[128,64]) -> bf16[1024,64] {
  %r = bf16[128,64]{1,0} parameter(0)
  %gather.3 = bf16[1024,64]{1,0} all-gather(%r), channel_id=6, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %d = bf16[1024,64]{1,0} custom-call(%gather.3), custom_call_target="AsyncCollectiveDone"
}

%scatter (t: f32[4096]) -> f32[1024] {
  %t = f32[4096]{0} parameter(0)
  %sum = f32[4096]{0} all-reduce(%t), channel_id=7, replica_groups=[1,4]<=[4]
  %i = s32[] constant(0)
  ROOT %part = f32[1024]{0} dynamic-slice(%sum, %i), dynamic_slice_sizes={1024}
}

ENTRY %main (x: bf16[128,64], y: f32[4096]) -> bf16[1024,64] {
  %x = bf16[128,64]{1,0} parameter(0)
  %y = f32[4096]{0} parameter(1)
  %async-collective-start = (bf16[128,64]{1,0}, bf16[1024,64]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %part.1 = bf16[128,64]{1,0} get-tuple-element(%async-collective-start), index=0
  %fusion.1 = bf16[64,64]{1,0} fusion(%part.1), kind=kOutput, calls=%along, backend_config={"estimated_cycles":"CYCLES"}
  %async-collective-done = bf16[1024,64]{1,0} fusion(%part.1), kind=kCustom, calls=%done
  %all-reduce-scatter = f32[1024]{0} fusion(%y), kind=kCustom, calls=%scatter
  ROOT %copy = bf16[1024,64]{1,0} bitcast(%async-collective-done)
}
"""


@pytest.mark.parametrize("cycles", [300, 30_000])
def test_fused_collectives_run_beside_the_computations_that_carry_them(cycles):
    topology = topology_of("v5e", (2, 2))
    line = estimate_step(FUSED_HLO.replace("CYCLES", str(cycles)), mesh_of(topology, data=4), topology)
    # Four devices: 64 kB of which each has a quarter; then 16 kB, added up and divided. Two links each, two hops.
    gather = 0.75 * 4 * 128 * 64 * 2 / 90e9 + 2e-6
    scatter = 0.75 * 4 * 4096 / 90e9 + 2e-6
    compute = cycles * 131_072 / 197e12
    assert line.groups["mlp"] == pytest.approx(compute)
    assert line.seconds == pytest.approx(max(gather, compute) + scatter)
    assert {each.kind: each.bytes for each in line.collectives} == {"all-gather": 4 * 128 * 64 * 2, "reduce-scatter": 16_384}


def test_permutations_take_their_longest_way_and_opposite_ones_do_not_delay_each_other():
    topology = topology_of("v5e", (4, 4))
    mesh = mesh_of(topology, data=4, fsdp=4)
    text = """ENTRY %main (x: f32[1000000]) -> f32[1000000] {
  %x = f32[1000000]{0} parameter(0)
  %right = (f32[1000000]{0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %left = (f32[1000000]{0}) collective-permute-start(%x), source_target_pairs={{1,0},{2,1}}
  %again = (f32[1000000]{0}) collective-permute-start(%x), source_target_pairs={{1,0},{2,1}}
  %a = f32[1000000]{0} collective-permute-done(%right)
  %b = f32[1000000]{0} collective-permute-done(%left)
  ROOT %c = f32[1000000]{0} collective-permute-done(%again)
}
"""
    line = estimate_step(text, mesh, topology)
    step = 4e6 / 45e9 + 1e-6
    assert line.seconds == pytest.approx(2 * step)
    assert {(each.axes, count): each.seconds for each, count in line.collectives.items()} == {
        ("fsdp", 1): pytest.approx(step + 2e-6),  # a line of four: three hops back to its start
        ("fsdp", 2): pytest.approx(step),
    }


def test_clocks_follow_from_the_peaks():
    clocks = {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
    for generation, chip in TPUS.items():
        peak = flops.device_peak_flops(Device(id=0, platform="tpu", device_kind=kinds[generation]))
        assert peak / chip.flops_per_cycle == pytest.approx(clocks[generation] * 1e9, rel=0.01)


def test_names_of_topologies():
    assert parse_topology("v5e:16x16") == ("v5e", (16, 16), 1)
    assert parse_topology("2x v5e:16x16") == parse_topology("v5e:16x16", 2) == ("v5e", (16, 16), 2)


@pytest.mark.parametrize("name", ["v5e-16", "v5e", "v9:2x2", "v5e:", "0x v5e:2x2", "v5e:0x4", "h200:8", "2x h200:1x8", ""])
def test_a_topology_that_does_not_exist_is_refused_with_examples(name):
    with pytest.raises(UserError, match=r"v5e:4x4|h200:2x8"):
        parse_topology(name)


def test_slices_are_given_once():
    with pytest.raises(UserError, match="leave one out"):
        parse_topology("2x v5e:2x2", 4)


def test_the_environment_is_set_before_jax_is_imported():
    code = "import sys, mlm_jax.cli, mlm_jax.config, mlm_jax.compile.topology; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_stage_that_does_not_exist_ends_with_status_2(capsys):
    assert cli.main(["compile", "--config", "configs/smoke.py", "--topology", "v5e:2x2", "--stage", "7"]) == 2
    assert "--stage=7: smoke has 1 stage(s)" in capsys.readouterr().err
