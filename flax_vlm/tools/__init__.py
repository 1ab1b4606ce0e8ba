# SPDX-License-Identifier: Apache-2.0
"""Programs around training, `python -m flax_vlm.tools.NAME`; each prints JSON on its last line."""
