# SPDX-License-Identifier: Apache-2.0
"""`make demo`: what a teacher without its data is worth, from nothing to a report."""
