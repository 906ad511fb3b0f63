# SPDX-License-Identifier: Apache-2.0
"""What is scored beside networks: public filters without training, and rules that ignore the image.

`RULES` are named by recipes. `lab.classical.scoring` chooses the parameters of one on the validation cases and scores
it on the test cases by the metrics of a bundle's evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping

from lab.classical import headneck, liver, membranes, nuclei, priors, sarcoma, target, texture
from lab.classical.case import Rule

__all__ = ["RULES", "Rule"]

RULES: Mapping[str, Rule] = {
    "headneck_thresholds": headneck.RULE,
    "headneck_target": target.RULE,
    "liver_gray_values": liver.RULE,
    "nuclei_watershed": nuclei.RULE,
    "em_ridges": membranes.RULE,
    "sarcoma_muscle": sarcoma.RULE,
    "inset_ellipsoid": sarcoma.ELLIPSOID,
    "mean_label": priors.RULE,
    "texture": texture.RULE,
}
