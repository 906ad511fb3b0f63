# SPDX-License-Identifier: Apache-2.0
"""Code of this bundle: transforms of the 2-D and the EM preset, a head for the teacher; copies of medkd.inference."""
