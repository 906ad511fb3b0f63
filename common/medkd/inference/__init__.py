# SPDX-License-Identifier: Apache-2.0
"""What turns a student's output into a result; these files are also the `scripts` of bundles, which infer without
medkd, so they import no other layer and each other relatively."""
