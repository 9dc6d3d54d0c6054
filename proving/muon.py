"""Muon for weight matrices and convolutions, Adam for the rest: short trainings on a CPU converge sooner with it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix [rows, columns], roughly (quintic Newton-Schulz)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    for _ in range(steps):
        square = x @ x.T
        x = a * x + torch.addmm(b * square, square, square, alpha=c) @ x
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Momentum, then an orthogonalised update of each weight seen as a matrix [out, everything else]."""

    def __init__(self, weights: Iterable[nn.Parameter], lr: float = 0.02, momentum: float = 0.95, decay: float = 0.0):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight.grad)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["decay"])
                weight.add_(orthogonalise(update).view_as(weight), alpha=-group["lr"] * scale)
