"""
Mixture-of-Depths-and-Experts (MoDE): routing over depth and over experts together (§4.3 of the paper, see mod.py).

A mixture of experts (MoE) replaces the MLP in every block that mod.py would route. This gives three models:

    MoE          attention for every token, then the experts
    staged       a Mixture-of-Depths router around the whole block, experts for the tokens that it picks
    integrated   like MoE, with no-op experts beside the real ones, so a token can choose the residual stream

Letters as in mod.py; E experts.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from mod import GPT, Block, GPTConfig, RoutedBlock, capacity_in_tokens, linear_flops, no_autocast


@dataclass
class MoDEConfig(GPTConfig):
    n_expert: int = 4  # experts that replace the MLP in each routed block (in train.py 0 keeps the MLP)
    n_noop: int = 0  # no-op experts beside the real ones, for integrated MoDE
    expert_capacity: float = 0.25  # share of a block's tokens that each expert processes, in (0, 1]
    staged: bool = False  # True: experts inside a routed block (staged MoDE); False: every token gets attention

    def __post_init__(self):
        super().__post_init__()
        if self.n_expert < 0 or self.n_noop < 0 or self.n_expert + self.n_noop < 2:
            raise ValueError(
                f"with experts, n_expert + n_noop must be at least 2, got {self.n_expert} + {self.n_noop}: the softmax "
                "over a single expert is always 1, so its router would learn nothing"
            )
        if not 0 < self.expert_capacity <= 1:
            raise ValueError(f"expert_capacity is a fraction in (0, 1], got {self.expert_capacity:g}")
        if self.variant or self.causal_method != "predictor":
            raise ValueError("with experts, causal_method must be predictor and variant empty")


class Experts(nn.Module):
    """n_expert MLPs side by side: expert e processes x[e]."""

    def __init__(self, config):
        super().__init__()
        E, C = config.n_expert, config.n_embd
        self.c_fc = nn.Parameter(torch.empty(E, C, 4 * C))
        self.c_proj = nn.Parameter(torch.empty(E, 4 * C, C))
        # Biases are stored as vectors, because weight decay applies to everything with more dimensions.
        self.c_fc_bias = nn.Parameter(torch.zeros(E * 4 * C)) if config.bias else None
        self.c_proj_bias = nn.Parameter(torch.zeros(E * C)) if config.bias else None
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.c_fc, std=0.02)
        nn.init.normal_(self.c_proj, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, x):
        h = F.gelu(self.linear(x, self.c_fc, self.c_fc_bias), approximate="tanh")  # (E, n, 4 C)
        return self.dropout(self.linear(h, self.c_proj, self.c_proj_bias))  # (E, n, C)

    def linear(self, x, weight, bias):
        if bias is None:
            return torch.bmm(x, weight)
        return torch.baddbmm(bias.view(len(weight), 1, weight.size(-1)), x, weight)

    def flops(self, n):
        return 2 * n * (self.c_fc.numel() + self.c_proj.numel())


class Mixture(nn.Module):
    """
    A mixture of experts in place of an MLP:

        p_i = softmax(W x_i) over experts and no-ops, never over tokens, so that a weight cannot depend on later ones
        y_i = the sum of p_ie MLP_e(x_i) over the real experts e that take token i

    Expert choice, as in MoD: each real expert takes the k tokens of the sequence with its largest p_e. Several experts
    may take a token, or none; then y_i = 0. A no-op changes which tokens are taken, not how many: it lowers the
    probability that is left for the real experts.

    Causally, expert e takes the tokens whose logit e is positive, as in RoutedBlock. A predictor behind a stop-gradient
    learns to predict top-k. The weight is still p. Each pass leaves `taken` and `logits` (B, T, E). In a staged block
    T counts the tokens that the block computes, fillers of a causal pass included (their gate is 0).
    """

    has_routing_loss = True

    def __init__(self, config):
        super().__init__()
        self.capacity = config.expert_capacity
        self.n_expert = config.n_expert
        self.routing = "topk"  # set by the block, which passes an MLP nothing but x
        self.taken = self.logits = None
        self.router = nn.Linear(config.n_embd, config.n_expert + config.n_noop, bias=False)
        self.predictor = nn.Sequential(
            nn.Linear(config.n_embd, config.predictor_hidden),
            nn.GELU(),
            nn.Linear(config.predictor_hidden, config.n_expert),
        )
        self.experts = Experts(config)

    def forward(self, x):
        C = x.size(-1)
        with no_autocast(x):  # as in RoutedBlock
            z = x.to(self.router.weight.dtype)
            p = self.router(z).softmax(dim=-1)[..., : self.n_expert]  # (B, T, E): without the no-ops' share
            self.logits = self.predictor(z.detach())  # (B, T, E)
        picked, weight = self.pick_topk(p) if self.routing == "topk" else self.pick_causal(p)  # (E, n) each
        tokens, index = x.flatten(0, 1), picked.flatten()  # (B * T, C), (E * n,)
        update = weight.unsqueeze(-1) * self.experts(tokens.index_select(0, index).view(*picked.shape, C))  # (E, n, C)
        return torch.zeros_like(tokens).index_add(0, index, update.flatten(0, 1).to(x.dtype)).view_as(x)

    def pick_topk(self, p):
        """For each expert the k tokens per row with its largest p: their places in the flattened batch, and their p."""
        B, T, E = p.shape
        k = capacity_in_tokens(self.capacity, T)
        picked = p.topk(k, dim=1).indices  # (B, k, E), in any order: an MLP treats each token alone
        self.taken = torch.zeros_like(p, dtype=torch.bool).scatter(1, picked, True)  # (B, T, E)
        first = torch.arange(0, B * T, T, device=p.device)[:, None, None]
        return (picked + first).flatten(0, 1).T, p.gather(1, picked).flatten(0, 1).T  # (E, B * k)

    def pick_causal(self, p):
        """
        For each expert the tokens with positive logits, and their p: (E, n) each, n for the busiest expert.

        The other experts are filled up with tokens of weight 0. This is simple, but all compute when one does.
        """
        self.taken = self.logits > 0  # (B, T, E)
        taken = self.taken.flatten(0, 1)  # (B * T, E)
        n = max(taken.sum(dim=0).tolist(), default=0)
        picked = (~taken).int().argsort(dim=0, stable=True)[:n]  # (n, E)
        return picked.T, p.flatten(0, 1).masked_fill(~taken, 0.0).gather(0, picked).T

    def flops(self, T, taken=None):
        """taken: the number of tokens of the busiest expert; None: top-k."""
        n = capacity_in_tokens(self.capacity, T) if taken is None else taken
        return linear_flops(self.router, T) + linear_flops(self.predictor, T) + self.experts.flops(n)

    def __getstate__(self):
        return {**self.__dict__, "taken": None, "logits": None}  # as in RoutedBlock


class WithExperts:
    """Turns a block of mod.py into one with a mixture of experts."""

    def __init__(self, config, *layer):
        super().__init__(config, *layer)
        self.mlp = Mixture(config)

    def forward(self, x, positions, routing="topk", cache=None):
        self.mlp.routing = routing
        self.mlp.taken = self.mlp.logits = None  # a staged block that takes no token never calls its experts
        return super().forward(x, positions, routing, cache)

    def flops(self, T, taken=None):
        """taken: a pair, the tokens that reach the experts and those of the busiest expert; None: top-k."""
        if taken is None:
            return super().flops(T)
        n, at_busiest = taken
        return super().flops(T, n) - self.mlp.flops(n) + self.mlp.flops(n, at_busiest)


class MixtureBlock(WithExperts, Block):
    """MoE and integrated MoDE: attention for every token, then the experts."""

    @property
    def taken(self):
        """(B, T): the tokens that any expert took. Attention is for all."""
        return None if self.mlp.taken is None else self.mlp.taken.any(dim=-1)


class StagedBlock(WithExperts, RoutedBlock):
    """Staged MoDE: only the tokens that the block takes reach attention and the experts."""


class MoDE(GPT):
    """The GPT of mod.py with experts in each block that its config routes."""

    def make_block(self, layer):
        if not self.config.is_routed(layer):
            return Block(self.config)
        return StagedBlock(self.config, layer) if self.config.staged else MixtureBlock(self.config)


def build(config):
    """The model that a GPTConfig or MoDEConfig describes, with random weights."""
    return MoDE(config) if isinstance(config, MoDEConfig) else GPT(config)


def config_class(options):
    """MoDEConfig if a dict of options asks for experts, otherwise GPTConfig."""
    return MoDEConfig if options.get("n_expert") else GPTConfig


def forward_flops(config, T, taken=None):
    """`flops` of the model that a config describes, without allocating its weights."""
    with torch.device("meta"):
        return build(config).flops(T, taken)
