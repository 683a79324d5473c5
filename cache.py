"""
Sampling with a KV cache: keys and values are kept, so each new token costs one step instead of a pass over the text.
A routed block only keeps the tokens it took (§3.5 of the paper, see mod.py). Rows take different tokens, so each row of
each block's cache has its own length.

    cache = KVCache(model.config, batch_size=2)
    logits = prefill(model, cache, [[1, 2, 3], [4, 5]])       # read the prompts
    logits = step(model, cache, pick_token(logits))           # read one more token per row, again and again

`generate` and `stream` do all of this. Letters as in mod.py; n rows in a pass, S tokens stored per row.
"""

import math

import torch

from mod import evaluating, pick_token


class LayerCache:
    """
    The keys and values of one block, (batch_size, nh, allocated, hs) each. Row b holds length[b] tokens in time order.

    Storage grows by half of its size at a time, so that copies are rare.
    """

    CHUNK = 32  # grow by at least this many tokens

    def __init__(self, batch_size, block_size):
        self.block_size = block_size
        self.length = [0] * batch_size  # Python numbers: reading them never waits for a GPU
        self.k = self.v = None

    @property
    def nbytes(self):
        return 0 if self.k is None else self.k.nbytes + self.v.nbytes

    def reserve(self, tokens, like):
        """Make room for `tokens` tokens per row, with the dtype and device of `like` (n, nh, T, hs)."""
        allocated = 0 if self.k is None else self.k.size(2)
        if tokens <= allocated:
            return
        size = math.ceil(max(tokens, 1.5 * allocated) / self.CHUNK) * self.CHUNK
        size = min(size, self.block_size)  # no row is longer than block_size
        # Zeros, because attention gives a masked token weight 0, but 0 times a NaN left in memory is NaN.
        room = like.new_zeros(len(self.length), like.size(1), size - allocated, like.size(3))
        self.k = torch.cat((self.k, room), dim=2) if allocated else room
        self.v = torch.cat((self.v, room), dim=2) if allocated else room.clone()


class Slots:
    """
    Where a pass stores its T new tokens: row i of the pass is row rows[i] of the cache and continues at start[i].

    There are only two kinds of pass: a prompt into empty rows, or one token per row. So either all rows start at 0 or
    T is 1. All ordinary blocks store the same tokens and share one Slots; a routed block makes its own.
    """

    def __init__(self, rows, start, T, batch_size, device):
        self.rows, self.device = rows, device
        self.end = max(start) + T  # S: tokens in the longest row after this pass
        self.mask = None  # hides the unused end of shorter rows
        self.slot = None  # the place of each row's new token (n,), if the rows differ in length
        self.stored = slice(None)  # selects these rows of the storage; for all rows a slice, which copies nothing
        some, ragged = rows != list(range(batch_size)), min(start) < max(start)
        if some or ragged:
            index, slot = to_device([rows, start], device)  # one copy for both
        if some:
            self.stored = index
        self.new = self.stored, slice(None), slice(self.end - T, self.end)  # selects where the new tokens go
        if ragged:  # one token per row, and the rows have different lengths
            self.slot = slot
            self.new = index, slice(None), slot
            self.mask = torch.arange(self.end, device=device) <= slot[:, None, None, None]  # (n, 1, 1, S)


class View:
    """A block's cache during one pass: the `cache` in mod.py. Row i of the pass adds counts[i] tokens."""

    def __init__(self, layer, slots, counts):
        self.layer, self.slots, self.counts = layer, slots, counts

    def append(self, k, v):
        """
        Store the new k and v (n, nh, T, hs). Tokens beyond a row's count are padding.

        Returns all keys and values of these rows (n, nh, S, hs), and the mask that hides the unused end of shorter
        rows. The mask is None if all rows had the same length before: then one token sees everything, and for a prompt
        the caller masks causally.
        """
        layer, slots = self.layer, self.slots
        layer.reserve(slots.end, k)
        if slots.slot is not None:  # one token per row, each to its own place: (n, nh, hs)
            k, v = k.squeeze(2), v.squeeze(2)
        layer.k[slots.new], layer.v[slots.new] = k, v  # padding too: the row's next tokens overwrite it
        for row, n in zip(slots.rows, self.counts):
            layer.length[row] += n
        return layer.k[slots.stored, :, : slots.end], layer.v[slots.stored, :, : slots.end], slots.mask

    def take(self, rows, counts):
        """The view for a routed block: row i of this pass, for i in rows, takes counts[i] tokens, the others none."""
        rows, counts = [self.slots.rows[i] for i in rows], [counts[i] for i in rows]
        start, batch_size = [self.layer.length[row] for row in rows], len(self.layer.length)
        return View(self.layer, Slots(rows, start, max(counts), batch_size, self.slots.device), counts)


class KVCache:
    """A cache for each block. n_read[b] is the number of tokens read so far in row b."""

    def __init__(self, config, batch_size):
        self.block_size = config.block_size
        self.n_read = [0] * batch_size
        self.layers = [LayerCache(batch_size, config.block_size) for _ in range(config.n_layer)]

    @property
    def nbytes(self):
        """Bytes allocated in all blocks."""
        return sum(layer.nbytes for layer in self.layers)

    def clear(self, rows):
        """Forget these rows."""
        for lengths in (self.n_read, *(layer.length for layer in self.layers)):
            for row in rows:
                lengths[row] = 0
        for layer in self.layers:
            if not any(layer.length):  # no row uses this storage any more: free it
                layer.k = layer.v = None


def to_device(numbers, device):
    """A tensor of these Python numbers. On CUDA the copy is queued from pinned memory, so Python does not wait."""
    numbers, on_cuda = torch.tensor(numbers, device="cpu"), torch.device(device).type == "cuda"
    return numbers.pin_memory().to(device, non_blocking=True) if on_cuda else numbers.to(device)


@torch.no_grad()
def read(model, cache, idx, rows):
    """Read the new tokens idx (n, T) into these rows, with causal routing. Returns the next logits (n, vocab_size)."""
    T, device, start = idx.size(1), model.lm_head.weight.device, [cache.n_read[row] for row in rows]
    slots = Slots(rows, start, T, len(cache.n_read), device)
    if slots.slot is None:  # all rows continue at the same place
        positions = torch.arange(start[0], slots.end, device=device)[None]  # (1, T)
    else:
        positions = slots.slot[:, None]  # (n, 1)
    views = [View(layer, slots, [T] * len(rows)) for layer in cache.layers]
    with evaluating(model):
        x = model.trunk(idx.to(device), positions, "causal", views)  # (n, T, C)
    for row in rows:
        cache.n_read[row] += T
    return model.lm_head(x[:, -1])


def prefill(model, cache, prompts, rows=None):
    """
    Read prompts (lists of 1 to block_size token ids) into rows of the cache, by default all, in place of what these
    rows held. Returns the logits after each prompt (n, vocab_size).
    """
    rows = list(range(len(prompts))) if rows is None else rows
    lengths = [len(prompt) for prompt in prompts]
    if not 1 <= min(lengths) <= max(lengths) <= cache.block_size:
        raise ValueError(f"a prompt has 1 to block_size = {cache.block_size} tokens, got {lengths}")
    cache.clear(rows)
    logits = [None] * len(prompts)
    for T in sorted(set(lengths)):  # prompts of one length share a pass, so none needs padding
        group = [i for i, length in enumerate(lengths) if length == T]
        idx = torch.tensor([prompts[i] for i in group])
        for i, logits_of_row in zip(group, read(model, cache, idx, [rows[i] for i in group])):
            logits[i] = logits_of_row
    return torch.stack(logits)


def step(model, cache, token, rows=None):
    """Read one more token (n,) into each of the rows, by default all. Returns the next logits (n, vocab_size)."""
    rows = list(range(len(token))) if rows is None else rows
    full = [row for row in rows if cache.n_read[row] >= cache.block_size]
    if full:
        raise ValueError(f"rows {full} have read block_size = {cache.block_size} tokens; prefill them anew")
    return read(model, cache, token[:, None], rows)


def stream(model, prompts, max_new_tokens, cache=None, seed=None, **options):
    """
    Continue each of the B prompts. Yields the B new tokens (B,) as soon as they exist, max_new_tokens times.

    prompts: a tensor (B, T), or lists of different lengths. A row whose window is full restarts alone, as in
    GPT.generate. options: see pick_token. Pass a KVCache(config, B) of your own to watch it. If all prompts have the
    same length, each routed block's `taken` covers the prompts (B, T) at the first yield. Later, its last column
    belongs to the token yielded before, because the newest one is read in the next step.
    """
    block_size, device = model.config.block_size, model.lm_head.weight.device
    texts = [torch.as_tensor(prompt).tolist() for prompt in prompts]
    cache = cache or KVCache(model.config, len(texts))
    if len(cache.n_read) != len(texts):
        raise ValueError(f"the cache has {len(cache.n_read)} rows, but there are {len(texts)} prompts")
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    token = None  # the last tokens (B,)
    unread = []  # the tokens that `texts` lacks; reading each at once would wait for the device
    for i in range(max_new_tokens):
        fresh = [row for row in range(len(texts)) if i == 0 or cache.n_read[row] == block_size]
        others = [row for row in range(len(texts)) if row not in fresh]
        logits = []
        if fresh:
            for text, tokens in zip(texts, torch.stack(unread, dim=1).tolist() if unread else []):
                text += tokens
            unread.clear()
            windows = [texts[row] for row in fresh]
            windows = [w if len(w) <= block_size else w[-max(1, block_size // 2) :] for w in windows]
            logits.append(prefill(model, cache, windows, fresh))
        if others:
            logits.append(step(model, cache, token[others] if fresh else token, others))
        logits = torch.cat(logits)
        if fresh and others:
            order = fresh + others
            logits = logits[[order.index(row) for row in range(len(texts))]]  # back in the order of the rows
        token = pick_token(logits, generator=generator, **options)  # (B,)
        unread.append(token)
        yield token


def generate(model, idx, max_new_tokens, **options):
    """As GPT.generate, but with the cache: idx (B, T) continued to (B, T + max_new_tokens)."""
    idx = idx.to(model.lm_head.weight.device)
    return torch.stack([*idx.unbind(1), *stream(model, idx, max_new_tokens, **options)], dim=1)


def set_dtype(model, dtype):
    """Store the model's weights as `dtype` for sampling, except those that decide the routing, which stay float32."""
    for name, p in model.named_parameters():
        if ".router." not in name and ".predictor." not in name:
            p.data = p.data.to(dtype)
    return model
