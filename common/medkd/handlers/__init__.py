# SPDX-License-Identifier: Apache-2.0
"""Ignite handlers that distil on MONAI's unmodified `SupervisedTrainer`."""
