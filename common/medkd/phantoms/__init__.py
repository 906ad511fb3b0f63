# SPDX-License-Identifier: Apache-2.0
"""Procedural volumes with exact labels, deterministic by seed: data for demos and tests."""

from __future__ import annotations

from medkd.phantoms.ct import CTPhantom, ct_phantom, write_ct_phantoms

__all__ = ["CTPhantom", "ct_phantom", "write_ct_phantoms"]
