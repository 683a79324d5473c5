"""
Train a GPT, Mixture-of-Depths or dense:

    python train.py config/shakespeare_mod.py
    python train.py config/shakespeare_mod.py --capacity=0.25 --out_dir=out-quarter
    python train.py --resume --out_dir=out-quarter

The file reads from top to bottom: the options; `train`, the recipe; `training_step`; what these two are made of. In a
notebook call the same function: `train(TrainConfig(...))`.
"""

import contextlib
import dataclasses
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from mode import MoDEConfig, build, config_class
from support import checkpoint, options, ranks, run
from support.data import load_dataset, seed_of, training_batch
from support.evaluation import autocast, bits_per_byte, evaluate, evaluate_checkpoint
from support.files import write_json
from support.options import UserError, at_least, command, errors_in_one_line, load, pick_device, pick_dtype, show
from support.report import ProgressLine, describe, import_wandb, report, versions
from support.stop import Stop
from variants import VARIANTS


@dataclass
class TrainConfig(MoDEConfig):
    """All options. Those of the model come from mod.py and mode.py. The comments are the help texts."""

    # options of the model whose defaults differ from those in mod.py
    block_size: int = 256
    vocab_size: int = 0  # number of tokens; 0: as many as the data set has
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    bias: bool = False
    n_expert: int = 0
    # files and evaluation
    out_dir: str = "out"  # folder for checkpoints, metrics.jsonl and config.json
    resume: bool = False  # continue the run in out_dir from its last checkpoint, with its options
    dataset: str = "shakespeare_char"  # a folder below data/, or the path of any folder that a prepare.py wrote
    init_from: str = ""  # start from the best weights in this folder, of a run or of support.gpt2; empty: random ones
    eval_interval: int = 250  # steps between evaluations
    eval_iters: int = 200  # batches per evaluation at most; a smaller validation split is read whole, once
    eval_only: bool = False  # evaluate the best checkpoint in out_dir and exit
    log_interval: int = 10  # steps between updates of the progress line
    wandb: str = ""  # also log to this project of Weights & Biases; empty: do not
    # length
    max_iters: int = 0  # training steps; 0: as many as flop_budget pays for
    flop_budget: float = 0.0  # training FLOPs, 3 x the top-k forward pass; with max_iters too, the lower limit holds
    batch_size: int = 64  # sequences per micro-step
    gradient_accumulation_steps: int = 1  # micro-steps per training step
    # AdamW; the learning rate warms up linearly, then follows a cosine over exactly the run
    learning_rate: float = 1e-3  # peak learning rate
    min_lr: float = 1e-4  # learning rate at the end of the run
    decay_lr: bool = True  # False: stay at learning_rate after the warm-up
    warmup_iters: int = 100  # steps of warm-up
    weight_decay: float = 0.1  # on matrices and embeddings; biases and LayerNorms have none
    beta1: float = 0.9  # AdamW's decay rate of the mean gradient
    beta2: float = 0.99  # AdamW's decay rate of the mean squared gradient
    grad_clip: float = 1.0  # clip the norm of the gradient at this; 0: do not clip
    aux_weight: float = 0.1  # weight of the routing loss, which trains the causal decisions
    seed: int = 1337  # of weights, batches and dropout
    # the machine
    device: str = "auto"  # auto (the best available), cpu, cuda, cuda:1, mps, ...
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 if the GPU has it
    compile: Literal["auto", "True", "False"] = "auto"  # torch.compile; auto: on CUDA under Linux

    def __post_init__(self):
        pass  # not GPTConfig's checks: `model_config` makes them, when the vocabulary is known


def main(argv=None):
    advice = "halve --batch_size and double --gradient_accumulation_steps and --eval_iters, which is the same training"
    with errors_in_one_line("train.py", advice), ranks.joined():
        train(load(TrainConfig, argv, __doc__.split(":")[0], preset=True, combine=options_of_the_run))


def train(config):
    """
    Train as `config` (a TrainConfig) says. Writes checkpoints, metrics.jsonl and config.json to its out_dir.

    Returns the rows of metrics.jsonl: one dict per evaluation, with losses in nats per token. Raises UserError for
    options or data that cannot work, before training, and if the run diverges. On Ctrl-C or SIGTERM it saves and raises
    KeyboardInterrupt. With config.resume it continues the run in out_dir; with config.eval_only it evaluates the best
    checkpoint there, on eval_iters batches of batch_size windows. Resuming uses exactly these options. (On the command
    line the run's own apply.)
    """
    started = time.monotonic()
    config = options.checked(config)
    # Saved as asked for, because "auto" may mean something else on the machine where the run is resumed.
    asked = {name: getattr(config, name) for name in ("device", "dtype", "compile")}
    config = resolve(config)
    if config.eval_only:
        row, max_iters = evaluate_checkpoint(config)
        if not math.isfinite(row["val_loss_causal"]):
            raise UserError(f"the model in {config.out_dir} has the loss {row['val_loss_causal']}; use another one")
        print(report(row, max_iters))
        return [row]
    model_config(config, {"vocab_size": 1})  # refuses bad options before any data is prepared
    with ranks.main_first():
        meta, data = load_dataset(config.dataset, config.block_size, config.vocab_size, check=ranks.is_main())
    torch.manual_seed(config.seed)
    model = build(model_config(config, meta))
    no_gate = config.variant == "no_gate"
    if ranks.ranks() > 1 and (no_gate or run.counts_passes(model)):
        why = "gives its routers no gradient" if no_gate else "counts its passes, which differ by rank"
        raise UserError(f"variant {config.variant} {why}; train on one rank")
    if config.init_from and not config.resume:
        checkpoint.start_from(Path(config.init_from), model, meta)
    model.to(config.device)
    sequences_per_step = config.gradient_accumulation_steps * config.batch_size
    tokens_per_step = sequences_per_step * config.block_size
    # By convention a backward pass costs twice its forward pass. Evaluation is not counted.
    step_flops = 3 * sequences_per_step * model.flops(config.block_size)
    config = dataclasses.replace(config, max_iters=number_of_steps(config, step_flops))
    tokens = " and ".join(f"{len(split):,} {name}" for name, split in data.items())
    show(f"{meta['source']}: {tokens} tokens, a vocabulary of {meta['vocab_size']}")
    print(describe(model, config.device, config.dtype, config.compile == "True"))
    print(
        f"{config.max_iters:,} steps of {tokens_per_step:,} tokens, {config.max_iters * step_flops:.3g} training FLOPs "
        "(3 x the top-k forward pass, evaluation not counted)"
    )
    if config.warmup_iters >= config.max_iters:
        print(
            f"The warm-up takes {config.warmup_iters:,} steps, the run {config.max_iters:,}: the learning rate never "
            "reaches its peak; lower --warmup_iters"
        )

    out_dir = Path(config.out_dir)
    if config.resume and not out_dir.is_dir():
        raise UserError(f"nothing to resume in {out_dir}: there is no such folder")
    with contextlib.ExitStack() as held, Stop() as stop:
        # Inside Stop, because the first optimizer imports more of PyTorch, and a Ctrl-C would leave it half imported.
        optimizer = configure_optimizer(model, config)
        scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.dtype == "float16")
        stateful = {"optimizer": optimizer, "scaler": scaler}
        # Continue the run in out_dir, or move it aside. It is never overwritten.
        info = {"config": asdict(config), "asked": asked, "versions": versions(config.device), "data": meta}
        info |= {"parameters": model.num_parameters(), "flops_per_step": step_flops}
        progress = run.Progress()
        with ranks.main_first():
            held.enter_context(run.only_run_in(out_dir))
            if config.resume:
                progress = run.load(out_dir, model, stateful, config.max_iters, info, defaults=asdict(TrainConfig()))
            elif ranks.is_main():
                run.keep_earlier_run(out_dir)
            if ranks.is_main():
                # From here on the folder counts as a run, however early it ends.
                write_json(out_dir / "config.json", info)
                run.write_metrics(out_dir, progress.rows)
        rows = progress.rows
        logger = None
        if config.wandb and ranks.is_main():
            logger = import_wandb().init(project=config.wandb, name=out_dir.name, config=asdict(config))
        if config.compile == "True":
            model.compile()
        wrapped = ranks.wrap(model, config.device)

        def batch(step, micro_step):
            return training_batch(
                data["train"], step, config.batch_size, config.block_size, config.seed, config.device,
                micro_step, config.gradient_accumulation_steps,
            )  # fmt: skip

        if ranks.ranks() > 1:
            # After its first backward pass DistributedDataParallel reorders the gradients it exchanges. This changes
            # how a sum over three ranks rounds. Do it before the first step, so a resumed run has the same order.
            with autocast(config.device, config.dtype):
                _, loss = wrapped(*batch(0, 0), routing="topk")
            (loss + model.routing_loss()).backward()
            model.zero_grad(set_to_none=True)
        line = ProgressLine(progress, config.max_iters, tokens_per_step, step_flops, config.device, config.dtype)

        # The loop. All seeds come from the step, so evaluation and logging cannot change the training, and a checkpoint
        # needs no random state beyond the step.
        while True:
            step = progress.step
            # A run that was stopped during an evaluation has no row for that step yet.
            evaluated = rows and rows[-1]["step"] == step
            if (step % config.eval_interval == 0 or step == config.max_iters) and not evaluated:
                row = {"step": step, "tokens": step * tokens_per_step, "flops": step * step_flops}
                progress.read(scaler)
                row |= {"train_seconds": round(progress.train_seconds, 3), **progress.mean_losses()}
                evaluation = evaluate(model, data["val"], config.batch_size, config.eval_iters, config.dtype, stop)
                if evaluation is not None:  # None: asked to stop meanwhile
                    row |= evaluation | bits_per_byte(evaluation, meta)
                    if not math.isfinite(row["val_loss_causal"]):
                        raise run.Diverged("validation loss", row["val_loss_causal"], step)
                    rows.append(row)
                    progress.loss_sum = progress.aux_sum = 0.0
                    run.save(out_dir, model, stateful, progress, info, stop)
                    if ranks.is_main():
                        tqdm.write(report(row, config.max_iters))
                    if logger:
                        logger.log(row, step=step)
            if ranks.any_rank(stop.requested) or step == config.max_iters:
                break

            begun = time.perf_counter()
            figures = training_step(model, wrapped, optimizer, scaler, batch, step, config)
            progress.add(figures, time.perf_counter() - begun)
            if progress.step % config.log_interval == 0 or progress.step == config.max_iters:
                progress.read(scaler)
                line.update(progress)

        line.close()
        if logger:
            logger.finish()
        if progress.saved != progress.step and not run.save(out_dir, model, stateful, progress, info, stop):
            raise UserError(f"the checkpoint of step {step:,} could not be saved; free disk space, then --resume")
        if not rows or rows[-1]["step"] < config.max_iters:
            launcher = "torchrun (with the options it had)" if ranks.under_torchrun() else "python"
            resume = command("train.py", "--resume", f"--out_dir={config.out_dir}")
            raise KeyboardInterrupt(f"Stopped and saved at step {step:,}. Resume with: {launcher} {resume}")

    best_row = min(rows, key=lambda row: row["val_loss_causal"])
    minutes, in_all = progress.train_seconds / 60, (time.monotonic() - started) / 60
    print(f"Best causal loss: {best_row['val_loss_causal']:.4f} at step {best_row['step']:,}.")
    print(f"Trained for {minutes:.1f} minutes in all; this command took {in_all:.1f}, with evaluation.")
    print(f"Next: {command('python', 'sample.py', f'--out_dir={config.out_dir}')}")
    return rows


def training_step(model, wrapped, optimizer, scaler, batch, step, config):
    """
    Forward, backward and update for one step, on this rank's share of its micro-steps. `wrapped` is the model, under
    torchrun inside DistributedDataParallel. batch(step, micro_step) gives inputs and targets, each (batch_size, T).

    Returns the step's mean losses over all ranks, language model and routing, and the sum of its gradient norms (3,),
    on the device. `Progress.read` finds a sum that is not finite: nothing here waits for the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, config)
    losses = torch.zeros(2, device=config.device, dtype=model.lm_head.weight.dtype)
    micro_steps = ranks.share(config.gradient_accumulation_steps)
    for micro_step in micro_steps:
        x, y = batch(step, micro_step)
        torch.manual_seed(seed_of(config.seed, step, micro_step))  # for dropout, and for variants that draw noise
        with ranks.exchange_gradients(wrapped, micro_step == micro_steps[-1]):
            with autocast(config.device, config.dtype):
                _, loss = wrapped(x, y, routing="topk")
            routing_loss = model.routing_loss()
            # The mean over this rank's micro-steps. The exchange makes it the mean over all ranks'.
            objective = (loss + config.aux_weight * routing_loss) / len(micro_steps)
            scaler.scale(objective).backward()
        losses += torch.stack([loss.detach(), routing_loss.detach()]) / config.gradient_accumulation_steps
    ranks.sum_over_ranks(losses)
    scaler.unscale_(optimizer)
    norm = clip_gradients(model, config.grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return torch.cat([losses, norm.unsqueeze(0)])


def clip_gradients(model, limit):
    """Clip the predictors' gradients and all others separately. Returns the sum of both norms: finite if both are."""
    # Under one common norm the predictors' gradients would scale the others, and so change the language model.
    predictor, trunk = [], []
    for name, p in model.named_parameters():
        (predictor if ".predictor." in name else trunk).append(p)
    return sum(torch.nn.utils.clip_grad_norm_(part, limit) for part in (trunk, predictor) if part)


def configure_optimizer(model, config):
    """AdamW with weight decay on matrices and embeddings, none on vectors."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def learning_rate_at(step, config):
    """Linear warm-up, then half a cosine that reaches min_lr at the end of the run."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if not config.decay_lr:
        return config.learning_rate
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.min_lr + (config.learning_rate - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


# Options and checks


def options_of_the_run(preset, given):
    """
    The options to use. With --resume these are the run's own, with --eval_only its best checkpoint's, changed by the
    command line; of a preset only out_dir counts then.
    """
    for name in ("resume", "eval_only"):
        if preset.get(name):
            raise UserError(f"{name} belongs on the command line, not in a preset; run train.py --{name}")
    if not (given.get("resume") or given.get("eval_only")):
        return {**preset, **given}
    out_dir = {**preset, **given}.get("out_dir", TrainConfig.out_dir)
    if given.get("eval_only"):
        best = checkpoint.contents(Path(out_dir), "best")
        if "config" not in best:  # weights of support.gpt2; `evaluate_checkpoint` says so
            return {**given, "out_dir": out_dir}
        saved = {**best["config"], **best.get("asked", {})}
    else:
        saved = run.saved_options(Path(out_dir))
    if saved is None:
        runs = sorted(str(path.parent) for path in Path().glob("*/last.json"))
        advice = f"one of {', '.join(runs)}" if runs else "or start a run without --resume"
        raise UserError(
            f"nothing to resume in {out_dir}: it has no config.json of a run; name the run's folder with --out_dir, "
            + advice
        )
    if len(preset) > 1:
        print("The run's own options apply; of the preset only out_dir is used")
    fields = [field for field in dataclasses.fields(TrainConfig) if field.name in saved]
    saved = {field.name: options.convert(field, saved[field.name], f"{out_dir}: {field.name}") for field in fields}
    how = "eval_only" if given.get("eval_only") else "resume"
    of_the_model = {field.name for field in dataclasses.fields(MoDEConfig)} if how == "eval_only" else set()
    for name in sorted(given.keys() & ({"init_from"} | of_the_model)):
        if given[name] != saved.get(name):
            value = f"{name} {given[name]!r} is not the run's ({saved.get(name)!r})"
            raise UserError(f"{value} and has no effect with --{how}; leave it out")
    if {"max_iters", "flop_budget"} & given.keys():  # either one replaces the run's old length
        saved |= {"max_iters": 0, "flop_budget": 0.0}
    return {**saved, **given, "out_dir": out_dir}


def resolve(config):
    """`config` with its values checked and "auto" replaced by what it means on this machine."""
    at_least(1, config, "eval_interval eval_iters log_interval batch_size gradient_accumulation_steps")
    at_least(0, config, "vocab_size max_iters warmup_iters learning_rate min_lr weight_decay grad_clip")
    at_least(0, config, "aux_weight seed")
    if not 0 <= config.flop_budget <= 1e30:  # large models need more than 2**53, the limit in at_least
        raise UserError(f"flop_budget must be a number from 0 to 1e30, got {config.flop_budget}")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{name} must be in [0, 1), got {getattr(config, name)}")
    if config.decay_lr and config.min_lr > config.learning_rate and not config.eval_only:
        raise UserError(
            f"min_lr {config.min_lr:g} is above learning_rate {config.learning_rate:g}, so the rate would rise; "
            f"lower it too, such as --min_lr={config.learning_rate / 10:g}"
        )
    in_nanogpt = {"scratch": "leave it out", "resume": "use --resume"}
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        in_nanogpt[name] = f"run python -m support.gpt2 --model={name} --out_dir=out-{name}, then name that folder"
    hint = in_nanogpt.get(config.init_from)
    if hint and not config.resume and not Path(config.init_from).is_dir():
        raise UserError(f"init_from is the folder of a model; for {config.init_from}, {hint}")
    device = ranks.device(pick_device(config.device))
    if config.gradient_accumulation_steps % ranks.ranks() and not config.eval_only:
        raise UserError(
            f"gradient_accumulation_steps {config.gradient_accumulation_steps} cannot be shared by {ranks.ranks()} "
            f"ranks; take a multiple of {ranks.ranks()}"
        )
    if config.wandb and not config.eval_only:
        import_wandb()  # if it is missing, say so before anything is done
    auto = str(device.startswith("cuda") and sys.platform == "linux")  # elsewhere it needs a compiler or gains little
    compiled = auto if config.compile == "auto" else config.compile
    if compiled == "True" and device == "cpu" and torch.__version__ < "2.7" and not config.eval_only:
        raise UserError("PyTorch 2.6 compiles wrong gradients for a CPU; update PyTorch, or use --compile=False")
    return dataclasses.replace(config, device=device, dtype=pick_dtype(config.dtype, device), compile=compiled)


def model_config(config, meta):
    """The model's own config, a GPTConfig or MoDEConfig, with the data set's vocabulary unless a larger one is set."""
    if config.route_every > config.n_layer:
        raise UserError(
            f"route_every {config.route_every} routes none of {config.n_layer} blocks; "
            "use more blocks, or --route_every=0 for a dense GPT"
        )
    untrained = not getattr(VARIANTS.get(config.variant), "has_routing_loss", True)  # unknown names are refused below
    without_effect = (
        (not config.route_every, "capacity causal_method variant n_expert", "in a dense GPT (route_every 0)"),
        (not config.n_expert, "expert_capacity n_noop staged", "without experts (n_expert 0)"),
        (config.n_expert and not config.staged, "capacity", "beside experts that are not staged"),
        (untrained, "causal_method", f"in the variant {config.variant}"),
    )
    for applies, names, where in without_effect:
        for name in names.split() if applies else ():
            if getattr(config, name) != getattr(TrainConfig, name):
                raise UserError(f"{name} {getattr(config, name)} has no effect {where}; leave it out")
    cls = config_class(asdict(config))
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(cls)}
    values["vocab_size"] = config.vocab_size or meta["vocab_size"]
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(str(error)) from None


def number_of_steps(config, step_flops):
    if not (config.max_iters or config.flop_budget):
        raise UserError(
            "set the length of the run with --max_iters or --flop_budget, "
            "or start from a preset: python train.py config/shakespeare_mod.py"
        )
    affordable = int(config.flop_budget // step_flops) if config.flop_budget else config.max_iters
    if affordable < 1:
        raise UserError(f"flop_budget {config.flop_budget:g} is less than one step, which costs {step_flops:g} FLOPs")
    return min(affordable, config.max_iters or affordable)


if __name__ == "__main__":
    main()
