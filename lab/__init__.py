# SPDX-License-Identifier: Apache-2.0
"""How bundles are run to learn something: demo, results, bench. Not in the wheel."""
