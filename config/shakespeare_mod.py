# Mixture-of-Depths on character Shakespeare:  python train.py config/shakespeare_mod.py
#
# nanoGPT's baby GPT with every other block routed. It trains with the FLOPs of 5,000 steps of shakespeare_dense.py;
# its steps are cheaper, so it makes more of them. Minutes and losses to expect: README.md.
out_dir = "out-shakespeare-mod"
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2
batch_size = 64
flop_budget = 5_810_474_188_800_000  # 5,000 steps of shakespeare_dense.py

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
