# Only the unrouted blocks of shakespeare_mod.py:  python train.py config/shakespeare_shallow.py
#
# The strongest baseline: the FLOPs of the routed blocks pay for more steps instead. Only if MoD beats it are its routed
# blocks worth their cost. Same training FLOPs as shakespeare_dense.py. Minutes and losses to expect: README.md.
out_dir = "out-shakespeare-shallow"
route_every = 0
n_layer, n_head, n_embd = 3, 6, 384
block_size = 256
dropout = 0.2
batch_size = 64
flop_budget = 5_810_474_188_800_000  # 5,000 steps of shakespeare_dense.py

cpu = dict(n_layer=2, n_head=4, n_embd=128, block_size=128, dropout=0.0, batch_size=16)
cpu |= dict(flop_budget=1.5e13, learning_rate=5e-3, min_lr=5e-4)
