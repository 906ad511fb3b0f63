# SPDX-License-Identifier: Apache-2.0
"""What only this bundle needs: transforms of the 2-D and the EM preset."""
