# SPDX-License-Identifier: Apache-2.0
"""`make demo`: from nothing to a distilled student and a report."""
