# SPDX-License-Identifier: Apache-2.0
"""Compare networks on the same cases: how good they are, where they err, where they look."""
