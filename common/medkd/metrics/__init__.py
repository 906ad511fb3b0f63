# SPDX-License-Identifier: Apache-2.0
"""Metrics that MONAI does not have in the form a clinic needs."""
