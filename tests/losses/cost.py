# SPDX-License-Identifier: Apache-2.0
"""Counts matrix products of a jaxpr; as a program, measures memory on 64 virtual devices."""

import json
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from flax_vlm.losses import LOSSES
from flax_vlm.losses.lowering import bytes_per_device, lower_loss_and_gradients

BATCH = ("data", "fsdp")


def matmul_flops(jaxpr):
    """FLOPs of all dot_generals, loops and devices multiplied in."""
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            size = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * size * math.prod(equation.outvars[0].aval.shape)
            continue
        assert name != "while" or not any(map(matmul_flops, inner(parameters))), (
            "unknown trip count"
        )
        times = parameters["length"] if name == "scan" else 1
        times *= math.prod(parameters["mesh"].shape.values()) if name == "shard_map" else 1
        total += times * sum(map(matmul_flops, inner(parameters)))
    return total


def inner(parameters):
    leaves = jax.tree.leaves(
        list(parameters.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    )
    return [getattr(x, "jaxpr", x) for x in leaves if hasattr(x, "eqns") or hasattr(x, "jaxpr")]


def on_rows(local, mesh):
    specs = (P(BATCH), P(BATCH), P(), P())
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(BATCH))


def naive_ring(image, text, scale, bias, *, mesh):
    """The sigmoid loss on a ring as one would write it, differentiated by JAX."""

    def local(image, text, scale, bias):
        n, rows = lax.axis_size(BATCH), jnp.arange(len(image))
        order = [(i, (i + 1) % n) for i in range(n)]

        def body(carry, k):
            text, total = carry
            x = scale * image @ text.T + bias
            match = (rows[:, None] == rows[None, :]) & (k == 0)
            total += jax.nn.softplus(jnp.where(match, -x, x)).sum(1)
            return (lax.ppermute(text, BATCH, order), total), None

        zero = lax.pcast(jnp.zeros(len(image)), BATCH, to="varying")
        return lax.scan(body, (text, zero), jnp.arange(n))[0][1]

    return on_rows(local, mesh)(image, text, scale, bias)


def gather_softmax(image, text, scale, bias, *, mesh):
    """open_clip --local-loss --gather-with-grad: both directions against gathered features."""

    def local(image, text, scale, bias):
        match = lax.axis_index(BATCH) * len(image) + jnp.arange(len(image))

        def direction(mine, other):
            x = scale * (mine @ lax.all_gather(other, BATCH, tiled=True).T)
            own = jnp.take_along_axis(x, match[:, None], 1)[:, 0]
            return jax.nn.logsumexp(x, 1) - own

        return (direction(image, text) + direction(text, image)) / 2

    return on_rows(local, mesh)(image, text, scale, bias)


def gather_sigmoid(image, text, scale, bias, *, mesh):
    """The sigmoid loss of this device's images against gathered texts."""

    def local(image, text, scale, bias):
        match = lax.axis_index(BATCH) * len(image) + jnp.arange(len(image))
        x = scale * (image @ lax.all_gather(text, BATCH, tiled=True).T) + bias
        sign = jnp.where(match[:, None] == jnp.arange(x.shape[1])[None, :], -1.0, 1.0)
        return jax.nn.softplus(sign * x).sum(1)

    return on_rows(local, mesh)(image, text, scale, bias)


def measure():
    forms = {name: LOSSES[name](form="sharded", tile=256) for name in LOSSES}
    others = {
        "naive ring": naive_ring,
        "gather softmax": gather_softmax,
        "gather sigmoid": gather_sigmoid,
    }
    cases = [(name, n, 4096, 512) for name in forms for n in (1, 8, 64)]
    cases += [("naive ring", n, 4096, 512) for n in (8, 64)]
    cases += [("softmax", 8, 16384, 512)]
    big = ("softmax", "gather softmax", "sigmoid", "gather sigmoid")
    cases += [(name, 8, 32768, 768) for name in big]
    found = {}
    for name, devices, rows, width in cases:
        mesh = jax.make_mesh(
            (devices, 1, 1),
            (*BATCH, "tensor"),
            axis_types=(AxisType.Auto,) * 3,
            devices=jax.devices()[:devices],
        )
        loss = forms.get(name) or others[name]
        lowered = lower_loss_and_gradients(loss, mesh, batch=rows * devices, width=width)
        compiled = lowered.compile()
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        found[f"{name} {devices} x {rows} x {width}"] = bytes_per_device(compiled), temporaries
    return found


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 64)
    print(json.dumps(measure()))
