# SPDX-License-Identifier: Apache-2.0
"""What the sharded losses cost: bytes per device by the compiler's count, matrix products."""

import functools
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from flax_vlm.losses import LOSSES
from flax_vlm.losses.lowering import bytes_per_device, lower_loss_and_gradients
from flax_vlm.tools.topologies import load_topology
from flax_vlm.training.sharding import make_mesh
from tests.losses.cost import matmul_flops

UNITS = {"sigmoid": 3, "softmax": 4}


def mesh():
    return jax.make_mesh((4, 2, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def sharded(name, **options):
    return LOSSES[name](form="sharded", **options)


@pytest.fixture(scope="module")
def measured():
    """(bytes per device, temporaries among them) by case, compiled for 64 devices, never run."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.losses.cost"], capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


BOUND = 7.5 * 4 * 512 * 4096 + 3 * 4 * 256**2


@pytest.mark.parametrize("name", UNITS)
def test_memory_is_at_most_seven_and_a_half_embeddings_and_a_few_tiles(measured, name):
    for devices in (1, 8, 64):
        assert measured[f"{name} {devices} x 4096 x 512"][0] <= BOUND


@pytest.mark.parametrize("name", UNITS)
def test_memory_does_not_grow_from_8_to_64_devices(measured, name):
    few, many = (measured[f"{name} {devices} x 4096 x 512"][0] for devices in (8, 64))
    assert abs(many / few - 1) < 0.05


def test_memory_is_linear_in_the_rows_per_device(measured):
    one, four = (measured[f"softmax 8 x {rows} x 512"][0] for rows in (4096, 16384))
    assert 3.8 < four / one < 4.1


# the gather form of the sigmoid keeps one matrix of logits, that of the softmax two
@pytest.mark.parametrize(
    ("name", "in_all", "in_temporaries"), [("softmax", 200, 500), ("sigmoid", 150, 400)]
)
def test_memory_is_far_below_the_gather_form_at_256k_rows(measured, name, in_all, in_temporaries):
    ring, gather = (measured[f"{form}{name} 8 x 32768 x 768"] for form in ("", "gather "))
    assert gather[0] / ring[0] > in_all
    assert gather[1] / ring[1] > in_temporaries


def test_the_ring_that_autodiff_differentiates_breaks_the_same_bound(measured):
    few, many = (measured[f"naive ring {devices} x 4096 x 512"][0] for devices in (8, 64))
    assert few > BOUND
    assert many / few > 4


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_loss_and_gradients_take_no_more_matrix_products_than_promised(name, bidirectional):
    batch, width = 512, 32
    loss = sharded(name, tile=16, bidirectional=bidirectional)
    units = units_of(loss, batch, width)
    assert units == UNITS[name]
    mined = units_of(sharded(name, tile=16, hard_negatives=4), batch, width)
    assert mined == UNITS[name] + 1


def test_free_row_weights_cost_the_sigmoid_one_more_product():
    assert units_of(sharded("sigmoid", tile=16, any_cotangent=True), 512, 32) == 4


def units_of(loss, batch, width):
    def mean(*arguments):
        return loss(*arguments, mesh=mesh()).mean()

    shapes = [(batch, width), (batch, width), (), ()]
    arguments = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    program = jax.make_jaxpr(jax.value_and_grad(mean, (0, 1, 2, 3)))(*arguments)
    return matmul_flops(program.jaxpr) / (2 * batch**2 * width)


@pytest.mark.parametrize("name", UNITS)
def test_the_compiled_ring_sends_texts_to_a_neighbour_and_gathers_nothing(name):
    lowered = lower_loss_and_gradients(sharded(name, tile=128), mesh(), batch=2048, width=64)
    program = lowered.compile().as_text()
    count = functools.partial(lambda kind: len(re.findall(rf" {kind}(?:-start)?\(", program)))
    assert count("all-gather") == 0
    assert count("dot") == UNITS[name]
    # texts, their gradients, and one message per dtype of what travels with each row
    assert count("collective-permute") == {"sigmoid": 3, "softmax": 7}[name]


@pytest.mark.libtpu
@pytest.mark.parametrize("name", UNITS)
def test_memory_per_chip_of_v5p_is_the_same_from_8_to_4096_chips(name):
    rows, width, found = 4096, 768, {}
    for shape in ("2x2x2", "4x4x4", "16x16x16"):
        devices = load_topology(f"v5p:{shape}").devices
        loss = sharded(name, tile=256)
        lowered = lower_loss_and_gradients(
            loss, make_mesh(devices=devices), batch=rows * len(devices), width=width
        )
        found[len(devices)] = bytes_per_device(lowered.compile())
    assert set(found) == {8, 64, 4096}
    assert max(found.values()) / min(found.values()) < 1.05
    assert max(found.values()) <= 7.5 * 4 * width * rows
