"""
Train a GPT, Mixture-of-Depths or dense:

    python train.py config/shakespeare_mod.py
    python train.py config/shakespeare_mod.py --capacity=0.25 --out_dir=out-quarter
    python train.py --resume --out_dir=out-quarter

Read from top to bottom: the options, the recipe (`train`), what it is made of (learning rate, optimizer). Data,
evaluation and reports are in support/; support/run.py and support/checkpoint.py keep a run from being lost. A notebook
calls the same function: `train(TrainConfig(...))`.
"""

import contextlib
import dataclasses
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mod import CAUSAL_METHODS, SELECTIONS, GPTConfig, forward_flops
from mode import MoDEConfig, kind_of
from support import checkpoint, ranks, run
from support.data import load_dataset, seed_of, training_batch
from support.evaluation import autocast, evaluate
from support.options import UserError, errors_in_one_line, load, option, pick_device
from support.report import describe, peak_flops, report, versions


@dataclass
class TrainConfig:
    # what goes where
    out_dir: str = option("out", "folder for checkpoints, metrics.jsonl and config.json")
    resume: bool = option(False, "go on with the run in out_dir from its last checkpoint, with its options")
    dataset: str = option("shakespeare_char", "a folder below data/, or the path of any folder that prepare.py wrote")
    init_from: str = option(
        "", "start from the best weights in this folder, of a run or of support.gpt2; empty: random ones"
    )
    eval_interval: int = option(250, "steps between two evaluations")
    eval_iters: int = option(200, "batches per evaluation at most; a small validation split is read once, whole")
    eval_only: bool = option(False, "evaluate the best checkpoint in out_dir and leave")
    log_interval: int = option(10, "steps between two updates of the progress line")
    # the model, see GPTConfig in mod.py
    block_size: int = option(256, "context: tokens that the model sees at once")
    vocab_size: int = option(0, "vocabulary; 0: that of the data set")
    n_layer: int = option(6, "blocks")
    n_head: int = option(6, "attention heads")
    n_embd: int = option(384, "width")
    dropout: float = option(0.0, "probability of dropping an activation in training")
    bias: bool = option(False, "biases in linear layers and LayerNorms; GPT-2 has them")
    capacity: float = option(
        GPTConfig.capacity, "share of the tokens that a routed block processes, in (0, 1]; with experts: if staged"
    )
    route_every: int = option(
        GPTConfig.route_every, "2: every other block is routed; 1: every block; 0: none, a plain dense GPT"
    )
    selection: str = option(GPTConfig.selection, "what top-k ranks", choices=SELECTIONS)
    causal_method: str = option(GPTConfig.causal_method, "who replaces top-k in sampling", choices=CAUSAL_METHODS)
    predictor_hidden: int = option(GPTConfig.predictor_hidden, "hidden units of the predictor")
    # experts in the routed blocks, see mode.py
    n_expert: int = option(0, "experts in place of the MLP of each block that is routed; 0: none")
    n_noop: int = option(0, "no-op experts beside them, for integrated MoDE")
    expert_capacity: float = option(MoDEConfig.expert_capacity, "share of a block's tokens that each expert takes")
    staged: bool = option(False, "with experts, True: the block is routed too, staged MoDE; False: attention for all")
    # how long
    max_iters: int = option(0, "training steps; 0: as many as flop_budget pays for")
    flop_budget: float = option(0.0, "training FLOPs, 3 x the top-k forward pass; with max_iters too, the smaller wins")
    batch_size: int = option(64, "sequences per micro-step")
    gradient_accumulation_steps: int = option(1, "micro-steps per training step")
    # AdamW, with a learning rate that warms up linearly, then follows a cosine over exactly the run
    learning_rate: float = option(1e-3, "peak learning rate")
    min_lr: float = option(1e-4, "learning rate at the end of the run")
    decay_lr: bool = option(True, "False: stay at learning_rate after the warm-up")
    warmup_iters: int = option(100, "steps of warm-up")
    weight_decay: float = option(0.1, "on matrices and embeddings; biases and LayerNorms have none")
    beta1: float = option(0.9, "AdamW's decay rate of the mean gradient")
    beta2: float = option(0.99, "AdamW's decay rate of the mean squared gradient")
    grad_clip: float = option(1.0, "clip the norm of the gradient at this; 0: do not")
    aux_weight: float = option(0.1, "weight of the auxiliary loss, which trains the causal decisions")
    seed: int = option(1337, "of weights, batches and dropout")
    wandb: str = option("", "log to this project of Weights & Biases too; empty: do not")
    # the machine
    device: str = option("auto", "auto (the best there is), cpu, cuda, cuda:1, mps, ...")
    dtype: str = option(
        "auto", "auto: bfloat16 where the GPU has it", choices=("auto", "float32", "bfloat16", "float16")
    )
    compile: str = option("auto", "torch.compile; auto: on CUDA under Linux", choices=("auto", "True", "False"))


def main(argv=None):
    advice = "halve --batch_size, double --gradient_accumulation_steps: the same training"
    with errors_in_one_line("train.py", advice), ranks.joined():
        train(load(TrainConfig, argv, __doc__.split(":")[0], preset=True, base=options_of_the_run))


def train(config):
    """
    Train as `config` (a TrainConfig) says; write checkpoints, metrics.jsonl and config.json to its out_dir.

    Returns the rows of metrics.jsonl: one dict per evaluation, losses in nats per token. Raises UserError for options
    or data that cannot work, before any time is spent, and for a run that diverges; KeyboardInterrupt, after saving, if
    Ctrl-C or SIGTERM asks it to stop. With config.resume it goes on with the run in out_dir, with exactly these options
    (the command line takes the run's own where none are given).
    """
    # What the run is: options, data, model. All that can be wrong with them shows here.
    asked = {name: getattr(config, name) for name in ("device", "dtype", "compile")}
    config = resolve(config)
    if config.eval_only:
        return evaluate_checkpoint(config)
    with ranks.main_first():
        meta, data = load_dataset(config.dataset, config.block_size, config.vocab_size, check=ranks.is_main())
    torch.manual_seed(config.seed)
    model = kind_of(asdict(config))[1](model_config(config, meta))
    if config.init_from and not config.resume:
        checkpoint.start_from(Path(config.init_from), model, meta)
    model.to(config.device)
    sequences_per_step = config.gradient_accumulation_steps * config.batch_size
    tokens_per_step = sequences_per_step * config.block_size
    # The convention of the field: a backward pass costs twice its forward pass. Evaluation is not counted.
    step_flops = 3 * sequences_per_step * forward_flops(model.config, config.block_size)
    config = dataclasses.replace(config, max_iters=number_of_steps(config, step_flops))
    optimizer = configure_optimizer(model, config)
    scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.dtype == "float16")
    state = {"optimizer": optimizer, "scaler": scaler}
    predictor = [p for name, p in model.named_parameters() if ".predictor." in name]
    trunk = [p for name, p in model.named_parameters() if ".predictor." not in name]
    tokens = " and ".join(f"{len(split):,} {name}" for name, split in data.items())
    print(f"{meta['source']}: {tokens} tokens, a vocabulary of {meta['vocab_size']}")
    print(describe(model, config.device, config.dtype, config.compile == "True"))
    print(
        f"{config.max_iters:,} steps of {tokens_per_step:,} tokens, {config.max_iters * step_flops:.3g} training FLOPs "
        "(3 x the top-k forward pass, evaluation not counted)"
    )

    out_dir = Path(config.out_dir)
    if config.resume and not out_dir.is_dir():
        raise UserError(f"nothing to resume in {out_dir}: there is no such folder")
    with contextlib.ExitStack() as held, run.Stop() as stop:
        # Where it goes: on with the run that stands there, or that one is moved aside, never overwritten.
        info = {"config": asdict(config), "asked": asked, "versions": versions(config.device), "data": meta}
        progress = run.Progress()
        with ranks.main_first():
            held.enter_context(run.only_run_in(out_dir))
            if config.resume:
                progress = run.load(out_dir, model, state, config.max_iters, info)
            elif ranks.is_main():
                run.keep_earlier_run(out_dir)
            if ranks.is_main():
                # From here on the folder counts as a run, however early it ends.
                size = {"parameters": model.num_parameters(), "flops_per_step": step_flops}
                checkpoint.write_json(out_dir / "config.json", {**info, **size})
                run.write_metrics(out_dir, progress.rows)
        rows = progress.rows
        logger = None
        if config.wandb and ranks.is_main():
            logger = import_wandb().init(project=config.wandb, name=out_dir.name, config=asdict(config))

        # The loop. Seeds come from the step, so evaluation and logging can never change the training, and the step is
        # all the random state that there is to save.
        if config.compile == "True":
            model.compile()
        peak = peak_flops(config.device, config.dtype)
        wrapped = ranks.wrap(model, config.device)
        batch_options = ("batch_size", "block_size", "seed", "device", "gradient_accumulation_steps")
        batch = {name: getattr(config, name) for name in batch_options}
        hidden = None if ranks.is_main() else True  # None: where there is no terminal
        bar = tqdm(total=config.max_iters, initial=progress.step, disable=hidden, unit="step", dynamic_ncols=True)
        shown = progress.step, progress.train_seconds
        while True:
            step = progress.step
            # A run that was stopped during an evaluation has no row for that step yet.
            evaluated = rows and rows[-1]["step"] == step
            if (step % config.eval_interval == 0 or step == config.max_iters) and not evaluated:
                row = {"step": step, "tokens": step * tokens_per_step, "flops": step * step_flops}
                row |= {"train_seconds": round(progress.train_seconds, 3), **mean_losses(progress)}
                evaluation = evaluate(model, data["val"], config.batch_size, config.eval_iters, config.dtype, stop)
                if evaluation is not None:
                    row |= evaluation
                    stop_if_not_finite(row["val_loss_causal"], "validation loss", step)
                    rows.append(row)
                    progress.loss_sum = progress.aux_sum = 0.0
                    run.save(out_dir, model, state, progress, info, stop)
                    if ranks.is_main():
                        tqdm.write(report(row, config.max_iters))
                    if logger:
                        logger.log(row, step=step)
            if ranks.any_rank(stop.requested) or step == config.max_iters:
                break

            begun = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, config)
            losses = torch.zeros(2, device=config.device, dtype=model.lm_head.weight.dtype)  # language model, auxiliary
            micro_steps = ranks.share(config.gradient_accumulation_steps)
            for micro_step in micro_steps:
                x, y = training_batch(data["train"], step, micro_step=micro_step, **batch)
                torch.manual_seed(seed_of(config.seed, step, micro_step))  # dropout, and the stochastic control's noise
                with ranks.exchange_gradients(wrapped, micro_step == micro_steps[-1]):
                    with autocast(config.device, config.dtype):
                        _, loss = wrapped(x, y, routing="topk")
                    # Over this rank's micro-steps the mean; the exchange makes it the mean over all ranks'.
                    objective = (loss + config.aux_weight * model.aux_loss) / len(micro_steps)
                    scaler.scale(objective).backward()
                losses += torch.stack([loss.detach(), model.aux_loss.detach()]) / config.gradient_accumulation_steps
            ranks.sum_over_ranks(losses)
            scaler.unscale_(optimizer)
            # Apart: under one common norm the predictor's gradient would scale the trunk's, stop-gradient or not.
            limit = config.grad_clip or math.inf
            norms = [torch.nn.utils.clip_grad_norm_(part, limit) for part in (trunk, predictor) if part]
            # A gradient may overflow in float16; the scaler then leaves out the update, and scales less.
            may_overflow = scaler.is_enabled() and scaler.get_scale() >= 1 and losses[0].isfinite()
            if not may_overflow:
                # Before the update: or the run would go on for nothing until the next evaluation finds NaN.
                stop_if_not_finite(sum(norms).item(), "norm of the gradient", step, f" (the loss: {losses[0].item()})")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            progress.loss_sum = progress.loss_sum + losses[0]
            progress.aux_sum = progress.aux_sum + losses[1]
            progress.step += 1
            progress.train_seconds += time.perf_counter() - begun

            if progress.step % config.log_interval == 0 or progress.step == config.max_iters:
                shown_before, shown = shown, (progress.step, progress.train_seconds)
                steps, seconds = (now - before for now, before in zip(shown, shown_before))
                mfu = f", MFU {steps * step_flops / seconds / peak:.0%}" if peak else ""
                speed = f"{steps * tokens_per_step / seconds:,.0f} tokens/s{mfu}"
                bar.set_postfix_str(f"loss {losses[0].item():.3f}, {speed}", refresh=False)
                bar.update(steps)
        bar.close()
        if logger:
            logger.finish()
        if progress.saved != progress.step and not run.save(out_dir, model, state, progress, info, stop):
            raise UserError(f"the run ends at step {step:,} without a checkpoint of it; make space, then --resume")
        if not rows or rows[-1]["step"] < config.max_iters:
            launcher = "torchrun (with the options it had)" if ranks.under_torchrun() else "python"
            go_on = f"{launcher} train.py --resume --out_dir={shlex.quote(config.out_dir)}"
            raise KeyboardInterrupt(f"Stopped and saved at step {step:,}. Go on with: {go_on}")

    best_row = min(rows, key=lambda row: row["val_loss_causal"])
    print(f"final {report(rows[-1], config.max_iters)}")
    print(f"best  {report(best_row, config.max_iters)}")
    print(f"{progress.train_seconds / 60:.1f} minutes of training. Next: python sample.py --out_dir={config.out_dir}")
    return rows


# Options


def options_of_the_run(given):
    """For --resume: the options of the run in out_dir, to stand in for the defaults."""
    if not given.get("resume"):
        return {}
    out_dir = given.get("out_dir", TrainConfig.out_dir)
    saved = run.saved_options(Path(out_dir))
    if saved is None:
        raise UserError(
            f"nothing to resume in {out_dir}: no config.json of a run of train.py there; name its folder by --out_dir, "
            "or begin one without --resume"
        )
    names = {field.name for field in dataclasses.fields(TrainConfig)} - {"out_dir", "resume"}
    saved = {name: value for name, value in saved.items() if name in names}
    if {"max_iters", "flop_budget"} & given.keys():  # a new length replaces the old one, however it was given
        saved |= {"max_iters": 0, "flop_budget": 0.0}
    return saved


def resolve(config):
    """`config` with "auto" replaced by what it means on this machine, its numbers checked."""
    positive = "eval_interval eval_iters log_interval batch_size gradient_accumulation_steps"
    not_negative = (
        "vocab_size max_iters flop_budget warmup_iters learning_rate min_lr weight_decay grad_clip aux_weight seed"
    )
    for least, names in ((1, positive), (0, not_negative)):
        for name in names.split():
            if not least <= getattr(config, name) < 2**63:
                raise UserError(f"{name} must be a finite number, at least {least}; got {getattr(config, name)}")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{name} must be in [0, 1), got {getattr(config, name)}")
    device = ranks.device(pick_device(config.device))
    if config.gradient_accumulation_steps % ranks.ranks() and not config.eval_only:
        raise UserError(
            f"gradient_accumulation_steps {config.gradient_accumulation_steps} cannot be shared by {ranks.ranks()} "
            f"ranks; take a multiple of {ranks.ranks()}"
        )
    if config.wandb:
        import_wandb()  # what is missing shows before anything is done
    on_cuda = device.startswith("cuda")
    dtype, compiled = config.dtype, config.compile
    if dtype == "auto":
        dtype = "bfloat16" if on_cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if compiled == "auto":
        # Elsewhere it needs a C++ compiler, or gains little, or does not work.
        compiled = str(on_cuda and sys.platform == "linux")
    return dataclasses.replace(config, device=device, dtype=dtype, compile=compiled)


def model_config(config, meta):
    """The model's config among the options; its vocabulary is the data's unless a larger one is asked for."""
    kind, _ = kind_of(asdict(config))
    names = {field.name for field in dataclasses.fields(kind)}
    values = {name: value for name, value in asdict(config).items() if name in names}
    values["vocab_size"] = config.vocab_size or meta["vocab_size"]
    if not config.n_expert and (config.staged or config.n_noop):
        raise UserError("staged and n_noop are about experts; give their number too, such as --n_expert=4")
    if config.n_expert and not 0 < config.route_every <= config.n_layer:
        raise UserError(
            f"n_expert {config.n_expert}, but no block has them: experts are in the blocks that route_every "
            f"{config.route_every} routes among {config.n_layer}"
        )
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(str(error)) from None


def number_of_steps(config, step_flops):
    limits = [config.max_iters] if config.max_iters else []
    if config.flop_budget:
        limits.append(int(config.flop_budget // step_flops))
    if not limits:
        raise UserError(
            "give the length of the run by --max_iters or --flop_budget, "
            "or start from a preset: python train.py config/shakespeare_mod.py"
        )
    if min(limits) < 1:
        raise UserError(f"flop_budget {config.flop_budget:g} is less than one step, which costs {step_flops:g} FLOPs")
    return min(limits)


# Optimization


def configure_optimizer(model, config):
    """AdamW; matrices and embeddings decay, vectors do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def learning_rate_at(step, config):
    """Linear warm-up, then half a cosine that ends at min_lr with the run's last step."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if not config.decay_lr:
        return config.learning_rate
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.min_lr + (config.learning_rate - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


# Evaluation


def evaluate_checkpoint(config):
    """The best checkpoint's losses, over the windows of its run."""
    model, info = checkpoint.load(Path(config.out_dir), "best", config.device)
    if "config" not in info:
        raise UserError(f"{config.out_dir} is not of a run of train.py, which says over what to evaluate it")
    of_the_run = {name: info["config"][name] for name in ("block_size", "vocab_size", "batch_size", "eval_iters")}
    config = dataclasses.replace(config, **of_the_run)
    with ranks.main_first():
        meta, data = load_dataset(config.dataset, config.block_size, config.vocab_size, check=ranks.is_main())
    if info["data"]["sha256"] != meta["sha256"]:
        raise UserError(
            f"{config.out_dir} was trained on {info['data']['source']!r}, {config.dataset} holds {meta['source']!r}; "
            "name the run's data set by --dataset"
        )
    row = {"step": info["step"], **evaluate(model, data["val"], config.batch_size, config.eval_iters, config.dtype)}
    print(report(row, info["config"]["max_iters"]))
    return [row]


# Logging and divergence


def import_wandb():
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs Weights & Biases: pip install wandb") from None
    return wandb


class Diverged(UserError):
    """A loss or a gradient is no number any more."""


def stop_if_not_finite(value, name, step, more=""):
    if not math.isfinite(value):
        raise Diverged(
            f"the {name} is {value} at step {step:,}{more}: the run diverged; the checkpoints before it stay. "
            "Try a lower --learning_rate, a longer --warmup_iters or --dtype=float32"
        )


def mean_losses(progress):
    """The mean training losses since the last evaluation; nothing before the first step."""
    steps = progress.step - progress.rows[-1]["step"] if progress.rows else 0
    sums = {"train_loss": progress.loss_sum, "aux_loss": progress.aux_sum} if steps else {}
    return {name: float(total) / steps for name, total in sums.items()}


if __name__ == "__main__":
    main()
