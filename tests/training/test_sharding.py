# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flax_vlm.training import sharding


def test_the_mesh_takes_the_rest_for_data():
    assert dict(sharding.make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_a_mesh_that_does_not_multiply_to_the_devices_is_refused():
    with pytest.raises(ValueError, match="got 3 x 2 x 1 = 6 for 8 devices"):
        sharding.make_mesh(3, 2, 1)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        (
            "image/encoder/blocks/attention/q/kernel",
            (5, 256, 4, 64),
            P(None, "fsdp", "tensor", None),
        ),
        (
            "image/encoder/blocks/attention/o/kernel",
            (5, 4, 64, 256),
            P(None, "tensor", None, "fsdp"),
        ),
        ("image/encoder/blocks/mlp/fc1/kernel", (5, 256, 512), P(None, "fsdp", "tensor")),
        ("image/encoder/blocks/mlp/fc2/kernel", (5, 512, 256), P(None, "tensor", "fsdp")),
        ("image/encoder/blocks/ln1/scale", (5, 256), P(None, None)),
        ("text/embedding/embedding", (1000, 64), P("tensor", "fsdp")),
        ("image/patches/kernel", (16, 16, 3, 256), P(None, None, None, "fsdp")),
        ("logit_scale", (), P()),
    ],
)
def test_rules_split_heads_hidden_units_and_vocabulary(path, shape, spec):
    mesh = sharding.make_mesh(2, 2, 2)
    assert sharding.parameter_spec(path, shape, mesh) == spec


def test_config_rules_come_first():
    mesh = sharding.make_mesh(2, 2, 2)
    rules = ((".*fc1/kernel", ("tensor", None)),)
    assert sharding.parameter_spec("a/fc1/kernel", (6, 4), mesh, rules) == P("tensor", None)


def test_a_tensor_that_a_rule_cannot_split_is_named():
    mesh = sharding.make_mesh(1, 1, 8)
    with pytest.raises(ValueError, match=r"a/q/kernel \(64, 12, 8\) evenly, got 12 over tensor=8"):
        sharding.parameter_spec("a/q/kernel", (64, 12, 8), mesh)


def test_a_rule_with_an_unknown_axis_is_refused():
    mesh = sharding.make_mesh()
    with pytest.raises(ValueError, match="names .'model'., axes are"):
        sharding.parameter_spec("w", (8, 8), mesh, (("w", ("model", None)),))


def test_optimizer_state_follows_its_parameter_and_the_rest_is_whole():
    mesh = sharding.make_mesh(1, 8, 1)
    params = {"fc1": {"kernel": jax.ShapeDtypeStruct((256, 128), jnp.float32)}}
    state = {
        "mu": params,
        "v_row": {"fc1": {"kernel": jax.ShapeDtypeStruct((256,), jnp.float32)}},
        "count": jax.ShapeDtypeStruct((), jnp.int32),
    }
    specs = jax.tree.map(lambda s: s.spec, sharding.follow_parameters(state, params, mesh))
    assert specs["mu"]["fc1"]["kernel"] == P("fsdp", None)
    assert specs["v_row"]["fc1"]["kernel"] == P() and specs["count"] == P()


def test_one_process_loads_the_whole_batch_and_rows_keep_their_order():
    placed = sharding.batch_sharding(sharding.make_mesh(2, 2, 2))
    assert sharding.data_shard(placed) == (0, 1)
    rows = np.arange(8, dtype=np.int32)
    batch = sharding.put_batch({"label": rows}, placed)
    np.testing.assert_array_equal(batch["label"], rows)
    assert batch["label"].sharding.spec == P(("data", "fsdp"))
