# A dense GPT at GPT-2's size (124M) on OpenWebText, to compare with owt_mod_124m.py at equal training FLOPs. That file
# says how to launch it.
#
# Computed, not measured: 557,929 steps, 293 billion tokens; the same hours as owt_mod_124m.py.
out_dir = "out-owt-dense-124m"
route_every = 0
dataset = "openwebtext"
vocab_size = 50304  # GPT-2's 50,257, padded to a multiple of 64
n_layer, n_head, n_embd = 12, 12, 768
block_size = 1024
batch_size = 16
gradient_accumulation_steps = 32  # divided among the ranks; 524,288 tokens per step
flop_budget = 2.5e20
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
beta2 = 0.95
eval_interval = 1000
