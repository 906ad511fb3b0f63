# SPDX-License-Identifier: Apache-2.0
"""Procedural volumes and pictures with exact labels, deterministic by seed: data for demos and tests."""
