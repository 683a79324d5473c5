"""
Mixture-of-Depths (MoD): a GPT in which every other block processes only the tokens that it picks.

Raposo, Ritter, Richards, Lillicrap, Humphreys, Santoro, "Mixture-of-Depths: Dynamically allocating compute in
transformer-based language models", arXiv:2404.02258. A comment that names a section (§) means that paper.

Read from top to bottom: the config; attention, MLP and block, as in GPT-2; the routed block, which is the paper; the
FLOP count; the KV cache; the GPT and, at its end, sampling. Wherever `past` stands, it is for sampling with a cache and
None in training. The letters, everywhere: B batch, T time (tokens of a sequence), C channels (n_embd), nh heads,
hs head size, k capacity in tokens (the tokens that a routed block processes). With a cache: n rows of it that a call is
about, S tokens that it holds.
"""

import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

SELECTIONS = ("learned", "stochastic", "position")
CAUSAL_METHODS = ("predictor", "router")


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50,257, padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms, as GPT-2 has them
    capacity: float = 0.125  # share of the tokens that a routed block processes, in (0, 1]
    route_every: int = 2  # 2: blocks 1, 3, 5, ... are routed; 1: every block; 0: none, a plain dense GPT
    selection: str = "learned"  # what top-k ranks: "learned" router weights, or a control: "stochastic", "position"
    causal_method: str = "predictor"  # who stands in for top-k when sampling: a "predictor", or the "router" itself
    predictor_hidden: int = 32  # hidden units of the predictor

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "predictor_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.capacity <= 1:
            hint = f"; for {self.capacity:g} % write {self.capacity / 100:g}" if 1 < self.capacity <= 100 else ""
            raise ValueError(f"capacity is a fraction in (0, 1], got {self.capacity:g}{hint}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be a multiple of n_head, got n_embd {self.n_embd} and n_head {self.n_head}; "
                f"{self.n_embd - self.n_embd % self.n_head or self.n_head} would do"
            )
        if self.route_every < 0:
            raise ValueError(f"route_every is 0 (no block is routed), 1 (every block), 2, ...; got {self.route_every}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a probability in [0, 1), got {self.dropout:g}")
        for name, known in (("selection", SELECTIONS), ("causal_method", CAUSAL_METHODS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")

    def is_routed(self, layer):
        """True if block `layer` (counted from 0) is a routed one."""
        return self.route_every > 0 and layer % self.route_every == self.route_every - 1

    def capacity_in_tokens(self, T):
        """k: how many of T tokens a routed block picks under top-k. At least one, also when T < 1 / capacity."""
        # The 1e-9 keeps a product such as 0.29 * 100 = 28.999999999999996 from losing a token.
        return max(1, math.floor(self.capacity * T + 1e-9))

    # For `forward_flops` below:

    def block_flops(self, n):
        return 24 * n * self.n_embd**2 + 4 * n * n * self.n_embd  # attention's and MLP's 12 C^2 weights; q k^T, its use

    def routed_block_flops(self, T, taken=None):
        return self.block_flops(self.capacity_in_tokens(T) if taken is None else taken) + self.decision_flops(T)

    def decision_flops(self, T):
        flops = 2 * T * self.n_embd  # the router; the gate needs it under every selection
        if self.selection == "learned" and self.causal_method == "predictor":
            flops += 2 * T * (self.n_embd + 1) * self.predictor_hidden
        return flops


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, past=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, nh, T, hs)
        mask = None
        if past is not None:
            k, v, mask = past.cache.append(k, v, past.rows, past.count)  # (B, nh, S, hs), with the tokens before
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """An ordinary transformer block: every token goes through it; `routing` is for RoutedBlock, called alike."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, routing="topk", past=None):
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


class RoutedBlock(Block):
    """
    A block that processes only the tokens it picks; the others go around it. Equation (1) of the paper:

        x_i' = r_i * f_i(X~) + x_i   if token i is picked        r_i = w . x_i, a raw number (§3.4)
        x_i' = x_i                   otherwise                   X~  = the picked tokens, alone

    r_i, the router weight, is both what top-k ranks and the gate on the update. The block does the picking (expert
    choice, §3.2): per sequence it takes the k tokens of the largest r. That looks at the future: whether a token is
    among the top k depends on the tokens after it. Training may do so, sampling cannot. `routing="causal"` therefore
    takes the tokens whose `logits` are positive, sigmoid(logit) > 0.5 (§3.5). They are trained to say whether top-k
    picks token i, and are a function of x_i alone: of the token and what came before it, which earlier blocks have
    put into x_i, never of what comes after.

    After a forward pass the block holds what it decided, for whoever wants to look:
        taken   (B, T) bool   the tokens that it processed
        logits  (B, T)        the causal decision, positive: take
    With a cache they are about the new tokens of the last call, for the rows of that call.

    The controls rank by something else than r (`scores`). The gate stays r, and no decision is trained:
        stochastic   top-k of Gaussian noise, new at each pass; causal: a token enters with probability `capacity`,
                     drawn once per block and position for all rows, so that it does not change as the text grows
        position     a fixed comb of the capacity's density, top-k and causal alike; 12.5 %: tokens 7, 15, 23, ...
                     (T < 1 / capacity: top-k must pick one token and picks the first, causal picks none)
    """

    def __init__(self, config, layer):
        super().__init__(config)
        self.config = config
        self.taken = self.logits = None
        self.router = nn.Linear(config.n_embd, 1, bias=False)
        if config.selection != "learned":
            self.register_buffer("rule", self.fixed_rule(layer), persistent=False)
        elif config.causal_method == "predictor":
            self.predictor = nn.Sequential(
                nn.Linear(config.n_embd, config.predictor_hidden), nn.GELU(), nn.Linear(config.predictor_hidden, 1)
            )

    def forward(self, x, routing="topk", past=None):
        # Routing stays in float32 under autocast: bfloat16 keeps 3 digits, and the picks among near-equal weights would
        # be arbitrary. (torch.autocast does not know the meta device, on which FLOPs can be counted.)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            r = self.router(x).squeeze(-1)  # (B, T)
            self.logits = self.causal_logits(x, r, past)  # (B, T)
        if routing == "topk":
            return self.process(x, *self.pick_topk(r))
        return self.process_positive(x, r, past)

    def process(self, x, picked, weight, past=None):
        """Equation (1): x (B, T, C) with the weighted update added to the picked tokens; picked, weight (B, k)."""
        index = picked.unsqueeze(-1).expand(-1, -1, x.size(-1))  # (B, k, C)
        # The weight multiplies the update only, never the residual: it puts the router on the gradient's path (§3.4).
        update = weight.unsqueeze(-1) * self.update(x.gather(1, index), past)  # (B, k, C)
        return x.scatter_add(1, index, update)  # (B, T, C)

    def process_positive(self, x, r, past=None):
        """Equation (1) with the tokens of positive logits as the picked ones; a row that has none costs nothing."""
        self.taken = self.logits > 0  # (B, T)
        if past is not None and r.size(1) > 1:  # a single step has no padding
            real = torch.tensor(past.count, device=x.device)[:, None]
            self.taken &= torch.arange(x.size(1), device=x.device) < real  # the padding of a shorter prompt is no token
        count = self.taken.sum(dim=1).tolist()  # how many tokens each row takes
        entering = [row for row, taken in enumerate(count) if taken > 0]
        if not entering:
            return x
        if past is not None:
            past = past.of(entering, count)
        part = torch.tensor(entering, device=x.device)
        picked, weight = self.pick_causal(r[part], self.taken[part], max(count))  # (rows entering, k) each
        return x.index_copy(0, part, self.process(x[part], picked, weight, past))

    def update(self, x, past=None):
        """f in equation (1): what an ordinary block adds to x (B, k, C), without x itself; its MLP sees x + h."""
        h = self.attn(self.ln_1(x), past)
        return h + self.mlp(self.ln_2(x + h))

    def pick_topk(self, r):
        """The k tokens of the largest scores in each row, and their weights, (B, k) each."""
        k = self.config.capacity_in_tokens(r.size(1))
        # topk returns the largest first. Without the sort, attention's causal mask, which knows only the order in which
        # the tokens come, would let a token see later ones and hide earlier ones.
        picked = self.scores(r).topk(k, dim=1).indices.sort(dim=1).values  # (B, k), back in time order
        self.taken = torch.zeros_like(r, dtype=torch.bool).scatter(1, picked, True)  # (B, T)
        return picked, r.gather(1, picked)

    def pick_causal(self, r, taken, k):
        """The tokens taken, and their weights, (B, k) each; k is what the fullest row takes."""
        # Taken tokens first, in time order (stable); then, in rows with fewer than k, tokens that were not taken, as
        # padding. No taken token sees the padding, which stands after them, and its weight of 0 leaves it as it was.
        # Sorted as int: not every device sorts bool.
        picked = (~taken).int().argsort(dim=1, stable=True)[:, :k]  # (B, k)
        return picked, r.masked_fill(~taken, 0.0).gather(1, picked)

    def scores(self, r):
        """What top-k ranks (B, T)."""
        if self.config.selection == "stochastic":
            return torch.randn_like(r)
        return self.rule[: r.size(1)].expand_as(r) if self.config.selection == "position" else r

    def causal_logits(self, x, r, past=None):
        """Take or go around: a number for each token, from its x_i alone (B, T)."""
        if self.config.selection != "learned":
            return self.rule[: r.size(1)].expand_as(r) if past is None else self.rule[past.position]
        if self.config.causal_method == "router":
            return r  # no stop-gradient: the auxiliary loss trains the router, and the trunk before it
        # The stop-gradient (§3.5): the predictor learns about the trunk and leaves the language model untouched.
        return self.predictor(x.detach()).squeeze(-1)

    def fixed_rule(self, layer):
        """The controls' causal decision, which knows nothing but the position; positive: take (block_size,)."""
        n, c = self.config.block_size, self.config.capacity
        if self.config.selection == "stochastic":
            return c - torch.rand(n, generator=torch.Generator().manual_seed(layer))
        comb = [math.floor((i + 1) * c + 1e-9) - math.floor(i * c + 1e-9) for i in range(n)]
        # The slope decides only where no tooth has come yet (T < 1 / capacity): top-k then picks the first token.
        return torch.tensor([tooth - (i + 1) / (n + 1) for i, tooth in enumerate(comb)])

    def __getstate__(self):
        return {**self.__dict__, "taken": None, "logits": None}  # what a pass left here is no part of a copy


def forward_flops(config, T, taken=None):
    """
    Exact FLOPs of one sequence's forward pass of T tokens, as PyTorch's FlopCounterMode counts them: matrix products
    only, a multiply-add is two, attention as full T x T. (To check it, count on the meta device or under
    sdpa_kernel(SDPBackend.MATH): for a CPU's fused attention the counter gives 0.)

    taken=None is the top-k pass of training. For causal routing give the number of tokens that each routed block took,
    first block first (in a batch a block computes the largest count of its rows for each row that takes any). By
    convention a training step costs 3 times the forward pass: the backward pass has two products for each one. (With
    experts `taken` holds pairs, see mode.py.)
    """
    routed = sum(config.is_routed(layer) for layer in range(config.n_layer))
    if taken is None:
        taken = [None] * routed
    if len(taken) != routed:
        raise ValueError(f"taken needs one number per routed block: {routed}, got {len(taken)}")
    dense_blocks = (config.n_layer - routed) * config.block_flops(T)
    routed_blocks = sum(config.routed_block_flops(T, n) for n in taken)
    return dense_blocks + routed_blocks + 2 * T * config.n_embd * config.vocab_size  # the last term is the head


class LayerCache:
    """
    The keys and values that one block has computed, for sampling. Row b holds length[b] tokens, in time order: every
    token in an ordinary block, in a routed block only those that it took, so there each row has its own length.

    The storage is one rectangle, long enough for the longest row. It grows as it is needed, by half of what is there
    and at least CHUNK tokens: growing means copying, so it must not happen at every few tokens.
    """

    CHUNK = 32

    def __init__(self, batch_size, block_size):
        self.block_size = block_size
        self.length = [0] * batch_size  # Python's numbers: read without waiting for a GPU
        self.k = self.v = None  # (batch_size, nh, allocated tokens, hs)

    @property
    def nbytes(self):
        """Bytes allocated, used or not."""
        return 0 if self.k is None else self.k.nbytes + self.v.nbytes

    def append(self, k, v, rows, count):
        """
        Add the first count[i] of the T new tokens k[i] and v[i] (n, nh, T, hs) to row rows[i]; the others are padding.

        Returns all keys and values of these rows (n, nh, S, hs), S being the longest row's length, and the mask
        (n, 1, T, S) that lets a token see itself and those before it. None where it takes no mask: for the first tokens
        of all these rows (is_causal does it), and for one token each in rows of one length (which sees everything).
        """
        T = k.size(2)
        start = [self.length[row] for row in rows]
        S = max(start) + T
        self.reserve(S, k)
        row = torch.tensor(rows, device=k.device)
        part = slice(None) if rows == list(range(len(self.length))) else row  # all rows: a view instead of a copy
        slot = torch.tensor(start, device=k.device)[:, None] + torch.arange(T, device=k.device)  # (n, T)
        # Padding is stored too, after the row's own tokens: the mask hides it, the row's next tokens overwrite it.
        if min(start) == max(start):
            self.k[part, :, S - T : S], self.v[part, :, S - T : S] = k, v
        else:  # indices with a slice between them give (n, T, nh, hs)
            self.k[row[:, None], :, slot], self.v[row[:, None], :, slot] = k.transpose(1, 2), v.transpose(1, 2)
        for b, n in zip(rows, count):
            self.length[b] += n
        mask = None
        if S > T and (T > 1 or min(start) < max(start)):
            mask = torch.arange(S, device=k.device) <= slot[:, None, :, None]  # (n, 1, T, S)
        return self.k[part, :, :S], self.v[part, :, :S], mask

    def reserve(self, tokens, like):
        """Make room for `tokens` tokens in every row, in the type and on the device of `like` (n, nh, T, hs)."""
        allocated = 0 if self.k is None else self.k.size(2)
        if tokens <= allocated:
            return
        size = math.ceil(max(tokens, 1.5 * allocated) / self.CHUNK) * self.CHUNK
        size = max(tokens, min(size, self.block_size))  # no row is longer than block_size
        # Zeros, not empty: a masked token has weight 0, but 0 times the NaN that memory may hold would be NaN.
        room = like.new_zeros(len(self.length), like.size(1), size - allocated, like.size(3))
        self.k = torch.cat((self.k, room), dim=2) if allocated else room
        self.v = torch.cat((self.v, room), dim=2) if allocated else room.clone()


class KVCache:
    """What sampling keeps of batch_size texts: read[b], how many tokens of row b it has read, and a cache per block."""

    def __init__(self, config, batch_size):
        self.read = [0] * batch_size
        self.layers = [LayerCache(batch_size, config.block_size) for _ in range(config.n_layer)]

    @property
    def nbytes(self):
        """Bytes allocated in all blocks."""
        return sum(layer.nbytes for layer in self.layers)

    def clear(self, rows):
        """Forget what these rows have read."""
        for row in rows:
            self.read[row] = 0
        for layer in self.layers:
            for row in rows:
                layer.length[row] = 0
            if not any(layer.length):
                layer.k = layer.v = None


@dataclass
class Past:
    """
    A block's cache as one pass sees it: which rows of it the new tokens x (n, T, C) belong to.

    cache     the block's LayerCache
    rows      for each row of x its row in the cache
    count     for each row of x how many of the T tokens are real; the others, at its end, are padding
    position  (n, T) where the tokens stand in their windows
    """

    cache: LayerCache
    rows: list
    count: list
    position: torch.Tensor

    def of(self, entering, count):
        """The same for the rows of x in `entering`; the block takes count[row] tokens of a row of x."""
        rows = [self.rows[row] for row in entering]
        return Past(self.cache, rows, [count[row] for row in entering], self.position[entering])


def pick_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """
    One token for each row of logits (B, vocab_size), as (B,).

    temperature below 1 is safer, above 1 wilder; 0 takes the likeliest token. top_k keeps the top_k likeliest tokens of
    the vocabulary (nothing to do with routing; 0: all), top_p the fewest likeliest ones that together have probability
    top_p.
    """
    if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            "sampling needs a temperature >= 0, top_k >= 0 (0: all) and top_p in (0, 1]; "
            f"got temperature {temperature}, top_k {top_k}, top_p {top_p}"
        )
    if temperature == 0:
        return logits.argmax(dim=-1)
    # The largest becomes 0 first: divided by a tiny temperature it would overflow.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k > 0:
        kth_best = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < kth_best, -math.inf)
    p = logits.softmax(dim=-1)
    if top_p == 1:
        return torch.multinomial(p, 1, generator=generator).squeeze(-1)
    p, token = p.sort(dim=-1, descending=True)
    p = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0.0)  # those before it suffice; so the likeliest always stays
    return token.gather(-1, torch.multinomial(p, 1, generator=generator)).squeeze(-1)


@contextlib.contextmanager
def evaluating(model):
    """Evaluation mode (no dropout) for a while."""
    training = model.training
    if training:  # switching goes through all modules: not at every step
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


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
        self.lm_head.weight = self.transformer.wte.weight
        self.aux_loss = None

        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2: the residual stream is a sum of 2 * n_layer such outputs
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def make_block(self, layer):
        return RoutedBlock(self.config, layer) if self.config.is_routed(layer) else Block(self.config)

    @property
    def routed_blocks(self):
        return [block for layer, block in enumerate(self.transformer.h) if self.config.is_routed(layer)]

    @property
    def deciders(self):
        """Who picks under top-k, and learns to tell it without the future: each has `taken` and `logits`."""
        return self.routed_blocks

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def __getstate__(self):
        return {**self.__dict__, "aux_loss": None}  # it belongs to the graph of a pass, which a copy does not have

    def forward(self, idx, targets=None, routing="topk"):
        """
        Logits of all positions (B, T, vocab_size) and the language-model loss (None without targets).

        idx (B, T) holds token ids, 1 <= T <= block_size; targets (B, T) the tokens that follow, -1: not counted in the
        loss (such a position still competes for the capacity).
        routing="topk" is the one to train with; each routed block looks at the whole sequence to pick, so its loss is
        not that of a model that could be sampled from. routing="causal" never looks ahead. A top-k pass with targets
        also sets `aux_loss`, which trains the causal decisions: it is to be added to the loss that is
        differentiated, and is not part of the one returned.
        """
        B, T = idx.shape
        if not 1 <= T <= self.config.block_size:
            raise ValueError(f"a sequence has 1 to block_size = {self.config.block_size} tokens, got {T}")
        if routing not in ("topk", "causal"):
            raise ValueError(f'routing must be "topk" or "causal", got {routing!r}')
        positions = torch.arange(T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))  # (B, T, C)
        for block in self.transformer.h:
            x = block(x, routing)
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        if routing == "topk":
            self.aux_loss = self.routing_loss(logits)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def routing_loss(self, logits):
        """§3.5: cross-entropy of the causal decisions against top-k membership, mean over tokens and routed blocks."""
        if self.config.selection != "learned" or not self.deciders:
            return logits.new_zeros(())  # nothing to learn
        losses = [F.binary_cross_entropy_with_logits(b.logits, b.taken.to(b.logits.dtype)) for b in self.deciders]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def generate_uncached(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=None):
        """
        Continue idx (B, T) by max_new_tokens tokens, sampled with causal routing; returns (B, T + max_new_tokens).

        The plain definition of sampling: one whole pass per new token. When the window is full it restarts from its
        last block_size // 2 tokens; a window that slides by one token would shift every position, and with it all that
        was computed before. `generate` does the same faster. Its numbers are equal up to rounding, so for the same seed
        its tokens are the same unless rounding decides between two. Options: see `pick_token`.
        """
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        start = 0
        with evaluating(self):
            for _ in range(max_new_tokens):
                if idx.size(1) - start > self.config.block_size:
                    start = idx.size(1) - max(1, self.config.block_size // 2)
                # .forward: a compiled model would be traced anew for each length.
                logits, _ = self.forward(idx[:, start:], routing="causal")
                token = pick_token(logits[:, -1], temperature, top_k, top_p, generator)  # (B,)
                idx = torch.cat((idx, token[:, None]), dim=1)
        return idx

    def generate(self, idx, max_new_tokens, **options):
        """The same with a KV cache: what was computed for a token is kept, and each new token costs one step."""
        tokens = list(self.stream(idx, max_new_tokens, **options))
        return torch.stack([*idx.unbind(1), *tokens], dim=1)

    def stream(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=None, cache=None):
        """
        Continue each of the B prompts, yielding the B new tokens (B,) as soon as they are there, max_new_tokens times.

        prompts: a tensor (B, T), or a list of prompts of different lengths; a row whose window is full restarts alone.
        Give a KVCache(config, B) of your own to look at it on the way. With prompts of one length, the routed blocks'
        `taken` is about the prompts (B, T) at the first yield; from then on its last column is about the token read.
        """
        block_size = self.config.block_size
        texts = [torch.as_tensor(prompt).tolist() for prompt in prompts]
        rows = range(len(texts))
        cache = cache or KVCache(self.config, len(texts))
        if len(cache.read) != len(texts):
            raise ValueError(f"the cache has {len(cache.read)} rows, and there are {len(texts)} prompts")
        generator = None if seed is None else torch.Generator(self.lm_head.weight.device).manual_seed(seed)
        for i in range(max_new_tokens):
            fresh = [row for row in rows if i == 0 or cache.read[row] == block_size]
            going_on = [row for row in rows if row not in fresh]
            logits = []
            if fresh:
                windows = [texts[row] for row in fresh]
                windows = [w if len(w) <= block_size else w[-max(1, block_size // 2) :] for w in windows]
                logits.append(self.prefill(windows, cache, fresh))
            if going_on:
                logits.append(self.step(torch.tensor([texts[row][-1] for row in going_on]), cache, going_on))
            logits = torch.cat(logits)[torch.tensor(fresh + going_on).argsort()]  # (B, vocab_size), in order of rows
            token = pick_token(logits, temperature, top_k, top_p, generator)  # (B,)
            yield token
            for text, t in zip(texts, token.tolist()):
                text.append(t)

    def prefill(self, prompts, cache, rows=None):
        """
        Read prompts (lists of token ids, 1 to block_size each) into rows of the cache, all of them by default, in place
        of what these rows held. Returns the logits that follow each prompt (n, vocab_size).
        """
        rows = list(range(len(prompts))) if rows is None else rows
        count = [len(prompt) for prompt in prompts]
        if not 1 <= min(count) <= max(count) <= self.config.block_size:
            raise ValueError(f"a prompt has 1 to block_size = {self.config.block_size} tokens, got {count}")
        idx = torch.tensor([[*prompt, *[0] * (max(count) - len(prompt))] for prompt in prompts])  # padding: any token
        cache.clear(rows)
        return self.extend(idx, cache, rows, count)

    def step(self, token, cache, rows=None):
        """Read one more token (n,) into each of the rows; returns the logits that follow it (n, vocab_size)."""
        rows = list(range(len(token))) if rows is None else rows
        full = [row for row in rows if cache.read[row] >= self.config.block_size]
        if full:
            raise ValueError(f"rows {full} have read block_size = {self.config.block_size} tokens; prefill them anew")
        return self.extend(token[:, None], cache, rows, [1] * len(rows))

    @torch.no_grad()
    def extend(self, idx, cache, rows, count):
        """
        The causal pass over new tokens idx (n, T) of some rows, of which count[i] are real, the others padding.

        Always without dropout and gradient: what it leaves in the cache is meant for later calls.
        """
        device = self.lm_head.weight.device
        position = torch.tensor([cache.read[row] for row in rows])[:, None] + torch.arange(idx.size(1))  # (n, T)
        position = position.to(device)
        with evaluating(self):
            x = self.transformer.wte(idx.to(device)) + self.transformer.wpe(position)  # (n, T, C)
            for block, layer in zip(self.transformer.h, cache.layers):
                x = block(x, "causal", Past(layer, rows, count, position))
        for row, n in zip(rows, count):
            cache.read[row] += n
        last = x[torch.arange(len(rows)), torch.tensor(count) - 1]  # (n, C), each row's last real token
        return self.lm_head(self.transformer.ln_f(last))
