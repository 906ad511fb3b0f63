# SPDX-License-Identifier: Apache-2.0
"""Procedural volumes and pictures with exact labels, deterministic by seed: data for demos and tests."""

from __future__ import annotations

from medkd.phantoms.ct import CTPhantom, ct_phantom, write_ct_phantoms
from medkd.phantoms.em import EMPhantom, em_phantom, write_em_phantoms
from medkd.phantoms.nuclei import NucleiPhantom, nuclei_phantom, write_nuclei_phantoms

__all__ = [
    "CTPhantom", "EMPhantom", "NucleiPhantom", "ct_phantom", "em_phantom", "nuclei_phantom", "write_ct_phantoms",
    "write_em_phantoms", "write_nuclei_phantoms",
]
