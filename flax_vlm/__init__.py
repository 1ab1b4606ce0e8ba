# SPDX-License-Identifier: Apache-2.0
"""flax_vlm: vision-language models in JAX, from one CPU to a TPU pod with the same config."""

__version__ = "0.1.0"
