# SPDX-License-Identifier: Apache-2.0
"""Where a network sees evidence for each class: one map per class, from the features that its linear head reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from medkd.checks import check_maps
from medkd.ops.attention import attention_map
from medkd.ops.precision import at_least_float32

__all__ = ["ClassAttention", "class_attention", "gradient_weights", "head_matrix", "head_mismatch"]

ClassAttention = Literal["at_plus", "positive_weight", "gradcam", "signed", "activation"]
_AT_ONCE = 2**20           # numbers of a block of channels: 4 MiB, and at least one channel


def class_attention(
    maps: Tensor, weight: Tensor | None = None, variant: ClassAttention = "at_plus", pooled: bool = True
) -> Tensor:
    """Attention maps of all classes in closed form: products of 1 x 1 with the head's weight, no second backward pass.

    Of scores z = W mean_u A(u) + b the Grad-CAM weight of a channel is W_ck / N at every position and in every sample,
    so neither value nor gradient needs autograd. With a = A_k(u) and w = W_ck / N a map is, summed over channels k:

    | `variant` | | |
    |---|---|---|
    | `at_plus` | sum relu(w a) | the released code: both positive, or both negative |
    | `positive_weight` | sum relu(w) a | "strictly positive gradients"; the same where no feature is negative |
    | `gradcam` | relu(sum w a) | Grad-CAM |
    | `signed` | sum w a | CAM; its sum over positions is the score without its bias |
    | `activation` | mean a^2 | no class and no weight: one map, plain attention transfer |

    Where a feature, a weight, or the sum of `gradcam` is 0 the gradient is 0.

    Args:
        maps: features A that the head reads, shape (B, K, *S), floating.
        weight: of the head, shape (C, K), or (B, C, K) as `gradient_weights` gives it; not read by `activation`.
        variant: as above.
        pooled: whether the head reads the mean over positions: maps are divided by their number N. False for a head
            that reads each position, as in segmentation, where the score is the sum of logits, and for gradients.

    Returns:
        Shape (B, C, *S), of `activation` (B, 1, *S); at least float32, also under autocast. Kept for backward are
        `maps` and `weight`, and never an array of C x K maps.

    Raises:
        ValueError: unknown variant, no floating maps, a weight that is missing or does not fit.

    Reference:
        del Amor et al., Attention to detail: inter-resolution knowledge distillation, arXiv 2401.06010, released code;
        Selvaraju et al., Grad-CAM, arXiv 1610.02391; Zagoruyko and Komodakis, arXiv 1612.03928 (`activation`).

    Example:
        >>> maps = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [1.0, -1.0]]]])
        >>> weight = torch.tensor([[1.0, -1.0], [0.5, 2.0]])
        >>> class_attention(maps, weight).tolist()
        [[[[0.25, 0.0], [0.0, 0.75]], [[0.125, 0.5], [0.5, 0.25]]]]
    """
    check_maps("maps", maps)
    if variant not in get_args(ClassAttention):
        raise ValueError(f"`variant` must be one of {get_args(ClassAttention)}, got {variant!r}.")
    if variant == "activation":
        return attention_map(maps, exponent=2.0)
    if weight is None:
        raise ValueError(f"`weight` must be the head's, shape (C, K), for variant {variant!r}, got None.")
    if weight.dim() not in (2, 3) or weight.shape[-1] != maps.shape[1]:
        raise ValueError(
            f"`weight` must have shape (C, {maps.shape[1]}), one column for each channel of the features, or "
            f"(B, C, {maps.shape[1]}), got {tuple(weight.shape)}; tap the layer whose mean the head reads."
        )
    dtype = torch.promote_types(at_least_float32(maps[:0]).dtype, at_least_float32(weight[:0]).dtype)
    weight = weight.to(dtype) / (maps[0, 0].numel() if pooled else 1)
    with torch.autocast(maps.device.type, enabled=False):
        if variant == "at_plus":
            flat: Tensor = _ProductAttention.apply(maps, weight)   # type: ignore[no-untyped-call]
        else:
            factors = weight.relu() if variant == "positive_weight" else weight
            flat = torch.matmul(factors, maps.flatten(2).to(dtype))                    # (B, C, N)
        result = flat.view(len(maps), -1, *maps.shape[2:])
        return result.relu() if variant == "gradcam" else result


class _ProductAttention(torch.autograd.Function):
    """Sum over channels of relu(w a) = relu(w) relu(a) + relu(-w) relu(-a); autograd would keep both parts of a."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(maps, weight)
        flat = maps.flatten(2)                                     # (B, K, N)
        positive, negative = _batched(weight.relu(), len(flat)), _batched((-weight).relu(), len(flat))
        total = weight.new_zeros(len(flat), weight.shape[-2], flat.shape[2])
        for part in _blocks(flat):
            block = flat[:, part].to(weight.dtype)
            total.baddbmm_(positive[..., part], block.relu())
            total.baddbmm_(negative[..., part], block.neg().relu_())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        maps, weight = ctx.saved_tensors
        needs_maps, needs_weight = ctx.needs_input_grad
        flat = maps.flatten(2)
        positive, negative = _batched(weight.relu(), len(flat)).mT, _batched((-weight).relu(), len(flat)).mT
        pull = torch.empty_like(flat) if needs_maps else None
        lever = weight.new_empty(len(flat), *weight.shape[-2:]) if needs_weight else None
        with torch.autocast(maps.device.type, enabled=False):
            for part in _blocks(flat):
                block = flat[:, part].to(weight.dtype)
                if pull is not None:
                    up, down = torch.bmm(positive[:, part], grad), torch.bmm(negative[:, part], grad)
                    pull[:, part] = up.mul_(block > 0).sub_(down.mul_(block < 0))
                if lever is not None:
                    up = torch.bmm(grad, block.relu().mT)          # (B, C, k)
                    down = torch.bmm(grad, block.neg().relu_().mT)
                    chosen = weight[..., part]
                    lever[..., part] = up.mul_(chosen > 0).sub_(down.mul_(chosen < 0))
        if lever is not None and weight.dim() == 2:
            lever = lever.sum(0)
        return None if pull is None else pull.view_as(maps), lever


def _batched(weight: Tensor, batch: int) -> Tensor:
    return weight.expand(batch, *weight.shape[-2:])


def _blocks(flat: Tensor) -> Iterator[slice]:
    step = max(1, _AT_ONCE // max(1, len(flat) * flat.shape[2]))
    return (slice(start, start + step) for start in range(0, flat.shape[1], step))


def gradient_weights(pred: Tensor, maps: Tensor, create_graph: bool = False) -> Tensor:
    """Grad-CAM weights by autograd: for layers from which a linear head does not read directly.

    One backward pass for each class, from the predictions to the layer. For a layer that the head averages it gives
    W / N in every sample, without calls what `class_attention` takes from the head's weight.

    Args:
        pred: logits with their graph, shape (B, C), or (B, C, *S), of which each class is summed over voxels; multiply
            them by a mask to explain a region (Seg-Grad-CAM). Samples must not depend on each other, as they do in a
            norm over the batch between the layer and the logits.
        maps: a layer on the way to them, shape (B, K, *s), with a gradient.
        create_graph: whether the weights have a gradient themselves; it needs kernels that can be derived twice.

    Returns:
        Shape (B, C, K), for `class_attention` with `pooled` false.

    Raises:
        ValueError: the prediction does not depend on the layer.

    Reference:
        del Amor et al., arXiv 2401.06010, released code; Vinogradova et al., Seg-Grad-CAM, arXiv 2002.11434.

    Example:
        >>> maps = torch.ones(1, 2, 2, 2, requires_grad=True)
        >>> pred = maps.mean((2, 3)) @ torch.tensor([[4.0], [-8.0]])
        >>> gradient_weights(pred, maps).tolist()
        [[[1.0, -2.0]]]
    """
    check_maps("maps", maps)
    scores = pred.flatten(2).sum(2) if pred.dim() > 2 else pred    # (B, C)
    weights = []
    for score in scores.sum(0):
        if not (score.requires_grad and maps.requires_grad):
            raise ValueError("`pred` must depend on `maps` by a graph, got tensors without one; run without no_grad.")
        (slope,) = torch.autograd.grad(score, maps, create_graph=create_graph, retain_graph=True, allow_unused=True)
        if slope is None:
            raise ValueError("`maps` must be a layer on the way to `pred`, got one that it does not depend on.")
        weights.append(at_least_float32(slope).flatten(2).mean(2))                     # (B, K)
    return torch.stack(weights, 1)


def head_matrix(name: str, weight: Tensor) -> Tensor:
    """Give the weight of a linear layer or of a 1 x 1 convolution as a matrix (C, K).

    Args:
        name: what to call it in a message.
        weight: shape (C, K), or (C, K, 1, ...).

    Raises:
        ValueError: the kernel has more than one position, or it is no such weight.

    Example:
        >>> head_matrix("head", torch.zeros(3, 8, 1, 1, 1)).shape
        torch.Size([3, 8])
    """
    if weight.dim() < 2 or weight[:1, :1].numel() != 1:
        raise ValueError(
            f"`{name}` must be the weight of a linear layer (C, K) or of a 1 x 1 convolution (C, K, 1, ...), got "
            f"{tuple(weight.shape)}; its path is that of the parameter, such as 'head.weight'."
        )
    return weight.flatten(1)


def head_mismatch(pred: Tensor, maps: Tensor, weight: Tensor, pooled: bool = True) -> float:
    """Tell how far predictions are from what a head of this weight makes of features, whatever its bias is.

    Args:
        pred: logits, shape (B, C), or (B, C, *S) of a head that reads each position.
        maps: shape (B, K, *S).
        weight: shape (C, K).
        pooled: whether the head reads the mean over positions.

    Returns:
        0 for those that it makes; above about 0.1 the head reads something else. 0 also where it cannot be told: a
        batch of one for `pooled`, or predictions of another grid than the features.

    Example:
        >>> maps, weight = torch.rand(4, 2, 3, 3), torch.tensor([[1.0, -2.0]])
        >>> head_mismatch(maps.mean((2, 3)) @ weight.T + 5.0, maps, weight) < 1e-5
        True
    """
    weight = at_least_float32(weight.detach())
    features = at_least_float32(maps.detach()).flatten(2)          # (B, K, N)
    features = features.mean(2, keepdim=True) if pooled else features
    logits = at_least_float32(pred.detach())
    logits = logits.flatten(2) if pred.dim() > 2 else logits.unsqueeze(2)
    if logits.shape[2] != features.shape[2] or logits.shape[1] != len(weight):
        return 0.0
    made = torch.matmul(weight, features.to(weight.dtype))
    rest = _varying(logits - made)
    # by how much predictions vary, and a tenth of their size, so that rounding of half precision is no mismatch
    size = _varying(logits).abs().amax() + 0.1 * (logits.abs().amax() + made.abs().amax())
    return float(rest.abs().amax() / size.clamp(min=torch.finfo(size.dtype).tiny))


def _varying(logits: Tensor) -> Tensor:
    return logits - logits.mean((0, 2), keepdim=True)
