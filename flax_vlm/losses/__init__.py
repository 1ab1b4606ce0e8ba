# SPDX-License-Identifier: Apache-2.0
"""Losses: pure functions of arrays, unreduced, in float32. LOSSES are the contrastive ones."""

from flax_vlm.losses.contrastive_form import LOSSES

__all__ = ["LOSSES"]
