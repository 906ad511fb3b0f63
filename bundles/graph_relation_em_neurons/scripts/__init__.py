# SPDX-License-Identifier: Apache-2.0
"""Code of this bundle: the 3-D U-Net of teacher and student, transforms of sections; copies of medkd.inference."""
