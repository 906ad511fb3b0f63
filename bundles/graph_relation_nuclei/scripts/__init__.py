# SPDX-License-Identifier: Apache-2.0
"""What only this bundle needs: the 2-D networks of teacher and students, and their affinities."""
