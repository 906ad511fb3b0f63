# SPDX-License-Identifier: Apache-2.0
"""Pure tensor functions for 2-D and 3-D maps; none of them builds an N x N object over voxels."""
