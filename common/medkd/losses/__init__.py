# SPDX-License-Identifier: Apache-2.0
"""Distillation losses: one method, one file, one public class."""
