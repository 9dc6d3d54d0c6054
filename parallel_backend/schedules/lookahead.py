"""Temporary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class Decision:
    exact: bool
    ahead: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    drift: float = 0.0


class Lookahead:
    def __init__(self, sigmas: Sequence[float], depth: int, warmup: int, bound: float, spacing: int | None = None):
        self.sigmas = [float(s) for s in sigmas]
        self.n = len(self.sigmas) - 1
        self.depth, self.warmup, self.bound = depth, warmup, bound
        self.spacing = spacing or (1 if depth < 3 else 2)
        self.history: dict[int, torch.Tensor] = {}
        self.predicted: dict[int, torch.Tensor] = {}
        self.flying: set[int] = set()

    def slope(self, j):
        return (self.history[j + 1] - self.history[j]) / (self.sigmas[j + 1] - self.sigmas[j])

    def predict(self, i, target):
        x = self.history[i]
        a, b = i - 1, i - 1 - self.spacing
        if b < 0:
            return None
        sa, sb = self.slope(a), self.slope(b)
        for k in range(i, target):
            s = sa + (sa - sb) * ((k - a) / self.spacing)
            x = x + (self.sigmas[k + 1] - self.sigmas[k]) * s
        return x

    def step(self, i: int, x: torch.Tensor) -> Decision:
        self.history[i] = x
        self.history = {k: v for k, v in self.history.items() if k > i - 3 - self.spacing}
        drift = 1.0
        if i in self.predicted:
            p = self.predicted.pop(i)
            drift = float(((p - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)).max())
        ok = drift <= self.bound and i >= self.warmup and i < self.n - 1
        exact = not (ok and i in self.flying)
        if exact:
            self.flying.clear()
        self.flying.discard(i)
        ahead = []
        trusted = drift <= self.bound if not self.warmup else i >= self.warmup - 1
        for target in range(i + 1, min(i + self.depth + 1, self.n - 1)):
            if target in self.flying:
                continue
            p = self.predict(i, target)
            if p is None:
                break
            if target not in self.predicted or trusted:
                self.predicted[target] = p
            if trusted:
                ahead.append((target, p))
                self.flying.add(target)
        return Decision(exact, ahead, drift)
