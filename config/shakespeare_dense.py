# A dense GPT as deep as shakespeare_mod.py:  python train.py config/shakespeare_dense.py
#
# nanoGPT's baby GPT, 5,000 steps on a GPU. The other Shakespeare presets train with the same FLOPs.
out_dir = "out-shakespeare-dense"
route_every = 0
n_layer, n_head, n_embd = 6, 6, 384
block_size = 256
dropout = 0.2
batch_size = 64
flop_budget = 5_810_474_188_800_000  # 3 x forward pass x 64 sequences x 5,000 steps

cpu = dict(n_layer=4, n_head=4, n_embd=128, block_size=128, dropout=0.0, batch_size=16)
cpu |= dict(flop_budget=1.5e13, learning_rate=5e-3, min_lr=5e-4)
