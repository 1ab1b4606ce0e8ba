# SPDX-License-Identifier: Apache-2.0
"""Counting collectives in compiled programs, real ones and excerpts in TPU's way of writing."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from flax_vlm.tools.collectives import count_collectives
from flax_vlm.training.sharding import make_mesh

MESH_AXIS = ("data", "fsdp")


def compiled_text(local, shape):
    mesh = make_mesh(4, 2)
    f = jax.shard_map(local, mesh=mesh, in_specs=P(MESH_AXIS), out_specs=P(MESH_AXIS))
    return jax.jit(f).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().as_text()


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    shift = [(i, (i + 1) % 8) for i in range(8)]

    def local(x):  # [2, 3]
        def body(carry, _):
            return lax.ppermute(carry, MESH_AXIS, shift) * 2.0, None

        x = lax.scan(body, x, length=7)[0]
        return lax.scan(body, x, length=3)[0]

    found = count_collectives(compiled_text(local, (16, 3)))
    assert found == {"collective-permute": {"count": 10, "bytes": 10 * 2 * 3 * 4}}


def test_nested_loops_multiply():
    shift = [(i, (i + 1) % 8) for i in range(8)]

    def local(x):
        def inner(x, _):
            return jnp.sin(lax.ppermute(x, MESH_AXIS, shift)), None

        def outer(x, _):
            return jnp.cos(lax.scan(inner, x, length=5)[0]), None

        return lax.scan(outer, x, length=4)[0]

    found = count_collectives(compiled_text(local, (8, 6)))
    assert found["collective-permute"] == {"count": 20, "bytes": 20 * 6 * 4}


def test_bytes_are_what_arrives_on_one_device():
    def local(x):  # [2, 3]
        everything = lax.all_gather(x, MESH_AXIS, tiled=True)  # [16, 3]
        total = lax.psum(jnp.sin(everything[:2]), MESH_AXIS)  # [2, 3]
        return x + total + jnp.cos(everything).sum(0)[None]

    found = count_collectives(compiled_text(local, (16, 3)))
    assert found["all-gather"] == {"count": 1, "bytes": 16 * 3 * 4}
    assert found["all-reduce"] == {"count": 1, "bytes": 2 * 3 * 4}


# What libtpu writes: no trip count but a condition, and a gather repeated in three fusions.
TPU = """HloModule m
%start (p: bf16[1,8]) -> (bf16[1,8], bf16[4,8]) {
  %g.1 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, dimensions={0}
}
%middle (p: bf16[1,8]) -> bf16[4,8] {
  %g.2 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, dimensions={0}
}
%done (p: bf16[1,8]) -> bf16[4,8] {
  %g.3 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, dimensions={0}
}
%scatter (p: f32[6]) -> f32[6] {
  %r.1 = f32[6]{0:T(128)} all-reduce(%p), channel_id=5, to_apply=%add
}
%condition (c: (s32[], f32[6])) -> pred[] {
  %limit = s32[]{:T(128)} constant(27)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}
%body (c: (s32[], f32[6])) -> (s32[], f32[6]) {
  %async-collective-start = (bf16[1,8]{1,0}, bf16[4,8]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %fusion.7 = (bf16[2]{0}, bf16[4,8]{1,0}) fusion(%y), kind=kOutput, calls=%middle
  %async-collective-done.1 = bf16[4,8]{1,0} fusion(%z), kind=kCustom, calls=%done
  %fusion.8 = f32[6]{0} fusion(%w), kind=kCustom, calls=%scatter
  %permute = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%v), channel_id=1
}
ENTRY %main (a: f32[6]) -> f32[6] {
  %w.1 = (s32[], f32[6]) while(%t), condition=%condition, body=%body
  ROOT %sum = f32[2,3]{1,0} all-reduce(%u), channel_id=9, to_apply=%add
}
"""


def test_tpu_programs_are_read():
    assert count_collectives(TPU) == {
        "all-gather": {"count": 27, "bytes": 27 * 4 * 8 * 2},
        "all-reduce": {"count": 28, "bytes": 27 * 6 * 4 + 24},
        "collective-permute": {"count": 27, "bytes": 27 * 20},
    }
