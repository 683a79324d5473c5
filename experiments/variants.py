"""Routed blocks that differ from mod.py's in one thing, for the ablations of isoflop.py."""

import torch
import torch.nn as nn

from mod import RoutedBlock


class OtherGate(RoutedBlock):
    """The picks stay those of the raw router weights; what multiplies the update is `gate` of them."""

    def pick_topk(self, r):
        picked, weight = super().pick_topk(r)
        return picked, self.gate(weight)

    def pick_causal(self, r, taken, k):
        picked, weight = super().pick_causal(r, taken, k)
        return picked, self.gate(weight) * taken.gather(1, picked)  # padding keeps its weight of 0


class NoGate(OtherGate):
    """The update as it is. No gradient of the language model reaches the router, which so stays random."""

    def gate(self, weight):
        return torch.ones_like(weight)


class SigmoidGate(OtherGate):
    """Squashed to (0, 1), as many re-implementations do."""

    def gate(self, weight):
        return weight.sigmoid()


class LoudRouter(RoutedBlock):
    """Router weights ten times as large from the first step on, and ten times as fast to learn."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.router = TenTimes(config.n_embd, 1, bias=False)


class TenTimes(nn.Linear):
    def forward(self, x):
        return 10 * super().forward(x)


class Explorer(RoutedBlock):
    """Picks with noise, at first mostly noise, then less and less: half of it after each 250 training steps."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.register_buffer("passes", torch.zeros(()))  # in the checkpoint, so that a resumed run knows it

    def scores(self, r):
        if not self.training:
            return r
        noise = 3 * 0.5 ** (self.passes / 250)
        self.passes += 1
        return r + noise * r.detach().std() * torch.randn_like(r)


VARIANTS = {"no gate": NoGate, "sigmoid gate": SigmoidGate, "router x 10": LoudRouter, "explores": Explorer}
