"""
Routed blocks that change one thing about the one in mod.py:

    python train.py config/shakespeare_mod.py --variant=sigmoid_gate

To try an idea, write a class above VARIANTS, at the end of this file, and give it a name there. The name is part of the
model's config, so a checkpoint records it. Keep the attribute names `router` and `predictor`: train.py clips the
gradients of predictors separately, and both stay float32 when cache.py stores a model in bfloat16. A variant without a
predictor draws fewer random numbers, so the same seed gives it other initial weights.
"""

import torch

from mod import RoutedBlock, capacity_in_tokens

# Other gates, routers and scores


class NoGate(RoutedBlock):
    """
    Adds the update as it is. The language-model loss then never reaches the router; with a predictor, the router stays
    random. (Not for several GPUs: DistributedDataParallel refuses parameters without a gradient.)
    """

    def gate(self, r):
        return torch.ones_like(r)


class SigmoidGate(RoutedBlock):
    """Squashes the gate to (0, 1). The ranking stays the same."""

    def gate(self, r):
        return r.sigmoid()


class LoudRouter(RoutedBlock):
    """Router weights are 10 times as large from the first step, and learn 10 times as fast."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.router.register_forward_hook(lambda router, x, r: 10 * r)


class ExploringNoise(RoutedBlock):
    """Adds noise to the scores in training: at first 3 of their standard deviations, halved every 250 passes."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.register_buffer("passes", torch.zeros(()))  # a buffer, so a resumed run continues with it

    def scores(self, r):
        if not self.training:
            return r
        noise = 3 * 0.5 ** (self.passes / 250)
        self.passes += 1
        return r + noise * r.detach().std() * torch.randn_like(r)


# Controls: which tokens to take is not learned. The causal decision is a fixed number for each position.


class Control(RoutedBlock):
    """A subclass has make_rule(...), which returns (block_size,): positive where the causal pass takes the token."""

    has_routing_loss = False

    def __init__(self, config, layer):
        super().__init__(config, layer)
        rule = self.make_rule(config.block_size, self.capacity, layer)
        self.register_buffer("rule", rule, persistent=False)  # (block_size,)

    def causal_logits(self, x, r, positions):
        return self.rule[positions]


class Stochastic(Control):
    """
    Top-k of Gaussian noise, new in each pass. Causal: each position is taken with probability `capacity`, drawn once
    per block, because a token's fate must not change as the text grows.
    """

    def make_rule(self, block_size, capacity, layer):
        return capacity - torch.rand(block_size, generator=torch.Generator().manual_seed(layer))

    def scores(self, r):
        return torch.randn_like(r)


class Position(Control):
    """Evenly spaced positions in every sequence, with top-k and causally: at 12.5% tokens 7, 15, 23, ..."""

    def make_rule(self, block_size, capacity, layer):
        positions = torch.arange(block_size + 1, dtype=torch.float64)
        taken = (positions * capacity + 1e-9).floor().diff()  # 1 where the token is taken, otherwise 0
        # A sequence shorter than 1 / capacity has none. There the slope makes top-k take the first token.
        return (taken - positions[1:] / (block_size + 1)).float()

    def scores(self, r):
        return self.rule[: r.size(1)].expand_as(r)


# Other blocks, capacities and causal rules


class AttentionOnly(RoutedBlock):
    """Routes attention only; the MLP processes every token."""

    def update(self, x, positions, cache=None):
        return self.attn(self.ln_1(x), positions, cache)

    def forward(self, x, positions, routing="topk", cache=None):
        x = super().forward(x, positions, routing, cache)
        return x + self.mlp(self.ln_2(x))

    def update_flops(self, T):
        return self.attn.flops(T)

    def flops(self, T, taken=None):
        return super().flops(T, taken) + self.mlp.flops(T)


class FallingCapacity(RoutedBlock):
    """The capacity falls linearly with depth, from at most twice `capacity` towards 0; the mean is about `capacity`."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.capacity = min(1.0, 2 * config.capacity * (1 - layer / config.n_layer))


class ExpertThreshold(RoutedBlock):
    """
    Without predictor and routing loss: a token is taken if its router weight exceeds a moving average of the smallest
    weight that top-k took in training. arXiv:2603.11535 does this for experts.
    """

    has_routing_loss = False

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.register_buffer("mean", torch.zeros(()))  # moving average of the smallest weights; it begins at 0
        self.register_buffer("ones", torch.zeros(()))  # the same average of 1, to divide by: Adam's bias correction

    def scores(self, r):
        if self.training:
            smallest = r.detach().topk(capacity_in_tokens(self.capacity, r.size(1)), dim=1).values[:, -1]  # (B,)
            self.mean.lerp_(smallest.mean(), 0.05)
            self.ones.lerp_(torch.ones_like(self.ones), 0.05)
        return r

    def causal_logits(self, x, r, positions):
        return r - self.mean / self.ones.clamp(min=1e-6)


VARIANTS = {
    "no_gate": NoGate,
    "sigmoid_gate": SigmoidGate,
    "loud_router": LoudRouter,
    "exploring_noise": ExploringNoise,
    "stochastic": Stochastic,
    "position": Position,
    "attention_only": AttentionOnly,
    "falling_capacity": FallingCapacity,
    "expert_threshold": ExpertThreshold,
}
