# SPDX-License-Identifier: Apache-2.0
"""What only this bundle needs: the 3-D U-Net of teacher and student, and its affinities."""
