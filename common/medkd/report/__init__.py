# SPDX-License-Identifier: Apache-2.0
"""Pages, pictures and curves that compare runs: for the demo, the results and `medkd compare`."""
