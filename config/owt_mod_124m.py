# Mixture-of-Depths at GPT-2's size (124 M) on OpenWebText. First:  python -m data.openwebtext.prepare
#
#   1 GPU:    python train.py config/owt_mod_124m.py
#   8 GPUs:   torchrun --standalone --nproc_per_node=8 train.py config/owt_mod_124m.py
#   2 nodes:  torchrun --nnodes=2 --nproc_per_node=8 --node_rank=RANK --master_addr=HOST --master_port=29500 \
#               train.py config/owt_mod_124m.py          (on each; RANK is 0 on HOST and 1 on the other; out_dir and
#                                                         data are on a disk that both see)
#
# It trains with the FLOPs of owt_dense_124m.py. The head, over 50,304 tokens, is large at this size and is not routed:
# a forward pass has 0.675 of the dense one's FLOPs, not 0.56 as the blocks alone.
#
# Computed, not measured: 826,584 steps, 433 billion tokens; at an MFU of 40 % on H100s (989 TFLOP/s) 176 hours on 1,
# 22 on 8, 11 on 16. A shorter look: --flop_budget=1e19, 7 hours on one. Losses: never run here.
out_dir = "out-owt-mod-124m"
dataset = "openwebtext"
vocab_size = 50304  # GPT-2's 50,257, padded to a multiple of 64
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
batch_size = 16
gradient_accumulation_steps = 32  # shared among the ranks; 524,288 tokens a step
flop_budget = 2.5e20
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
beta2 = 0.95
eval_interval = 1000
