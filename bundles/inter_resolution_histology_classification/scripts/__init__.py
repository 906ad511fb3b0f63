# SPDX-License-Identifier: Apache-2.0
"""Code of this bundle: the classifiers of teacher and student, tables of classes; copies of medkd.inference."""
