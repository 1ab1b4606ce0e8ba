# SPDX-License-Identifier: Apache-2.0
"""Losses: pure functions of arrays, unreduced, in float32."""
