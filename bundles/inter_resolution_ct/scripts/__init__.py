# SPDX-License-Identifier: Apache-2.0
"""Code of this bundle: its networks, transforms of the 2-D and the EM preset; copies of medkd.inference."""
