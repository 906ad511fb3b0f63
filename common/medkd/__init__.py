# SPDX-License-Identifier: Apache-2.0
"""MedKD: knowledge distillation for 3-D medical segmentation, as MONAI bundles."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
