# SPDX-License-Identifier: Apache-2.0
"""A memory of the teacher's past images, as far as relations to them need it: two matrices of C x C per image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["RelationBank"]


class RelationBank(nn.Module):
    """First in, first out; of past images the second moments of voxels and of instances, not the maps.

    In a step draw first, then `enqueue` the images of the step: so no image is ever compared with itself. All of it,
    the draws too, is in the state dict, and the global random generators are not touched. Each rank has its own.

    Args:
        channels: C, of the teacher's embedding.
        capacity: images that are kept, K of the paper.
        sample: images that a draw takes, L of the paper; the memory costs 8 C^2 bytes per image, a draw nothing.
        seed: of the draws.

    Raises:
        ValueError: a number below 1, or more to draw than is kept.

    Reference:
        Liu et al., Graph Relation Distillation, arXiv 2401.06370, memory bank. In the code it has the current
        images too and gives fewer than L after each turn of the ring; neither is followed here.

    Example:
        >>> bank = RelationBank(channels=2, capacity=4, sample=2)
        >>> bank.enqueue(torch.eye(2)[None], torch.zeros(1, 2, 2), torch.tensor([False]))
        >>> voxels, instances = bank.draw()
        >>> voxels.tolist(), instances
        ([[1.0, 0.0], [0.0, 1.0]], None)
    """

    voxel_moments: Tensor
    instance_moments: Tensor
    has_instances: Tensor
    seen: Tensor

    def __init__(self, channels: int, capacity: int = 32, sample: int = 12, seed: int = 0) -> None:
        super().__init__()
        if min(channels, capacity, sample) < 1 or sample > capacity:
            raise ValueError(
                "`channels`, `capacity` and `sample` must be at least 1 and `sample` at most `capacity`, "
                f"got {channels}, {capacity} and {sample}."
            )
        self.sample = sample
        self.seed = seed
        self.register_buffer("voxel_moments", torch.zeros(capacity, channels, channels))
        self.register_buffer("instance_moments", torch.zeros(capacity, channels, channels))
        self.register_buffer("has_instances", torch.zeros(capacity, dtype=torch.bool))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        """Number of images in the memory."""
        return min(int(self.seen), len(self.has_instances))

    def draw(self) -> tuple[Tensor | None, Tensor | None]:
        """Mean second moments of at most `sample` images, drawn without replacement.

        Returns:
            Of voxels and of instances, (C, C) each; None where no image drawn has any. The same until `enqueue`.
        """
        if not len(self):
            return None, None
        generator = torch.Generator().manual_seed(self.seed + int(self.seen))
        chosen = torch.randperm(len(self), generator=generator)[: self.sample].to(self.seen.device)
        with_instances = chosen[self.has_instances[chosen]]
        instances = self.instance_moments[with_instances].mean(0) if len(with_instances) else None
        return self.voxel_moments[chosen].mean(0), instances

    @torch.no_grad()
    def enqueue(self, voxel_moments: Tensor, instance_moments: Tensor, has_instances: Tensor) -> None:
        """Keep the images of a step; the oldest give way.

        Args:
            voxel_moments: shape (B, C, C), see `medkd.ops.instances.second_moment`.
            instance_moments: likewise, of the unit nodes.
            has_instances: shape (B,), bool; images without instances are left out of relations to instances.
        """
        if voxel_moments.shape[1:] != self.voxel_moments.shape[1:]:
            raise ValueError(
                f"`voxel_moments` must have shape (B, {', '.join(map(str, self.voxel_moments.shape[1:]))}), got "
                f"{tuple(voxel_moments.shape)}; `channels` is that of the teacher's embedding."
            )
        capacity, batch = len(self.has_instances), len(voxel_moments)
        kept = slice(max(0, batch - capacity), batch)
        places = (self.seen + torch.arange(batch, device=self.seen.device))[kept] % capacity
        for memory, new in (
            (self.voxel_moments, voxel_moments), (self.instance_moments, instance_moments),
            (self.has_instances, has_instances),
        ):
            memory[places] = new[kept].to(memory)
        self.seen += batch
