# GPT-2 124M, fine-tuned on Shakespeare:  python train.py config/shakespeare_finetune.py
#
# First:  python -m support.gpt2 --model=gpt2 --out_dir=out-gpt2
#
# This fine-tunes the dense model. --route_every=2 makes every other block a routed one whose router and predictor begin
# at random, which disturbs much of what GPT-2 knows (measured on a small model in docs/scaling.md). Never run here with
# GPT-2's weights, because no download was available.
out_dir = "out-shakespeare-finetune"
init_from = "out-gpt2"
dataset = "shakespeare"
route_every = 0
n_layer, n_head, n_embd = 12, 12, 768
bias = True
block_size = 512  # GPT-2 has 1,024
dropout = 0.1
batch_size = 8
gradient_accumulation_steps = 4
max_iters = 200  # 11 epochs
eval_interval = 20
learning_rate = 3e-5
min_lr = 3e-6
warmup_iters = 10
