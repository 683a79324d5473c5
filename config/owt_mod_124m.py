# Mixture-of-Depths at GPT-2's size (124M) on OpenWebText. First:  python -m data.openwebtext.prepare
#
#   1 GPU:    python train.py config/owt_mod_124m.py
#   8 GPUs:   torchrun --standalone --nproc_per_node=8 train.py config/owt_mod_124m.py
#   2 nodes:  docs/scaling.md
#
# It trains with the FLOPs of owt_dense_124m.py. A forward pass has 0.675 of the dense one's FLOPs, not the 0.55 of the
# blocks alone, because the head over 50,304 tokens is large at this size and not routed.
#
# Computed, not measured: 826,584 steps, 433 billion tokens; at an MFU of 40% on H100s (989 TFLOP/s) 176 hours on 1,
# 22 on 8, 11 on 16. For a shorter look, --flop_budget=1e19 takes 7 hours on one. This preset was never run here.
out_dir = "out-owt-mod-124m"
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
