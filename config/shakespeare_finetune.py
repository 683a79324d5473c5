# GPT-2 124M, fine-tuned on Shakespeare:  python train.py config/shakespeare_finetune.py
#
# First:  python -m support.gpt2 --model=gpt2 --out_dir=out-gpt2
#
# As it stands it fine-tunes the dense model. With --route_every=2 every other block becomes a routed one with a router
# and a predictor that begin at random: a MoD model that begins with most of what GPT-2 knows disturbed, and has to mend
# it. No closeness to GPT-2 is promised. Never run here with GPT-2's weights: no download was at hand.
# docs/scaling.md has what a small model gave.
out_dir = "out-shakespeare-finetune"
init_from = "out-gpt2"
dataset = "shakespeare"
route_every = 0
n_layer = 12
n_head = 12
n_embd = 768
bias = True
block_size = 512  # GPT-2 has 1,024
dropout = 0.1
batch_size = 8
gradient_accumulation_steps = 4
max_iters = 200  # 11 times through the text
eval_interval = 20
learning_rate = 3e-5
min_lr = 3e-6
warmup_iters = 10
