# SPDX-License-Identifier: Apache-2.0
"""Layers: attention, masks, MLP, norms, positions, patches, pooling and the transformer encoder."""
