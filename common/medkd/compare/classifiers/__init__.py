# SPDX-License-Identifier: Apache-2.0
"""Compare networks that classify whole images: which cases each gets right, and where it sees evidence for a class."""
