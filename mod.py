"""
Mixture-of-Depths: a GPT in which every other block processes only the tokens it picks, and the rest skip it.

Raposo, Ritter, Richards, Lillicrap, Humphreys, Santoro, "Mixture-of-Depths: Dynamically allocating compute in
transformer-based language models", arXiv:2404.02258. A § in a comment is a section of that paper.

The file reads from top to bottom: the config; attention, MLP and block, as in GPT-2; the routed block, which is the
paper; the GPT. Three files build on it: cache.py samples with a KV cache, variants.py changes one thing in the routed
block, mode.py adds experts.

Letters in shapes: B batch, T time (tokens in a sequence), C channels (n_embd), nh heads, hs head size, k capacity (the
number of tokens that a routed block processes in each sequence).
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    # The comments are also the help texts of train.py.
    block_size: int = 1024  # context length: the most tokens the model sees at once
    vocab_size: int = 50304  # number of tokens; GPT-2 has 50,257, here padded to a multiple of 64
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # width
    dropout: float = 0.0  # probability of dropping an activation in training
    bias: bool = True  # biases in linear layers and LayerNorms, as in GPT-2
    capacity: float = 0.125  # share of the tokens that a routed block processes, in (0, 1]
    route_every: int = 2  # 2: blocks 1, 3, 5, ... are routed; 1: every block; 0: none, a plain dense GPT
    causal_method: Literal["predictor", "router"] = "predictor"  # picks tokens in sampling; router: those with r > 0
    predictor_hidden: int = 32  # hidden units of the predictor
    variant: str = ""  # a routed block from variants.py, such as sigmoid_gate; empty: the paper's

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "predictor_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.capacity <= 1:
            hint = f"; for {self.capacity:g}% write {self.capacity / 100:g}" if 1 < self.capacity <= 100 else ""
            raise ValueError(f"capacity is a fraction in (0, 1], got {self.capacity:g}{hint}")
        if self.n_embd % self.n_head:
            nearest = self.n_embd - self.n_embd % self.n_head or self.n_head
            raise ValueError(
                f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}; {nearest} would work"
            )
        if self.route_every < 0:
            raise ValueError(f"route_every is 0 (no block is routed), 1 (every block), 2, ...; got {self.route_every}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a probability in [0, 1), got {self.dropout:g}")
        if self.causal_method not in ("predictor", "router"):
            raise ValueError(f"causal_method must be predictor or router, got {self.causal_method!r}")
        routed_block_class(self.variant)  # raises ValueError for an unknown name

    def is_routed(self, layer):
        """True if block number `layer`, counted from 0, is a routed one."""
        return self.route_every > 0 and layer % self.route_every == self.route_every - 1


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, positions, cache=None):
        """x (B, T, C) in time order; in a routed block T is k. positions (B, T): the tokens' places in the text."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in (q, k, v))  # (B,nh,T,hs)
        # GPT-2 adds its positions at the embedding. Rotary embeddings would turn q and k by `positions` here.
        mask = None
        if cache is not None:
            k, v, mask = cache.append(k, v)  # all keys and values so far, the new ones last
        dropout = self.dropout if self.training else 0.0
        # With a cache, a single token sees every stored key; is_causal would show it the first one only. Without one,
        # do not look at T: torch.compile makes a length that varies symbolic, and is_causal must be a plain bool.
        causal = cache is None or (mask is None and T > 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))

    def flops(self, T):
        return linear_flops(self, T) + 4 * T * T * self.c_proj.in_features  # q @ k.T, and the sum over v


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # as in GPT-2, whose weights expect it
        return self.dropout(self.c_proj(x))

    def flops(self, T):
        return linear_flops(self, T)


class Block(nn.Module):
    """An ordinary transformer block. It processes every token; `routing` only matters to RoutedBlock."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, positions, routing="topk", cache=None):
        x = x + self.attn(self.ln_1(x), positions, cache)
        return x + self.mlp(self.ln_2(x))

    def update(self, x, positions, cache=None):
        """What `forward` adds to x, without x itself: f in equation (1). Change both alike; a test compares them."""
        h = self.attn(self.ln_1(x), positions, cache)
        return h + self.mlp(self.ln_2(x + h))

    def update_flops(self, T):
        return self.attn.flops(T) + self.mlp.flops(T)

    def flops(self, T, taken=None):
        return self.update_flops(T)


class RoutedBlock(Block):
    """
    A block that processes k tokens of each sequence. The rest skip it along the residual stream. Equation (1):

        x_i' = x_i + r_i * f_i(X~)   if token i is taken         r_i = w . x_i, the router weight, a raw scalar (§3.4)
        x_i' = x_i                   otherwise                   X~  = the taken tokens alone

    `routing` says how tokens are taken:

        topk     The block takes the k tokens with the largest r (expert choice, §3.2). This looks ahead: later tokens
                 decide whether token i is among the top k. Training may do that, sampling cannot.
        causal   The block takes the tokens whose `logits` are positive (§3.5). The logit of token i is computed from
                 x_i alone, which holds token i and its past but nothing later. It is trained to predict top-k.

    Each pass leaves its decisions on the block, for the routing loss, evaluation and pictures:

        taken    (B, T) bool   the tokens that the block processed
        logits   (B, T)        the causal decisions; positive means take

    Inside a pass, `picked` (B, k) lists the tokens to compute. In a causal pass some of them may be fillers, which are
    not taken.
    """

    has_routing_loss = True  # False in variants whose causal decisions are not trained

    def __init__(self, config, layer):
        super().__init__(config)
        self.capacity = config.capacity
        self.router = nn.Linear(config.n_embd, 1, bias=False)
        self.predictor = None  # predicts top-k; None where nothing trains it
        if self.has_routing_loss and config.causal_method == "predictor":
            self.predictor = nn.Sequential(
                nn.Linear(config.n_embd, config.predictor_hidden), nn.GELU(), nn.Linear(config.predictor_hidden, 1)
            )
        self.taken = self.logits = None

    def forward(self, x, positions, routing="topk", cache=None):
        # Routing runs in the dtype of the router's parameters: float32, also under autocast and after set_dtype in
        # cache.py. In bfloat16 many tokens would get the same r, and top-k would pick among them arbitrarily.
        with no_autocast(x):
            y = x.to(self.router.weight.dtype)
            r = self.router(y).squeeze(-1)  # (B, T)
            self.logits = self.causal_logits(y, r, positions)  # (B, T)
        if routing == "topk":
            return self.process(x, r, self.pick_topk(r), positions)
        return self.process_causal(x, r, positions, cache)

    def pick_topk(self, r):
        """The k tokens with the largest scores in each sequence, in time order (B, k)."""
        k = capacity_in_tokens(self.capacity, r.size(1))
        # topk sorts by score. Attention's causal mask only knows the order in which tokens arrive, so without the sort
        # a token would see later ones and miss earlier ones. Sort int32: on some Apple GPUs a sort of int64 is wrong
        # beyond 256 elements (PyTorch's issue 155560).
        picked = self.scores(r).topk(k, dim=1).indices.int().sort(dim=1).values.long()
        self.taken = torch.zeros_like(r, dtype=torch.bool).scatter(1, picked, True)  # (B, T)
        return picked

    def process_causal(self, x, r, positions, cache=None):
        """Process the tokens with positive logits. Sequences take different numbers of them; those with none skip."""
        self.taken = self.logits > 0  # (B, T)
        counts = self.taken.sum(dim=1).tolist()  # waits for the device: the shapes below depend on these counts
        rows = [row for row, n in enumerate(counts) if n > 0]
        if not rows:
            return x
        if cache is not None:
            cache = cache.take(rows, counts)
        # The stable sort moves the taken tokens to the front and keeps their order. Sequences with fewer are filled up
        # with tokens they do not take: these come last, so no taken token sees them, and `process` gives them gate 0.
        picked = (~self.taken).int().argsort(dim=1, stable=True)[:, : max(counts)]  # (B, k)
        part = slice(None)
        if len(rows) < len(x):  # the same rows, found on the device: copying them there would wait for it again
            part = (~self.taken.any(dim=1)).int().argsort(stable=True)[: len(rows)]
        return self.process(x, r, picked, positions, cache, part)

    def process(self, x, r, picked, positions, cache=None, part=slice(None)):
        """
        Equation (1): adds to x (B, T, C) the gated updates of the picked tokens (B, k). part: which sequences to
        process, n of them; by default all.
        """
        B, T, C = x.shape
        gate = self.gate(r).masked_fill(~self.taken, 0.0).gather(1, picked)  # (B, k)
        positions = positions.gather(1, picked)  # (B, k)
        index = picked + torch.arange(0, B * T, T, device=x.device).unsqueeze(-1)  # (B, k), places in the whole batch
        gate, positions, index = gate[part], positions[part], index[part]  # (n, k)
        # One list of all tokens, because index_select and index_add are much faster than gather and scatter_add.
        tokens = x.flatten(0, 1)  # (B * T, C)
        update = self.update(tokens.index_select(0, index.flatten()).view(*index.shape, C), positions, cache)
        # The gate multiplies the update, never the residual. Through it the router learns from the loss (§3.4).
        update = (gate.unsqueeze(-1) * update).to(x.dtype)  # (n, k, C)
        return tokens.index_add(0, index.flatten(), update.flatten(0, 1)).view(B, T, C)

    def scores(self, r):
        """What top-k ranks (B, T)."""
        return r

    def gate(self, r):
        """What multiplies the update (B, T). A softmax over the tokens would make it depend on later ones."""
        return r

    def causal_logits(self, x, r, positions):
        """Positive for the tokens to take (B, T), decided for each token from its x (B, T, C) and position (B, T)."""
        if self.predictor is None:
            return r  # no stop-gradient: the routing loss trains the router, and the blocks before it
        # The stop-gradient (§3.5): the predictor reads the model's activations and sends no gradient into them.
        return self.predictor(x.detach()).squeeze(-1)

    def flops(self, T, taken=None):
        n = capacity_in_tokens(self.capacity, T) if taken is None else taken
        decision = linear_flops(self.router, T) + (linear_flops(self.predictor, T) if self.predictor else 0)
        return self.update_flops(n) + decision

    def __getstate__(self):
        # Drop the last pass's tensors: they belong to its graph and cannot be copied.
        return {**self.__dict__, "taken": None, "logits": None}


def routed_block_class(variant):
    """RoutedBlock, or the class in variants.py with this name. Raises ValueError for an unknown name."""
    if not variant:
        return RoutedBlock
    from variants import VARIANTS  # not at the top, because variants.py imports this file

    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; variants.py lists {', '.join(VARIANTS)}")
    return VARIANTS[variant]


def capacity_in_tokens(capacity, T):
    """k: how many of T tokens top-k takes, at least one."""
    return max(1, math.floor(capacity * T + 1e-9))  # 1e-9 because 0.29 * 100 is 28.999999999999996


def no_autocast(x):
    """A context that turns autocast off for the device of x. It does nothing where autocast is off or absent."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def linear_flops(module, T):
    """FLOPs of all linear layers in `module` for T tokens; a multiply-add counts as two."""
    return sum(2 * T * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(self.make_block(layer) for layer in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # weight tying
        self.last_routing = None  # "topk" or "causal": the routing of the last pass, which routing_loss checks

        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2: the residual stream sums 2 * n_layer such outputs
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def make_block(self, layer):
        if not self.config.is_routed(layer):
            return Block(self.config)
        return routed_block_class(self.config.variant)(self.config, layer)

    @property
    def routed_blocks(self):
        return [block for layer, block in enumerate(self.transformer.h) if self.config.is_routed(layer)]

    @property
    def routing_modules(self):
        """The modules that learn causal decisions: the routed blocks, and in mode.py the mixtures of experts."""
        return [module for module in self.modules() if getattr(module, "has_routing_loss", False)]

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def forward(self, idx, targets=None, routing="topk"):
        """
        Logits (B, T, vocab_size) and the language-model loss, in nats per token (None without targets).

        idx (B, T) holds token ids, T at most block_size. targets (B, T) holds the token after each; -1 leaves a
        position out of the loss. Train with routing="topk". Its loss is not the likelihood of a text, because top-k
        looks ahead. routing="causal" gives the loss of the model that `generate` samples from.
        """
        B, T = idx.shape
        if not 1 <= T <= self.config.block_size:
            raise ValueError(f"a sequence has 1 to block_size = {self.config.block_size} tokens, got {T}")
        if routing not in ("topk", "causal"):
            raise ValueError(f'routing must be "topk" or "causal", got {routing!r}')
        positions = torch.arange(T, device=idx.device).unsqueeze(0)  # (1, T): all sequences start at 0
        logits = self.lm_head(self.trunk(idx, positions, routing))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def trunk(self, idx, positions, routing, caches=None):
        """All layers but the head: token ids (B, T) to activations (B, T, C). caches: one per block (cache.py)."""
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        positions = positions.expand(idx.shape)  # (B, T)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, positions, routing, caches[layer] if caches else None)
        self.last_routing = routing
        return self.transformer.ln_f(x)

    def routing_loss(self):
        """
        The auxiliary loss (§3.5) of the last pass: binary cross-entropy of the causal decisions against what top-k
        took, the mean over tokens and routed blocks. Add it to the language-model loss in training.
        """
        modules = self.routing_modules
        if not modules:
            return self.lm_head.weight.new_zeros(())
        if self.last_routing != "topk" or modules[0].taken is None:  # a copy of the model has no last pass
            raise RuntimeError('routing_loss() scores the last pass, which must have routing="topk"')
        losses = [F.binary_cross_entropy_with_logits(m.logits, m.taken.to(m.logits.dtype)) for m in modules]
        return torch.stack(losses).mean()

    def flops(self, T, taken=None):
        """
        FLOPs of a forward pass over one sequence of T tokens: matrix products only, attention as a full T x T. Equals
        the count of PyTorch's FlopCounterMode on the meta device. By convention a training step costs 3 times as much.

        taken: None for a top-k pass. For a causal pass, the number of tokens that each routed block took. (In a batch,
        each row that takes any token costs as much as the row that takes most.) With experts see mode.py.
        """
        routed = self.routed_blocks
        if taken is not None and len(taken) != len(routed):
            raise ValueError(f"taken needs one number per routed block: {len(routed)}, got {len(taken)}")
        counts = dict(zip(routed, taken or []))
        return sum(block.flops(T, counts.get(block)) for block in self.transformer.h) + linear_flops(self.lm_head, T)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=None):
        """
        Continue idx (B, T) by max_new_tokens sampled tokens: (B, T + max_new_tokens). For the options see pick_token.

        This is the plain definition of sampling: causal routing and a whole pass for each new token. The function
        `generate` in cache.py gives the same tokens faster.
        """
        idx = idx.to(self.lm_head.weight.device)
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        start = 0
        with evaluating(self):
            for _ in range(max_new_tokens):
                if idx.size(1) - start > self.config.block_size:
                    # A full window restarts from its last half. Sliding it by one token would change every position.
                    start = idx.size(1) - max(1, self.config.block_size // 2)
                logits, _ = self.forward(idx[:, start:], routing="causal")  # not self(): it may be compiled for one T
                token = pick_token(logits[:, -1], temperature, top_k, top_p, generator)  # (B,)
                idx = torch.cat((idx, token.unsqueeze(1)), dim=1)
        return idx


@contextlib.contextmanager
def evaluating(model):
    """Evaluation mode inside the `with` block: no dropout."""
    if not model.training:  # switching visits every module, so do not do it for each sampled token
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def pick_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """
    Sample one token for each row of logits (B, vocab_size): (B,).

    A temperature below 1 is safer, above 1 wilder, and 0 takes the most likely token. top_k keeps the top_k most likely
    tokens (0: all; unrelated to routing), top_p the fewest most likely tokens whose probabilities add up to top_p.
    """
    if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            "sampling needs a temperature >= 0, top_k >= 0 (0: all) and top_p in (0, 1]; "
            f"got temperature {temperature}, top_k {top_k}, top_p {top_p}"
        )
    if temperature == 0:
        return logits.argmax(dim=-1)
    # float32, because bfloat16 cannot add up many probabilities for top_p. A temperature near 0 must not round to 0.
    logits = logits.float() / max(temperature, 1e-30)
    if top_k > 0:
        best = logits.topk(min(top_k, logits.size(-1)))  # exactly top_k, also where logits are equal
        logits = torch.full_like(logits, -math.inf).scatter(-1, best.indices, best.values)
    p = logits.softmax(dim=-1)
    if top_p == 1:
        return torch.multinomial(p, 1, generator=generator).squeeze(-1)
    p, token = p.sort(dim=-1, descending=True)
    likelier = p.cumsum(dim=-1) - p  # the probability of all likelier tokens: 0 for the first, which always stays
    p = p.masked_fill(likelier >= max(top_p, 1e-30), 0.0)
    return token.gather(-1, torch.multinomial(p, 1, generator=generator)).squeeze(-1)
