"""What isoflop.py's runs say: tables in Markdown, and pictures. It trains nothing."""

import hashlib
import math
import statistics
from dataclasses import asdict, dataclass, replace

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure  # no pyplot: it draws to files, and leaves a notebook's own drawing alone

from experiments.runner import FRESH, SEEDS, loss_for_choice
from plot import spread
from support.checkpoint import write_whole

LOOKS = {
    "dense": dict(color="#1f4e79", marker="o", linestyle="-"),
    "MoD": dict(color="#d1495b", marker="s", linestyle="--"),
}


MARGIN = 0.5  # percent of the loss: what is still "as good"
SAVING = 0.75  # of the FLOPs per forward pass, at most: what counts as cheaper
# Half of a 95 % interval in standard errors, by the number of seeds: Student's t with one degree of freedom less.
T_95 = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}


@dataclass
class Model:
    """The runs of one model at its best learning rate."""

    run: object  # of seed 1: isoflop.Run or another experiment's
    choice: float  # the loss on the data for choosing: the mean of SEEDS once all are there, before that seed 1's
    rows: list  # the lines that the figures are of: FRESH seeds; before they are all there, SEEDS but the first, or it

    @property
    def kind(self):
        return "MoD" if self.run.route_every else "dense"

    @property
    def name(self):
        return f"{self.run.n_layer} x {self.run.n_embd}"

    @property
    def complete(self):
        return len(self.rows) >= len(SEEDS) - 1

    def __getitem__(self, name):
        return self.rows[0][name]

    def losses(self, routing="causal"):
        return [row["report"][f"val_loss_{routing}"] for row in self.rows]

    def mean(self):
        return statistics.mean(self.losses())

    def deviation(self):
        """Standard deviation over seeds; None for one."""
        return statistics.stdev(self.losses()) if len(self.rows) > 1 else None


def models_of(done):
    """Each model at the learning rate that was best on the data for choosing; none of which a seed diverged."""
    best = {}
    for run in done:
        key = replace(run, learning_rate=0)
        if run.seed == SEEDS[0] and loss_for_choice(run, done) < loss_for_choice(best.get(key), done):
            best[key] = run
    models = []
    for run in best.values():
        runs = [[replace(run, seed=seed) for seed in group] for group in (SEEDS, FRESH)]
        first, fresh = ([done[again] for again in group if again in done] for group in runs)
        if all(row["report"] for row in first + fresh):
            choosing = first if len(first) == len(SEEDS) else first[:1]
            choice = statistics.mean(row["choose"]["val_loss_causal"] for row in choosing)
            models.append(Model(run, choice, fresh if len(fresh) == len(FRESH) else first[1:] or first))
    return models


def plain(models, budget, kind):
    """The models of the isoFLOP comparison, smallest first."""
    chosen = [model for model in models if model.run.plain and (model.run.budget, model.kind) == (budget, kind)]
    return sorted(chosen, key=lambda model: model["parameters"])


def best_of(models):
    """The best model, by the half for choosing; of those with all seeds, if there are any: one may be lucky."""
    return min([model for model in models if model.complete] or models, key=lambda model: model.choice, default=None)


def difference(a, b):
    """How far the mean loss of a lies above b's, in percent of it, and half its 95 % interval; infinite: seeds miss."""
    percent = 100 * (a.mean() / b.mean() - 1)
    if not (a.complete and b.complete):
        return percent, math.inf
    error = math.hypot(*(model.deviation() / math.sqrt(len(model.rows)) for model in (a, b)))
    return percent, T_95[min(len(a.rows), len(b.rows))] * 100 * error / b.mean()


def signed(difference):
    percent, half = difference
    return signed_percent(percent) + (f" ± {half:.2f}" if half < math.inf else " (too few seeds)")


def signed_percent(value):
    return f"{value:+.2f} %".replace("-0.00", "+0.00")


def budgets_of(models):
    """The budgets at which the comparison is whole: several sizes of each kind, all seeds of the best."""
    budgets = sorted({model.run.budget for model in models})
    pairs = {b: [plain(models, b, kind) for kind in LOOKS] for b in budgets}
    return [b for b, both in pairs.items() if all(len(part) > 1 and best_of(part).complete for part in both)]


def best_pairs(models):
    """{budget: [best dense, best MoD]} where the comparison is whole."""
    return {b: [best_of(plain(models, b, kind)) for kind in LOOKS] for b in budgets_of(models)}


def rival_of(model, models):
    """The dense model that is this MoD model without its routed blocks."""
    for other in plain(models, model.run.budget, "dense"):
        if (other.run.n_layer, other.run.n_embd) == (model.run.n_layer // 2, model.run.n_embd):
            return other


def cheaper(models, dense):
    """The best MoD model of the budget that is cheaper in a forward pass than this dense one by a margin, or None."""
    most = SAVING * dense["forward_flops_per_token"]
    return best_of([m for m in plain(models, dense.run.budget, "MoD") if m["forward_flops_per_token"] <= most])


def as_large(models, dense):
    """The best MoD model of the budget with about as many parameters as this dense one, or None."""
    found = plain(models, dense.run.budget, "MoD")
    return best_of([m for m in found if 0.8 < m["parameters"] / dense["parameters"] < 1.25])


def judged(models, budget):
    """The models that claims 1 to 4 compare at a budget, and the rival of the best MoD."""
    dense, mod = (best_of(plain(models, budget, kind)) for kind in LOOKS)
    if not dense or not mod:  # all of a kind diverged
        return []
    found = dense, mod, rival_of(mod, models), cheaper(models, dense), as_large(models, dense)
    return [model for model in found if model]


def table(models):
    """The best models of each budget, and the honest rival of the best MoD model."""
    lines = [
        "| FLOPs | model | layers x width | parameters | FLOPs/token | steps | rate | causal | top-k | against dense |"
    ]
    lines.append("|--:|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for budget, (dense, mod) in best_pairs(models).items():
        rival = rival_of(mod, models)
        rows = [("best dense", dense), ("best MoD", mod), ("the rival of this MoD", rival)]
        if rival is dense:
            rows = [("best dense, the rival of this MoD too", dense), ("best MoD", mod)]
        for name, model in rows:
            if model is None:  # it diverged
                continue
            cells = [
                short(budget),
                name,
                model.name,
                *size_and_losses(model),
                "" if model is dense else signed(difference(model, dense)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def size_and_losses(model):
    """Cells of a table: parameters, FLOPs per token, steps, learning rate, causal and top-k loss."""
    return [
        f"{model['parameters']:,}",
        f"{model['forward_flops_per_token']:,.0f}",
        f"{model['steps']:,}",
        f"{model.run.learning_rate:g}",
        spread(model.losses(), "{:.4f}"),
        spread(model.losses("topk"), "{:.4f}") if model.run.route_every else "same",
    ]


def ablation_table(models):
    """One thing changed in the best MoD model of a budget, at the best learning rate for each change."""
    lines = [
        "| FLOPs | changed | FLOPs/token | rate | causal | top-k | taken | against |",
        "|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for budget in budgets_with_changes(models):
        base, others = changes(models, budget)
        for name, model, rival in [(f"nothing: {base.name}", base, base), *others]:
            taken = statistics.mean(statistics.mean(row["report"].get("taken", [1])) for row in model.rows)
            cells = [
                short(budget),
                name,
                f"{model['forward_flops_per_token']:,.0f}",
                f"{model.run.learning_rate:g}",
                spread(model.losses(), "{:.4f}"),
                spread(model.losses("topk"), "{:.4f}") if model.run.route_every else "same",
                f"{taken:.1%}",
                "" if model is rival else signed(difference(model, rival)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def changes(models, budget):
    """
    The best plain MoD model of a budget; the models that differ from it in one thing, as (name, model, what to compare
    it with): itself unchanged, but for another context, whose loss is another one, the dense rival at that context.
    """
    base = best_of(plain(models, budget, "MoD"))
    others, rivals = [], {}
    for model in models:
        now, before = asdict(model.run), asdict(base.run)
        changed = {key: now[key] for key in now if key != "learning_rate" and now[key] != before[key]}
        if changed.keys() == {"block_size", "route_every", "n_layer"} and not model.run.route_every:
            rivals[model.run.block_size] = model
        elif len(changed) == 1 and changed.keys() <= CHANGED:
            others.append((label(*changed.popitem()), model, base))
    same_context = [other for other in others if other[1].run.block_size == base.run.block_size]
    other_context = [
        (f"{name}, against its rival", model, rivals[model.run.block_size])
        for name, model, _ in others
        if model.run.block_size in rivals
    ]
    return base, sorted([*same_context, *other_context], key=lambda other: other[0])


def budgets_with_changes(models):
    """The budgets at which more was changed than the sizes of the comparison."""
    found = {b: changes(models, b)[1] for b in budgets_of(models)}
    return [b for b, others in found.items() if any(model not in plain(models, b, "dense") for _, model, _ in others)]


CHANGED = {"capacity", "route_every", "causal_method", "variant", "block_size"}


def label(option, value):
    names = {
        "capacity": f"capacity {value}",
        "route_every": {0: "no block routed", 1: "every block routed"}.get(value, f"one block in {value} routed"),
        "causal_method": "auxiliary loss on the router, no predictor",
        "variant": f"{value} routing" if value in ("stochastic", "position") else str(value).replace("_", " "),
        "block_size": f"context {value}",
    }
    return names[option]


def expert_table(models):
    """Dense, MoD, MoE and MoDE of one shape at equal training FLOPs, the best first."""
    lines = ["| FLOPs | model | parameters | FLOPs/token | steps | rate | causal | top-k | against MoD |"]
    lines.append("|--:|---|--:|--:|--:|--:|--:|--:|--:|")
    for (budget, *_), kinds in with_experts(models).items():
        for name, model in sorted(kinds.items(), key=lambda pair: pair[1].mean()):
            against = signed(difference(model, kinds["MoD"])) if name != "MoD" and "MoD" in kinds else ""
            lines.append(
                f"| {short(budget)} | {name}, {model.name} | {' | '.join(size_and_losses(model))} | {against} |"
            )
    return "\n".join(lines)


WITHOUT = "dense, without these blocks"


def with_experts(models):
    """{(budget, layers, width): {name: model}} where models with experts were trained with all seeds."""
    found = {}
    for model in models:
        if model.run.experts and model.complete:
            found.setdefault((model.run.budget, model.run.n_layer, model.run.n_embd), {})[model.run.experts] = model
    for (budget, n, width), kinds in found.items():
        for name, shape in {"dense": (n, width, 0), "MoD": (n, width, 2), WITHOUT: (n // 2, width, 0)}.items():
            for model in plain(models, budget, "MoD" if name == "MoD" else "dense"):
                if model.complete and (model.run.n_layer, model.run.n_embd, model.run.route_every) == shape:
                    kinds[name] = model
    return dict(sorted(found.items()))


# Pictures


def draw_curves(models, path):
    """The isoFLOP curves: loss over parameters and over FLOPs per forward pass, a row for each budget."""
    budgets = budgets_of(models)
    axes_names = {"parameters": "parameters", "forward_flops_per_token": "FLOPs per token of a forward pass"}
    figure = Figure(figsize=(11, 4.2 * len(budgets)), layout="constrained")
    panels = figure.subplots(len(budgets), 2, squeeze=False, sharey="row")
    for row, budget in zip(panels, budgets):
        for axes, (x, label) in zip(row, axes_names.items()):
            for kind, look in LOOKS.items():
                chosen = plain(models, budget, kind)
                for depth in sorted({model.run.n_layer for model in chosen}):
                    line = [model for model in chosen if model.run.n_layer == depth]
                    axes.errorbar(
                        [model[x] for model in line],
                        [model.mean() for model in line],
                        yerr=[model.deviation() or 0 for model in line],
                        **{**look, "markersize": 5, "linewidth": 0.8, "capsize": 3},
                        label=kind if depth == chosen[0].run.n_layer else None,
                    )
                for model in chosen:
                    below = kind == "dense"
                    axes.annotate(
                        f"{model.run.n_layer}x{model.run.n_embd}",
                        (model[x], model.mean()),
                        xytext=(0, -11 if below else 6),
                        textcoords="offset points",
                        ha="center",
                        fontsize=7,
                        color=look["color"],
                    )
                best = best_of(chosen)
                axes.plot(best[x], best.mean(), marker="*", markersize=15, color=look["color"], zorder=5)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
            axes.xaxis.set_minor_formatter(ticker.NullFormatter())
            axes.set_xlabel(label)
            axes.grid(alpha=0.3, which="both")
        dense, mod = best_pairs(models)[budget]
        means = [model.mean() for kind in LOOKS for model in plain(models, budget, kind)]
        row[0].set_ylim(min(means) - 0.02, max(means) + 0.02)
        row[0].set_ylabel("held-out loss, causal (nats per character)\nno bar: seed 1 alone")
        row[0].set_title(
            f"{short(budget)} training FLOPs: best MoD (star) {signed(difference(mod, dense))} against best dense",
            fontsize=10,
            loc="left",
        )
        row[0].legend()
    save(figure, path)


def distances(models):
    """{budget: how far the best MoD lies above the best dense GPT, in percent, and half of its 95 % interval}."""
    return {b: difference(mod, dense) for b, (dense, mod) in best_pairs(models).items()}


def trend(found):
    """The slope of a straight line through `distances`, in percent for a factor of ten, and half its 95 % interval."""
    x = np.log10(list(found))
    mean, half = np.array(list(found.values())).T
    weight = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    return weight @ mean, math.hypot(*(weight * half))


def crossover(models):
    """How the distance goes with the budget; where it would be zero, if that can be said at all."""
    found = distances(models)
    if len(found) < 2:
        return "Two budgets are needed to say how the distance goes with the budget."
    lines = ["| FLOPs | best MoD against best dense | against its rival |", "|--:|--:|--:|"]
    for b, distance in found.items():
        mod = best_of(plain(models, b, "MoD"))
        rival = rival_of(mod, models)
        lines.append(f"| {short(b)} | {signed(distance)} | {signed(difference(mod, rival)) if rival else '-'} |")
    slope, half = trend(found)
    lines.append(
        f"\nFor a factor of ten in the budget the distance changes by {slope:+.2f} ± {half:.2f} points (95 %)."
    )
    if len(found) < 3 or abs(slope) <= half:
        lines.append("So these budgets do not say where, or whether, MoD draws level.")
    else:
        x, y = (statistics.mean(part) for part in zip(*((math.log10(b), mean) for b, (mean, _) in found.items())))
        lines.append(
            f"A straight line through them is at zero at {10 ** (x - y / slope):.0e} FLOPs.".replace("e+", "e")
        )
    return "\n".join(lines)


def draw_crossover(models, path):
    """The distance of the best MoD from the best dense GPT over the budget."""
    found = distances(models)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    mean, half = zip(*found.values())
    # no line between them: three budgets are no curve
    axes.errorbar(list(found), mean, yerr=half, capsize=4, **{**LOOKS["MoD"], "linestyle": ""}, label="the best MoD")
    axes.axhline(0, color=LOOKS["dense"]["color"], label="the best dense GPT")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1)  # a seed that hardly learned must not flatten all others
    axes.set_yticks([-10, -3, -1, -0.5, 0, 0.5, 1, 3, 10])
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("held-out loss of the best MoD, percent above")
    axes.set_title("How far the best MoD lies above the best dense GPT (95 % intervals)", loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def save(figure, path):
    """A PNG that knows of which runs it is: by the hash a test finds pictures that are older than the runs.jsonl."""
    metadata = {"Description": hash_of(path.parent / "runs.jsonl")}
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110, metadata=metadata))


def hash_of(path):
    """Of the lines of a text file, whatever ends them; empty where there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else ""


def draw_changes(models, path):
    """What one change in the best MoD model does, a row for each budget at which it was tried."""
    budgets = budgets_with_changes(models)
    figure = Figure(figsize=(8, 0.8 + 4.5 * len(budgets)), layout="constrained")
    panels = figure.subplots(len(budgets), 1, squeeze=False)
    for axes, budget in zip(panels[:, 0], budgets):
        base, others = changes(models, budget)
        others = [(name, model) for name, model, rival in others if rival is base]
        others.sort(key=lambda pair: pair[1].mean(), reverse=True)
        edge = 1.06 * base.mean()  # one that is far worse would press all others together
        for y, (_, model) in enumerate(others):
            if model.mean() > edge:
                axes.text(edge, y, f"{model.mean():.2f} →", ha="right", va="center", color="#1f4e79")
                continue
            look = dict(markerfacecolor="#1f4e79" if model.complete else "none")
            axes.plot(model.losses(), [y] * len(model.rows), "o", color="#1f4e79", alpha=0.5, markersize=4, **look)
            axes.plot(model.mean(), y, "|", color="#1f4e79", markersize=14)
        axes.axvline(base.mean(), color="#d1495b", label=f"unchanged: MoD {base.name}")
        axes.axvspan(min(base.losses()), max(base.losses()), color="#d1495b", alpha=0.15, label="range of its seeds")
        axes.set_xlim(right=edge)
        axes.set_ylim(-0.5, len(others) - 0.5)
        axes.set_yticks(range(len(others)), [name for name, _ in others])
        axes.set_xlabel("held-out loss, causal; a dot for each seed, a ring: seed 1 alone")
        axes.set_title(f"{short(budget)} training FLOPs: one thing changed", loc="left", fontsize=10)
        axes.grid(alpha=0.3, axis="x")
        axes.legend(loc="upper right")
    save(figure, path)


# The paper's claims

ISOFLOP, ROUTING = "`experiments.isoflop full`", "`experiments.routing all`"


def claims(models, routing, timed):
    """The paper's claims beside what was measured; lines of experiments/routing.py, figures of bench.py."""
    pairs = best_pairs(models)
    rows = [
        (
            "1. At equal training FLOPs the best MoD is at or below the best dense GPT",
            "up to 1.5 % below",
            claim_1(distances(models)),
        ),
        ("2. The best MoD has more parameters than the best dense GPT", "more", claim_2(pairs)),
        (
            "3. A MoD of fewer FLOPs per forward pass has the best dense loss",
            "up to 50 % fewer",
            as_good_and_cheaper(models, pairs, timed, cheaper),
        ),
        (
            "4. A MoD of the best dense GPT's size is as good, and faster",
            "upwards of 60 % faster",
            as_good_and_cheaper(models, pairs, timed, as_large),
        ),
        ("5. 12.5 % in every other block is best; stochastic routing fails", "yes; drastically worse", claim_5(models)),
        ("6. Without the future the loss is next to the same", "foretold 97-99 %", claim_6(pairs)),
        ("7. Routing is structured and goes with the entropy of the prediction", "pictures", claim_7(routing)),
        ("8. The gains of MoD and of experts add up", "yes", claim_8(models)),
    ]
    lines = ["| claim | paper | here | verdict | command |", "|---|---|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join((claim, paper, *found))} |" for claim, paper, found in rows])


def claim_1(found):
    here = "; ".join(f"{short(b)}: {signed(d)}" for b, d in found.items())
    b, (percent, half) = list(found.items())[-1]
    verdict = "not" if percent > half else "reproduced" if percent < -half else "no difference seen"
    return here, f"{verdict}, at {short(b)}", ISOFLOP


def claim_2(pairs):
    """Larger, and no dearer in a pass, which is the paper's reason; larger by its routed blocks alone is no finding."""
    here, cheaper = [], []
    for b, (dense, mod) in pairs.items():
        size, cost = (mod[x] / dense[x] for x in ("parameters", "forward_flops_per_token"))
        cheaper.append(size > 1 and cost <= 1)
        here.append(f"{short(b)}: {size:.2f} times as many, at {cost:.2f} times the FLOPs per forward pass")
    return "; ".join(here), "reproduced" if all(cheaper) else "partly" if any(cheaper) else "not", ISOFLOP


def as_good_and_cheaper(models, pairs, timed, choose):
    """Claims 3 and 4: whether choose(models, best dense GPT) is as good as that one, at fewer FLOPs in a pass."""
    here, verdict = [], "not testable with these sizes"
    for b, (dense, _) in pairs.items():
        best = choose(models, dense)
        if not best:
            here.append(f"{short(b)}: none in the grid")
            continue
        percent, half = difference(best, dense)
        size, cost = (best[x] / dense[x] for x in ("parameters", "forward_flops_per_token"))
        good, bad = percent + half < MARGIN and cost <= SAVING, percent - half > MARGIN or cost > SAVING
        verdict = f"{'reproduced' if good else 'not' if bad else 'undecided'}, at {short(b)}"
        here.append(f"{short(b)}: {best.name} against {dense.name} {signed((percent, half))}")
    if best:  # of the largest budget
        shapes = best.run.n_layer, best.run.n_embd, dense.name.replace(" ", "")
        times = [t for t in timed if (t["n_layer"], t["n_embd"], t.get("against")) == shapes]
        time = f"{times[0]['train_time_ratio']:.2f} of the time of a training step" if times else "time not measured"
        here[-1] += f", with {size:.2f} of the parameters, {cost:.2f} of the FLOPs per forward pass, {time}"
    return "; ".join(here), verdict, ISOFLOP


def claim_5(models):
    asked = ["capacity 0.0625", "capacity 0.25", "capacity 0.5", "every block routed", "stochastic routing"]
    found = []
    for b in budgets_of(models):
        base, others = changes(models, b)
        worse = {name: difference(model, base) for name, model, _ in others if name in asked and model.complete}
        if len(worse) == len(asked):
            found.append((b, worse))
    if not found:
        return "not run yet", "open", "`experiments.isoflop laptop`"
    b, worse = found[-1]
    here = "; ".join(f"{name} {signed(worse[name])}" for name in asked)
    # Drastically: by more than one percent.
    held = [percent - half > (1 if name == "stochastic routing" else 0) for name, (percent, half) in worse.items()]
    verdict = "reproduced" if all(held) else "partly" if any(held) else "not"
    return f"{here}, at the size that is best for 12.5 %", f"{verdict}, at {short(b)}", "`experiments.isoflop laptop`"


def claim_6(pairs):
    costs, right = {}, 1
    for b, (_, mod) in pairs.items():
        costs[b] = statistics.mean(100 * (c / t - 1) for c, t in zip(mod.losses(), mod.losses("topk")))
        right = min(right, *(row["report"]["predictor_accuracy"] for row in mod.rows))
    loss = "; ".join(f"{short(b)}: loss {signed_percent(cost)}" for b, cost in costs.items())
    small = max(costs.values()) < 0.3
    verdict = "reproduced" if small and right > 0.97 else "partly" if small else "not"
    return f"{loss}; at least {right:.1%} foretold (base rate 87.5 %)", verdict, ISOFLOP


def claim_7(routing):
    if not routing:
        return "not run yet", "open", ROUTING
    learned = [row["learned"] for row in routing]
    character, before, position = (
        [x or 0 for one in learned for x in one["known_by"][key]]
        for key in ("character", "character and the one before", "position")
    )
    ranks = [0.5 if x is None else x for one in learned for x in one["entropy_ranks_higher"]]
    uncertain, certain = sum(x > 0.6 for x in ranks), sum(x < 0.4 for x in ranks)
    here = (
        f"structured: the character tells {min(character):.0%} to {max(character):.0%} of a decision, with the one "
        f"before {min(before):.0%} to {max(before):.0%}, the position at most {max(position):.0%}; entropy: of "
        f"{len(ranks)} routed blocks {uncertain} clearly take the more uncertain tokens, {certain} the more certain"
    )
    if sum(x > 0.2 for x in character) < len(character) / 2:
        return here, "not", ROUTING
    return here, "reproduced" if uncertain == len(ranks) else "partly: structured, not by entropy", ROUTING


def claim_8(models):
    """
    Experts add to what MoD has, if staged MoDE is better than MoD, and than the dense GPT without the routed blocks.

    That it is better than MoE says less: its steps are cheaper by half, and what that alone is worth, that dense GPT
    shows. The paper's second finding: integrated MoDE is better than MoE of the same lowered capacity.
    """
    judged = [("staged MoDE", "MoD"), ("staged MoDE", WITHOUT), ("integrated MoDE", "MoE, lowered capacity")]
    pairs = [*judged, ("staged MoDE", "MoE")]
    for (budget, *_), kinds in reversed(with_experts(models).items()):
        if kinds.keys() >= {name for pair in pairs for name in pair}:
            found = {pair: difference(*(kinds[name] for name in pair)) for pair in pairs}
            here = "; ".join(f"{a} against {b} {signed(d)}" for (a, b), d in found.items())
            better, worse = ([sign * found[pair][0] > found[pair][1] for pair in judged] for sign in (-1, 1))
            verdict = "reproduced" if all(better) else "partly" if any(better) else "not"
            if not any(better) and not any(worse):
                verdict = "no difference seen"  # as for claim 1
            return here, f"{verdict}, at {short(budget)}", "`experiments.isoflop experts`"
    return "not run yet", "open", "`experiments.isoflop experts`"


def short(budget):
    return f"{budget:.0e}".replace("+", "")


def write(models, results):
    """Draw the pictures into the folder `results`; returns the tables."""
    parts = []
    if budgets_of(models):
        draw_curves(models, results / "curves.png")
        parts.append(table(models))
    if len(budgets_of(models)) > 1:
        draw_crossover(models, results / "crossover.png")
        parts.append(crossover(models))
    if budgets_with_changes(models):
        draw_changes(models, results / "changes.png")
        parts.append(ablation_table(models))
    if with_experts(models):
        parts.append(expert_table(models))
    return "\n\n".join(parts) or f"Nothing to compare in {results} yet: that takes all seeds of the best models"
