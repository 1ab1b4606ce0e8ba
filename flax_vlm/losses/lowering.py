# SPDX-License-Identifier: Apache-2.0
"""Lowers a contrastive loss with its gradients for a mesh, no array allocated: what will it cost?

The mesh may be of devices that are not there (jax.experimental.topologies): the compiled program
then tells memory per chip and collectives of a TPU pod.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def lower_loss_and_gradients(
    loss: Callable[..., jax.Array],
    mesh: Mesh,
    *,
    batch: int,
    width: int,
    texts: int | None = None,
    axes: tuple[str, ...] = ("data", "fsdp"),
    dtype: jnp.dtype = jnp.float32,
) -> jax.stages.Lowered:
    """Returns the lowered program of mean loss and gradients of embeddings, scale and bias.

    Args:
        loss: called as loss(image [batch, width], text [texts, width], scale, bias, mesh=mesh).
        mesh: of real or described devices.
        batch: B, a multiple of the product of `axes`.
        width: E.
        texts: M, None for B.
        axes: mesh axes over which embeddings are split.
        dtype: of the embeddings.
    """
    split, whole = NamedSharding(mesh, P(axes)), NamedSharding(mesh, P())
    shardings = (split, split, whole, whole)
    shapes = [(batch, width), (texts or batch, width), (), ()]
    dtypes = [dtype, dtype, jnp.float32, jnp.float32]
    arguments = [
        jax.ShapeDtypeStruct(*facts, sharding=sharding)
        for *facts, sharding in zip(shapes, dtypes, shardings, strict=True)
    ]

    def mean(*arguments):
        return loss(*arguments, mesh=mesh).mean()

    run = jax.jit(
        jax.value_and_grad(mean, (0, 1, 2, 3)),
        in_shardings=shardings,
        out_shardings=(whole, shardings),
    )
    return run.lower(*arguments)


def bytes_per_device(compiled: jax.stages.Compiled) -> int:
    """Returns the arguments, results and temporaries of a compiled program, aliases once."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
