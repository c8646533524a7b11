"""What the engine must compute, written out by hand: gradients of all ranks, then AdamW."""

from collections.abc import Collection, Mapping

import torch
from engines import OPTIMIZER, STILL, batch
from torch import Tensor

from stacking import distributed
from stacking.modeling import BertForPreTraining
from stacking.snapshot import MOMENTS, Snapshot


def gradients(
    weights: Mapping[str, Tensor],
    trained: Collection[str],
    step: int,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Mean over all ranks of each one's gradient of its mean loss, computed in `dtype`.

    Where no position trains the embeddings are frozen: a tied decoder has its own gradient alone.
    """
    model = BertForPreTraining(STILL).to(dtype)
    model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()})
    if "embeddings.position_embeddings.weight" not in trained:
        model.embeddings.register_forward_hook(lambda *given: given[-1].detach())
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros(parameters[name].shape, dtype=torch.float64) for name in trained}
    for rank in range(distributed.world_size()):
        one = batch(step, rank)
        sums = model(
            one.input_ids, one.token_type_ids, None, one.masked_lm_positions, one.masked_lm_ids,
            one.next_sentence_labels,
        )  # fmt: skip
        loss = sums["mlm_loss_sum"] / 6 + sums["nsp_loss_sum"] / 3
        found = torch.autograd.grad(loss, [parameters[name] for name in trained])
        for name, gradient in zip(trained, found, strict=True):
            total[name] += gradient.double() / distributed.world_size()
    return total


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Euclidean norm of all their numbers together."""
    return float(torch.stack([tensor.square().sum() for tensor in tensors.values()]).sum().sqrt())


def worst_share(
    ours: Mapping[str, Tensor],
    by_hand: Mapping[str, Tensor],
    since: Mapping[str, Tensor] | None = None,
) -> float:
    """Largest distance of a tensor from that by hand, as a share of its size or way `since`."""
    starts = since or {name: torch.zeros(()) for name in ours}
    return max(
        float((tensor - by_hand[name]).norm() / (by_hand[name] - starts[name]).norm())
        for name, tensor in ours.items()
    )


class HandWrittenAdam:
    """AdamW in float64 (Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2).

    Every parameter has its own step count; the gradient is clipped by its global norm.
    """

    def __init__(self, start: Snapshot) -> None:
        self.weights = {name: weight.double() for name, weight in start.weights.items()}
        self.moments = {
            key: {
                name: start.moments.get(key, {}).get(name, torch.zeros_like(weight)).double()
                for name, weight in self.weights.items()
            }
            for key in MOMENTS
        }
        self.counts = {name: start.optimizer_steps.get(name, 0) for name in start.weights}
        self.new_names = start.new_names
        self.clipped_steps = 0

    def step(self, found: Mapping[str, Tensor], rate: float, new_rate: float) -> None:
        """One update of the parameters that have a gradient."""
        beta1, beta2 = OPTIMIZER.betas
        clip = min(1.0, OPTIMIZER.max_grad_norm / norm(found))
        self.clipped_steps += clip < 1
        for name, gradient in found.items():
            weight, alpha = self.weights[name], new_rate if name in self.new_names else rate
            self.counts[name] += 1
            mean = beta1 * self.moments["exp_avg"][name] + (1 - beta1) * clip * gradient
            square = beta2 * self.moments["exp_avg_sq"][name] + (1 - beta2) * (clip * gradient) ** 2
            self.moments["exp_avg"][name], self.moments["exp_avg_sq"][name] = mean, square
            mean_hat = mean / (1 - beta1 ** self.counts[name])
            square_hat = square / (1 - beta2 ** self.counts[name])
            decay = OPTIMIZER.weight_decay if weight.ndim > 1 else 0.0
            direction = mean_hat / (square_hat.sqrt() + OPTIMIZER.eps)
            self.weights[name] = weight - alpha * (direction + decay * weight)
