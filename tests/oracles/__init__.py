# SPDX-License-Identifier: Apache-2.0
"""The papers' formulas in their plainest form: what the tests compare with, and the peers of `make bench`."""
