# SPDX-License-Identifier: Apache-2.0
"""One Python file per ladder: an experiment over the values of some dials (scaling/ladder.py)."""
