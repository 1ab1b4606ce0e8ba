# SPDX-License-Identifier: Apache-2.0
"""One Python file per recipe."""
