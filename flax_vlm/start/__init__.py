# SPDX-License-Identifier: Apache-2.0
"""Starting from parameters that exist: where they lie (sources), and what they fill (plan)."""
