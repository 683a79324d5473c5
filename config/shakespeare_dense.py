# A dense GPT of the same depth as shakespeare_mod.py:  python train.py config/shakespeare_dense.py
#
# nanoGPT's baby GPT as it is, 5,000 steps on a GPU. Same training FLOPs as the two presets beside it, so the losses can
# be compared. Minutes and losses to expect: README.md.
out_dir = "out-shakespeare-dense"
route_every = 0
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2
batch_size = 64
flop_budget = 5_810_474_188_800_000  # 3 x forward pass x 64 sequences x 5,000 steps

cpu = dict(
    n_layer=4,
    n_head=4,
    n_embd=128,
    block_size=128,
    dropout=0.0,
    batch_size=16,
    flop_budget=1.5e13,
    learning_rate=5e-3,
    min_lr=5e-4,
)
