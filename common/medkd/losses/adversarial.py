# SPDX-License-Identifier: Apache-2.0
"""Adversarial distillation: a student whose predictions a discriminator cannot tell from the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor, nn

from medkd.losses.base import DistillationLoss
from medkd.losses.discriminator import AdversarialForm, student_score_loss
from medkd.losses.predictions import Predictions, check_comparable
from medkd.ops.ignored import ignored_voxels, on_grid
from medkd.ops.prediction import Activation, TeacherOutput

__all__ = ["AdversarialLoss"]

_FORMS: dict[str, AdversarialForm] = {"default": "hinge", "paper": "wgan_gp"}


class AdversarialLoss(DistillationLoss):
    """`-mean D(student)` with a discriminator D that is trained beside the student.

    "Real" is the teacher's prediction and never a label, so that cases without one count like others. Logits of ignored
    voxels, which have a negative label, are 0 for both networks. A `medkd.handlers.adversarial.DiscriminatorTraining`
    trains the discriminator after each step of the student; it is no part of this loss, so that the student's optimizer
    does not have it: put it and its own optimizer into the `objects` of the `CheckpointHandler`.

    The term has no lower bound, and its value does not tell how well the student does.

    | | `default` (ours) | `paper` |
    |---|---|---|
    | form | `hinge`, without second derivatives: less memory and time | `wgan_gp` |
    | logits | centered, if of a softmax: minus their mean over the classes of a voxel | as the networks give them |

    A softmax does not tell logits apart that differ by a constant per voxel; the discriminator would. Centered ones are
    the same for a teacher of logits and one of probabilities. The teacher sees the batch itself
    (`needs_live_teacher`): predictions that were written down would be told from the student's by how they are rounded.
    The predecessor of the published code showed the discriminator the image too; there it is commented out, and here it
    is left out.

    Args:
        discriminator: maps logits (B, K, *S) to scores (B, 1, *G); they are cast to the type of its parameters. Frozen
            and in evaluation mode from the first step on, but for its own training.
        preset: `default` or `paper`; `form` wins over it.
        form: of the discriminator's loss, `wgan_gp` or `hinge`; None takes the preset's.
        activation: `softmax` for one class per voxel (one channel is a sigmoid output), or `sigmoid` for regions.
        teacher_output: `logits`, or `probabilities` of a teacher that ends in that activation.

    Raises:
        ValueError: unknown option; student and teacher of different grids or classes; probabilities in the place of
            logits, or the other way round.
        RuntimeError: in the second step: nobody has trained the discriminator in the first.

    Reference:
        Zou et al., Graph Flow, arXiv 2203.08667, and Liu et al., Structured Knowledge Distillation for Semantic
        Segmentation, arXiv 1903.04197, section 3.2 (holistic distillation).

    Example:
        >>> import torch
        >>> from medkd.losses.discriminator import Discriminator
        >>> loss = AdversarialLoss(Discriminator(2, spatial_dims=2, width=4, layers=2))
        >>> student = torch.randn(1, 2, 16, 16, requires_grad=True)
        >>> loss({"pred": student}, {"pred": torch.randn(1, 2, 16, 16)})["adversarial"].backward()
        >>> bool(student.grad.any()), list(loss.parameters())
        (True, [])
    """

    terms = ("adversarial",)
    needs_live_teacher = True

    def __init__(
        self, discriminator: nn.Module, preset: Literal["default", "paper"] = "default",
        form: AdversarialForm | None = None, activation: Activation = "softmax",
        teacher_output: TeacherOutput = "logits",
    ) -> None:
        super().__init__()
        if preset not in _FORMS:
            raise ValueError(f"`preset` must be one of {list(_FORMS)}, got {preset!r}.")
        if form is not None and form not in get_args(AdversarialForm):
            raise ValueError(f"`form` must be one of {get_args(AdversarialForm)}, got {form!r}.")
        self.form: AdversarialForm = form or _FORMS[preset]
        self.is_centered = preset == "default" and activation == "softmax"
        self.activation: Activation = activation
        self.teacher_output: TeacherOutput = teacher_output
        self._predictions = Predictions(activation, teacher_output)
        self._discriminator = [discriminator]                      # a list keeps it out of the optimizer
        self._shown: tuple[Tensor, Tensor] | None = None
        self.preset_weights = {"adversarial": 0.1}

    @property
    def discriminator(self) -> nn.Module:
        """The discriminator, which is no submodule."""
        return self._discriminator[0]

    def take_shown(self) -> tuple[Tensor, Tensor] | None:
        """Give the logits (teacher, student) of the last step, once, without gradients; None if there are none."""
        shown, self._shown = self._shown, None
        return shown

    def compute_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], label: Tensor | None
    ) -> dict[str, Tensor]:
        """Give `adversarial`; the labels tell which voxels are ignored."""
        if "adversarial" not in self.active_terms:
            return {}
        if self._shown is not None:
            raise RuntimeError(
                "`AdversarialLoss` must have a discriminator that is trained in each step, got one that nobody has "
                "trained in the last; put a `medkd.handlers.adversarial.DiscriminatorTraining` behind the "
                "`DistillationHandler`."
            )
        mine, other = student["pred"], teacher["pred"]
        check_comparable(mine, other)
        mine, other = self._predictions.student(mine), self._predictions.teacher(other)
        # not in the constructor: an optimizer that a config makes of what requires a gradient would be empty
        discriminator = self.discriminator.requires_grad_(False).eval()
        dtype = next((one.dtype for one in discriminator.parameters()), mine.dtype)
        ignored = ignored_voxels(label)
        mine, other = (self._for_discriminator(one, ignored).to(dtype) for one in (mine, other))
        if self.training:
            self._shown = other.detach(), mine.detach()
        return {"adversarial": student_score_loss(discriminator(mine))}

    def _for_discriminator(self, logits: Tensor, ignored: Tensor | None) -> Tensor:
        if self.is_centered and logits.shape[1] > 1:
            logits = logits - logits.mean(1, keepdim=True)
        return logits if ignored is None else logits.masked_fill(on_grid(ignored, logits.shape[2:]), 0.0)
