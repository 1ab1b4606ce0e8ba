# SPDX-License-Identifier: Apache-2.0
"""What training costs, and what it buys."""
