# Staged Mixture-of-Depths-and-Experts (MoDE):  python train.py config/shakespeare_mode_staged.py
#
# nanoGPT's baby GPT with every other block routed as in shakespeare_mod.py and with four experts in place of its MLP
# (mode.py). Same training FLOPs as shakespeare_dense.py.
out_dir = "out-shakespeare-mode-staged"
n_expert = 4
expert_capacity = 0.25  # each expert's share of the tokens that the block takes
staged = True
n_layer, n_head, n_embd = 6, 6, 384
block_size = 256
dropout = 0.2
batch_size = 64
flop_budget = 5_810_474_188_800_000  # 5,000 steps of shakespeare_dense.py

cpu = dict(n_layer=4, n_head=4, n_embd=128, block_size=128, dropout=0.0, batch_size=16)
cpu |= dict(flop_budget=1.5e13, learning_rate=5e-3, min_lr=5e-4)
