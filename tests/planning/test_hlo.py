"""The parser of HLO text and the costs that follow from it, on programs written by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from starflow2_jax.planning import cost, hlo

TEXT = """HloModule small, is_scheduled=true

%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %n = s32[]{:T(128)} constant(7)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={op_name="while/cond, }"}
}

%start (x: f32[4]) -> (f32[4], f32[8]) {
  %x = f32[4]{0} parameter(0)
  %g1 = f32[8]{0} all-gather(%x), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %s = (f32[4]{0}, f32[8]{0}) custom-call(%g1), custom_call_target="AsyncStart"
}

%done (x: f32[4]) -> f32[8] {
  %x = f32[4]{0} parameter(0)
  %g2 = f32[8]{0} all-gather(%x), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %d = f32[8]{0} custom-call(%g2), custom_call_target="AsyncDone"
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %h = f32[8]{0:T(128)S(1)} get-tuple-element(%p), index=1
  %q = f32[4]{0} slice(%h), slice={[0:4]}
  %fusion.1 = (f32[4]{0}, f32[8]{0}) fusion(%q), kind=kCustom, calls=%start
  %fusion.2 = f32[8]{0} fusion(%q), kind=kCustom, calls=%done
  %kernel = f32[8]{0} custom-call(%h), frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block\\": 1}"
}}, metadata={op_name="pallas_call"}
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) tuple(%next, %fusion.2)
}

ENTRY %main (a: f32[24,24]) -> f32[8] {
  %a = f32[24,24]{1,0:T(8,128)} parameter(0), metadata={op_name="state"}
  %b = s32[]{:T(128)} parameter(1)
  %c = s32[]{:T(128)} constant(2)
  %z = f32[8]{0:T(128)S(1)} constant({1, 2, 3, 4, 5, 6, 7, 8})
  %init = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) tuple(%c, %z)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) while(%init), condition=%cond, body=%body
  ROOT %r = f32[8]{0:T(128)S(1)} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.fast
def test_text_of_a_tpu_program():
    module = hlo.parse(TEXT)
    assert list(module.computations) == ["cond", "start", "done", "body", "main"]
    arguments = {n: i.shapes[0] for n, i in module.entry.parameters().items()}
    assert (arguments[0].bytes, arguments[0].padded) == (4 * 24 * 24, 4 * 24 * 128)
    assert (arguments[1].bytes, arguments[1].padded) == (4, 512)
    loop = module.entry.by_name["loop"]
    assert hlo.trip_count(module, loop, module.entry) == 5  # from 2 to 7
    assert [s.space for s in loop.shapes] == [0, 1]
    assert module.computations["body"].root.name == "t"
    step_cost = cost.analyze(module, {"data": 4, "tensor": 2})
    # One exchange, written in two fusions, five times.
    (gather,) = step_cost.collectives
    assert (gather.kind, gather.axes, gather.bytes, gather.times) == ("all-gather", "tensor", 32, 5)
    assert gather.wire == 16
    known = dataclasses.replace(
        loop, attributes=loop.attributes + ', backend_config={"known_trip_count":{"n":"9"}}'
    )
    assert hlo.trip_count(module, known, module.entry) == 9
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule empty")


@pytest.mark.fast
def test_a_loop_that_counts_by_two():
    """As compilers unroll products of weights that arrive in parts: 2, 4, 6."""
    twice = TEXT.replace("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} constant(2)")
    module = hlo.parse(twice)
    assert hlo.trip_count(module, module.entry.by_name["loop"], module.entry) == 3


@pytest.mark.parametrize(
    "known, unknown", [("direction=LT", "direction=NE"), ("tuple(%next", "tuple(%n2")]
)
def test_a_loop_of_unknown_length_is_named(known, unknown):
    module = hlo.parse(TEXT.replace(known, unknown))
    step_cost = cost.analyze(module, {"data": 4, "tensor": 2})
    assert step_cost.unknown_loops == ("loop",) and step_cost.collectives[0].times == 1


@pytest.mark.fast
@pytest.mark.parametrize(
    "written, axes, first",
    [
        ("replica_groups=[2,4]<=[8]", "fsdp", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", "data", (0, 4)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "data", (0, 4)),
        ("replica_groups={}", "data+fsdp", tuple(range(8))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", "fsdp", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", "fsdp", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", "data", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", "fsdp", (0, 1, 2, 3)),
        ("source_target_pairs={{0,4},{4,0}}", "data", (0, 4)),
    ],
)
def test_groups_of_devices(written, axes, first):
    line = f"%g = f32[8]{{0}} all-reduce(%x), channel_id=1, {written}, to_apply=%add"
    instruction = hlo._instruction(line)
    groups = cost.replica_groups(instruction, 8)
    assert groups[0] == first
    assert cost.mesh_axes(groups, {"data": 2, "fsdp": 4}) == axes
    strange = hlo._instruction("%g = f32[8]{0} all-reduce(%x), replica_groups=<new>, to_apply=%add")
    with pytest.raises(ValueError, match="unknown form of device groups"):
        cost.replica_groups(strange, 8)


@pytest.mark.fast
def test_products_that_a_tpu_writes_as_convolutions():
    """A batch of 4 products [16, 8] x [8, 32], as positions of which only one of each meets."""
    line = (
        "%c = f32[4,16,32]{2,1,0} convolution(%l, %r), window={size=4 pad=0_0 stride=3 "
        "lhs_dilate=4}, dim_labels=0bf_0io->0bf"
    )
    shapes = {"l": "f32[4,16,8]{2,1,0}", "r": "f32[4,8,32]{2,1,0}"}
    operands = [hlo._instruction(f"%{n} = {s} parameter({i})") for i, (n, s) in
             enumerate(shapes.items())]  # fmt: skip
    call = hlo._instruction(line)
    scope = hlo.Computation("main", [*operands, call])
    module = hlo.Module({"main": scope}, scope)
    assert cost.instruction_flops(module, scope, call) == 2 * 4 * 16 * 8 * 32


@pytest.mark.fast
def test_bytes_of_a_slice_are_not_those_of_the_stack():
    """A layer's weight is read from the stack of all, and its gradient written into one."""
    stack, index = jnp.ones((16, 64, 64)), jnp.zeros((), jnp.int32)
    read = lambda w, i: jnp.tanh(jax.lax.dynamic_index_in_dim(w, i, keepdims=False)) * 2
    module = hlo.parse(jax.jit(read).lower(stack, index).compile().as_text())
    assert cost.analyze(module, {"data": 1}).bytes < 6 * math.prod(stack.shape[1:]) * 4


@pytest.mark.fast
def test_bytes_of_a_slice_in_a_fusion_inside_a_fusion():
    """As TPUs write a product with one layer of a stack, and an update of one."""
    module = hlo.parse(
        "HloModule m\n\n"
        "%take (p: f32[16,64,64], i: s32[]) -> f32[1,64,64] {\n"
        "  %p = f32[16,64,64]{2,1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
        "  ROOT %s = f32[1,64,64]{2,1,0} dynamic-slice(%p, %i, %i, %i)\n}\n\n"
        "%put (q: f32[16,64,64], u: f32[1,64,64], j: s32[]) -> f32[16,64,64] {\n"
        "  %q = f32[16,64,64]{2,1,0} parameter(0)\n"
        "  %u = f32[1,64,64]{2,1,0} parameter(1)\n  %j = s32[] parameter(2)\n"
        "  ROOT %d = f32[16,64,64]{2,1,0} dynamic-update-slice(%q, %u, %j, %j, %j)\n}\n\n"
        "%outer (a: f32[16,64,64], b: f32[16,64,64], k: s32[]) -> f32[16,64,64] {\n"
        "  %a = f32[16,64,64]{2,1,0} parameter(0)\n"
        "  %b = f32[16,64,64]{2,1,0} parameter(1)\n  %k = s32[] parameter(2)\n"
        "  %t = f32[1,64,64]{2,1,0} fusion(%a, %k), kind=kLoop, calls=%take\n"
        "  ROOT %w = f32[16,64,64]{2,1,0} fusion(%b, %t, %k), kind=kLoop, calls=%put\n}\n\n"
        "ENTRY %main (x: f32[16,64,64], y: f32[16,64,64], n: s32[]) -> f32[16,64,64] {\n"
        "  %x = f32[16,64,64]{2,1,0} parameter(0)\n"
        "  %y = f32[16,64,64]{2,1,0} parameter(1)\n  %n = s32[] parameter(2)\n"
        "  ROOT %f = f32[16,64,64]{2,1,0} fusion(%x, %y, %n), kind=kOutput, calls=%outer\n}\n"
    )
    layer = 64 * 64 * 4
    assert cost.analyze(module, {"data": 1}).bytes == pytest.approx(2 * layer, rel=0.01)
