# SPDX-License-Identifier: Apache-2.0
"""Code of this bundle: the 2-D networks of teacher and students; copies of medkd.inference."""
