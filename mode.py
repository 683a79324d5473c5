"""
Mixture-of-Depths-and-Experts (MoDE): routing over depth and over experts together (§4.3 of the paper, see mod.py).

A mixture of experts (MoE) takes the place of the MLP in every block that mod.py would route. Three models come of it:

    MoE          attention for every token, then the experts
    staged       the router of Mixture-of-Depths around the whole block; experts for the tokens that it picks
    integrated   as MoE, with no-op experts beside the real ones: a token can choose the residual stream

Built on mod.py, whose letters it keeps; E experts.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from mod import GPT, Block, GPTConfig, RoutedBlock


@dataclass
class MoDEConfig(GPTConfig):
    n_expert: int = 4  # real experts, each an MLP of the usual size
    n_noop: int = 0  # no-op experts: in the same softmax, but they take no tokens and compute nothing
    expert_capacity: float = 0.25  # share of the block's tokens that each real expert processes, in (0, 1]
    staged: bool = False  # True: the block's own router first picks the tokens, `capacity` of them

    def __post_init__(self):
        super().__post_init__()
        if self.n_expert < 0 or self.n_noop < 0 or self.n_expert + self.n_noop < 1:
            raise ValueError(f"n_expert and n_noop count experts, got {self.n_expert} and {self.n_noop}")
        if not 0 < self.expert_capacity <= 1:
            raise ValueError(f"expert_capacity is a fraction in (0, 1], got {self.expert_capacity:g}")
        if self.selection != "learned" or self.causal_method != "predictor":
            raise ValueError("with experts, selection must be learned and causal_method predictor")

    def expert_capacity_in_tokens(self, T):
        """How many of T tokens each expert takes under top-k, at least one."""
        return max(1, math.floor(self.expert_capacity * T + 1e-9))

    def routed_block_flops(self, T, taken=None):
        """taken, of a batch of one: (the tokens that come to the experts, those of the busiest one); None: top-k."""
        C, h, E = self.n_embd, self.predictor_hidden, self.n_expert
        if taken is None:
            n = self.capacity_in_tokens(T) if self.staged else T
            taken = n, self.expert_capacity_in_tokens(n)
        n, at_each = taken
        around = 8 * n * C * C + 4 * n * n * C + (self.decision_flops(T) if self.staged else 0)
        decision = 2 * n * C * (E + self.n_noop) + 2 * n * (C * h + h * E)
        return around + decision + 16 * E * at_each * C * C


class Experts(nn.Module):
    """n_expert MLPs side by side: expert e processes x[e]."""

    def __init__(self, config):
        super().__init__()
        E, C = config.n_expert, config.n_embd
        self.c_fc = nn.Parameter(torch.empty(E, C, 4 * C))
        self.c_proj = nn.Parameter(torch.empty(E, 4 * C, C))
        # Vectors, as all biases: weight decay is for what has more dimensions.
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


class Mixture(nn.Module):
    """
    A mixture of experts in place of an MLP.

        p_i = softmax(W x_i) over experts, no-ops included: never over tokens, so that a weight cannot see the future
        y_i = sum over the real experts e that take token i of p_ie MLP_e(x_i)

    Expert choice, as in MoD: each real expert takes the k tokens of the sequence with its largest p_e. A token may be
    taken by several experts or by none; then y_i = 0 and it stays what it was on the residual stream. A no-op changes
    which tokens are taken, not how many: what a token gives to it, the real experts do not see.

    Without the future, expert e takes the tokens whose e-th logit is positive, as in RoutedBlock: a predictor behind a
    stop-gradient learns to foretell top-k; the weight stays p. After a pass `taken` and `logits` are (B, T, E).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.routing = "topk"  # the block's, which sets it: mod.py calls an MLP with x alone
        self.taken = self.logits = None
        self.router = nn.Linear(config.n_embd, config.n_expert + config.n_noop, bias=False)
        self.predictor = nn.Sequential(
            nn.Linear(config.n_embd, config.predictor_hidden),
            nn.GELU(),
            nn.Linear(config.predictor_hidden, config.n_expert),
        )
        self.experts = Experts(config)

    def forward(self, x):
        B, T, C = x.shape
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # as in RoutedBlock
            p = self.router(x).softmax(dim=-1)[..., : self.config.n_expert]  # (B, T, E): the no-ops have had their part
            self.logits = self.predictor(x.detach())  # (B, T, E)
        picked, weight = self.pick_topk(p) if self.routing == "topk" else self.pick_causal(p)  # (E, n) each
        tokens = x.flatten(0, 1)  # (B * T, C)
        update = weight.unsqueeze(-1) * self.experts(tokens[picked])  # (E, n, C)
        y = torch.zeros_like(tokens, dtype=update.dtype).index_add(0, picked.flatten(), update.flatten(0, 1))
        return y.view(B, T, C)

    def pick_topk(self, p):
        """For each expert the k tokens of each row with its largest p, as places in the flattened batch; their p."""
        B, T, E = p.shape
        k = self.config.expert_capacity_in_tokens(T)
        picked = p.topk(k, dim=1).indices  # (B, k, E), in any order: an MLP treats each token alone
        self.taken = torch.zeros_like(p, dtype=torch.bool).scatter(1, picked, True)  # (B, T, E)
        row = torch.arange(B, device=p.device)[:, None, None] * T
        return (picked + row).flatten(0, 1).T, p.gather(1, picked).flatten(0, 1).T  # (E, B * k)

    def pick_causal(self, p):
        """
        For each expert the tokens with a positive logit, and their p; (E, n), n the tokens of the busiest expert.

        The others are padded, by weight 0: simple, but all experts compute when one of them takes a token.
        """
        self.taken = self.logits > 0  # (B, T, E)
        taken = self.taken.flatten(0, 1)  # (B * T, E)
        n = max(taken.sum(dim=0).tolist(), default=0)
        picked = (~taken).int().argsort(dim=0, stable=True)[:n]  # (n, E)
        return picked.T, p.flatten(0, 1).masked_fill(~taken, 0.0).gather(0, picked).T

    def __getstate__(self):
        return {**self.__dict__, "taken": None, "logits": None}


class WithExperts:
    """What makes a block of mod.py one with a mixture of experts."""

    def __init__(self, config, *layer):
        super().__init__(config, *layer)
        self.mlp = Mixture(config)

    def forward(self, x, routing="topk", past=None):
        self.mlp.routing = routing
        self.mlp.taken = self.mlp.logits = None  # a staged block that takes no token does not come to its experts
        return super().forward(x, routing, past)


class MixtureBlock(WithExperts, Block):
    """MoE and integrated MoDE: attention for every token, then the experts."""

    @property
    def taken(self):
        """(B, T): by any expert. Attention is for all."""
        return None if self.mlp.taken is None else self.mlp.taken.any(dim=-1)


class StagedBlock(WithExperts, RoutedBlock):
    """Staged MoDE: only the tokens that the block takes come to attention and to the experts."""


class MoDE(GPT):
    """The GPT of mod.py with experts in each block that its config would route."""

    def make_block(self, layer):
        if not self.config.is_routed(layer):
            return Block(self.config)
        return StagedBlock(self.config, layer) if self.config.staged else MixtureBlock(self.config)

    @property
    def deciders(self):
        return [module for module in self.modules() if isinstance(module, (RoutedBlock, Mixture))]


def kind_of(options):
    """The config class and the model class for a dict of options: those of mod.py where no experts are asked for."""
    return (MoDEConfig, MoDE) if options.get("n_expert") else (GPTConfig, GPT)
