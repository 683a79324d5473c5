# The unrouted blocks of shakespeare_mod.py alone:  python train.py config/shakespeare_shallow.py
#
# The honest rival: what the routed blocks cost goes into more steps instead. Only if MoD beats this one do its routed
# blocks earn their place. Same training FLOPs as the two presets beside it. Minutes and losses: README.md.
out_dir = "out-shakespeare-shallow"
route_every = 0
n_layer = 3
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2
batch_size = 64
flop_budget = 5_810_474_188_800_000  # 5,000 steps of shakespeare_dense.py

cpu = dict(
    n_layer=2,
    n_head=4,
    n_embd=128,
    block_size=128,
    dropout=0.0,
    batch_size=16,
    flop_budget=1.5e13,
    learning_rate=5e-3,
    min_lr=5e-4,
)
