"""The parser of HLO text and the costs that follow from it, on programs written by hand."""

import dataclasses
import math
import re
import warnings

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

# A loop over six layers in the form of the dumps of libtpu 0.0.50 (jax 0.12), shortened: operands
# name elements of tuples.
COMPACT = """HloModule jit_f, is_scheduled=true

%fused_computation (p.0: bf16[8,128], p.1: bf16[6,128,128], p.2: s32[]) -> bf16[8,128] {
  %p.0 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p.1 = bf16[6,128,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %p.2 = s32[]{:T(128)S(6)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[1,128,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p.1, %p.2, %zero, %zero), \
dynamic_slice_sizes={1,128,128}
  %bitcast = bf16[128,128]{1,0:T(8,128)(2,1)} bitcast(%slice)
  ROOT %product = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} convolution(%p.0, %bitcast), \
dim_labels=bf_io->bf
}

%wide.region_0.2.sunk (wide.arg_tuple.0: (s32[], bf16[8,128], bf16[6,128,128], s32[])) -> \
(s32[], bf16[8,128], bf16[6,128,128], s32[]) {
  %constant.12..sunk = s32[]{:T(128)} constant(1)
  %wide.arg_tuple.0 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, \
bf16[6,128,128]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %copy.2 = s32[]{:T(128)S(6)} copy(%wide.arg_tuple.0#0)
  %add.2 = s32[]{:T(128)} add(%copy.2, %constant.12..sunk)
  %copy.11 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy(%wide.arg_tuple.0#1)
  %fusion.13 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%copy.11, %wide.arg_tuple.0#2, %copy.2), \
kind=kOutput, calls=%fused_computation
  ROOT %tuple.11 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, \
bf16[6,128,128]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) \
tuple(%add.2, %fusion.13, %wide.arg_tuple.0#2, %wide.arg_tuple.0#3)
}

%wide.region_1.3 (wide.arg_tuple.3: (s32[], bf16[8,128], bf16[6,128,128], s32[])) -> pred[] {
  %constant.14 = s32[]{:T(128)} constant(6)
  %wide.arg_tuple.3 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, \
bf16[6,128,128]{2,1,0:T(8,128)(2,1)}, /*index=3*/s32[]{:T(128)}) parameter(0)
  ROOT %lt.0 = pred[]{:T(512)} compare(%wide.arg_tuple.3#0, %constant.14), direction=LT
}

ENTRY %main.4 (w.1: bf16[6,128,128], x.1: bf16[8,128]) -> bf16[8,128] {
  %constant.7 = s32[]{:T(128)} constant(0)
  %constant.12 = s32[]{:T(128)} constant(1)
  %w.1 = bf16[6,128,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %x.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %copy-start.1 = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0:T(8,128)(2,1)}, \
u32[]{:S(2)}) copy-start(%x.1)
  %copy.10 = s32[]{:T(128)} copy(%constant.7)
  %copy-done.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %tuple.13 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, \
bf16[6,128,128]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) \
tuple(%copy.10, %copy-done.1, %w.1, %constant.12)
  %while = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, \
bf16[6,128,128]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) while(%tuple.13), \
condition=%wide.region_1.3, body=%wide.region_0.2.sunk
  %copy-start = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, \
u32[]{:S(2)}) copy-start(%while#1)
  ROOT %copy-done = bf16[8,128]{1,0:T(8,128)(2,1)} copy-done(%copy-start)
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
def test_operands_that_name_an_element_of_a_tuple():
    """A plan reads the compiler's dump, which has them instead of `get-tuple-element`."""
    module = hlo.parse(COMPACT)
    assert hlo.trip_count(module, module.entry.by_name["while"], module.entry) == 6
    element = module.computations["wide.region_0.2.sunk"].by_name["wide.arg_tuple.0#2"]
    assert (element.opcode, element.attribute("index")) == ("get-tuple-element", "2")
    assert element.shapes[0] == module.entry.by_name["w.1"].shapes[0]
    step_cost = cost.analyze(module, {"data": 1})
    assert step_cost.unknown_loops == () and step_cost.flops == 6 * 2 * 8 * 128 * 128
    # The weights are read once, and the rows are read and written; a loop's counter is four bytes.
    assert step_cost.bytes == pytest.approx(2 * (6 * 128 * 128 + 2 * 8 * 128), rel=1e-3)


@pytest.mark.fast
def test_short_and_long_forms_of_tuple_elements_cost_the_same():
    lines = [line for line in TEXT.splitlines() if not line.startswith(("  %i =", "  %h ="))]
    short = "\n".join(lines).replace("%i,", "%p#0,").replace("(%h)", "(%p#1)")
    module = hlo.parse(short)
    assert "get-tuple-element(%p)" not in short and "p#1" in module.computations["body"].by_name
    mesh_shape = {"data": 4, "tensor": 2}
    assert cost.analyze(module, mesh_shape) == cost.analyze(hlo.parse(TEXT), mesh_shape)
    nested = hlo.parse(
        "ENTRY %main (p: ((f32[4], /*index=1*/f32[8]), f32[2])) -> f32[8] {\n"
        "  %p = ((f32[4]{0}, /*index=1*/f32[8]{0}), f32[2]{0}) parameter(0)\n"
        "  ROOT %n = f32[8]{0} negate(%p#0#1)\n}\n"
    )
    assert [i.name for i in nested.entry.instructions] == ["p", "p#0", "p#0#1", "n"]
    assert nested.entry.by_name["p#0#1"].shapes == nested.entry.root.shapes


@pytest.mark.fast
@pytest.mark.parametrize("operand", ["wide.arg_tuple.3#4", "wide.arg_tuple.3#{0}", "absent#0"])
def test_an_operand_of_unknown_form_is_an_error(operand):
    text = COMPACT.replace("compare(%wide.arg_tuple.3#0", f"compare(%{operand}")
    message = rf"wide.region_1.3: operand %{re.escape(operand)} of %lt.0 is not defined"
    with pytest.raises(ValueError, match=message):
        hlo.parse(text)


@pytest.mark.fast
def test_a_loop_that_counts_by_two():
    """As compilers unroll products of weights that arrive in parts: 2, 4, 6."""
    twice = TEXT.replace("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} constant(2)")
    module = hlo.parse(twice)
    assert hlo.trip_count(module, module.entry.by_name["loop"], module.entry) == 3


@pytest.mark.parametrize(
    "known, unknown",
    [
        ("direction=LT", "direction=NE"),
        ("tuple(%next", "tuple(%one"),
        ("compare(%i", "compare(%p"),
    ],
)
def test_a_loop_of_unknown_length_is_named(known, unknown):
    module = hlo.parse(TEXT.replace(known, unknown))
    mesh_shape = {"data": 4, "tensor": 2}
    with pytest.warns(UserWarning, match="trip count of loop loop in computation main cannot be"):
        step_cost = cost.analyze(module, mesh_shape)
    assert step_cost.unknown_loops == ("loop",) and step_cost.collectives[0].times == 1
    with warnings.catch_warnings(action="error"):
        step_cost = cost.analyze(module, mesh_shape, default_trips=3)
    assert step_cost.unknown_loops == ("loop",) and step_cost.collectives[0].times == 3


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
