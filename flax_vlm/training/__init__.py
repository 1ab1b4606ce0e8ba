# SPDX-License-Identifier: Apache-2.0
"""State, step, loop, optimizers, sharding, checkpoints, metrics: one of each, for every
objective.
"""
