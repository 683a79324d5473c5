"""What isoflop.py's runs say: tables in Markdown, and pictures. It trains nothing."""

import math
import statistics
from dataclasses import asdict, dataclass, replace

import matplotlib

matplotlib.use("Agg")  # draws to a file, needs no screen
import matplotlib.pyplot as plt

from checkpoint import write_whole

LOOKS = {"dense": dict(color="#1f4e79", marker="o", linestyle="-"), "MoD": dict(color="#d1495b", marker="s", ls="--")}


@dataclass
class Model:
    """The runs of one model at one learning rate, all seeds."""

    run: object  # isoflop.Run, of the first seed
    rows: list  # lines of runs.jsonl

    @property
    def kind(self):
        return "MoD" if self.run.route_every else "dense"

    @property
    def name(self):
        return f"{self.run.n_layer} x {self.run.n_embd}"

    def __getitem__(self, name):
        return self.rows[0][name]

    def losses(self, routing="causal", half="report"):
        return [row[half][f"val_loss_{routing}"] for row in self.rows]

    def mean(self, routing="causal", half="report"):
        return statistics.mean(self.losses(routing, half))

    def deviation(self):
        """Standard deviation over seeds; None for one."""
        return statistics.stdev(self.losses()) if len(self.rows) > 1 else None

    def loss(self, routing="causal"):
        return spread(self.losses(routing))


def spread(values, form="{:.4f}"):
    """Mean ± standard deviation."""
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def models_of(done):
    """All models that were trained to the end: for each its best learning rate, by the half for choosing."""
    by_rate = {}
    for run, row in done.items():
        if row["report"]:
            by_rate.setdefault(replace(run, seed=1), []).append(row)
    best = {}
    for run, rows in by_rate.items():
        model, key = Model(run, rows), replace(run, learning_rate=0)
        # More seeds first: they were given only to the rate that was chosen.
        if key not in best or rank(model) < rank(best[key]):
            best[key] = model
    return list(best.values())


def rank(model):
    return -len(model.rows), model.mean(half="choose")


def plain(models, budget, kind):
    """The models of the isoFLOP comparison, smallest first."""
    chosen = [
        model
        for model in models
        if model.run.budget == budget
        and model.kind == kind
        and model.run.route_every in (0, 2)
        and not model.run.variant
        and (model.run.capacity, model.run.selection, model.run.causal_method, model.run.block_size)
        == (0.125, "learned", "predictor", 128)
        and not model.run.n_expert
    ]
    return sorted(chosen, key=lambda model: model["parameters"])


def best_of(models):
    """The best model, by the half for choosing; with the most seeds."""
    return min(models, key=rank)


def difference(a, b):
    """How far the mean loss of a lies above b's, in percent of b's, and the standard error of that (None: one seed)."""
    percent = 100 * (a.mean() / b.mean() - 1)
    if len(a.rows) < 2 or len(b.rows) < 2:
        return percent, None
    error = math.hypot(*(model.deviation() / math.sqrt(len(model.rows)) for model in (a, b)))
    return percent, 100 * error / b.mean()


def signed(difference):
    percent, error = difference
    return f"{percent:+.2f} %" + (f" ± {error:.2f}" if error is not None else "")


def budgets_of(models):
    return sorted({model.run.budget for model in models})


def rival_of(model, models):
    """The dense model that is this MoD model without its routed blocks."""
    for other in plain(models, model.run.budget, "dense"):
        if (other.run.n_layer, other.run.n_embd) == (model.run.n_layer // 2, model.run.n_embd):
            return other


def table(models):
    """The best models of each budget, and the honest rival of the best MoD model."""
    lines = [
        "| FLOPs | model | layers x width | parameters | FLOPs/token | steps | rate | causal | top-k | against dense |"
    ]
    lines.append("|--:|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for budget in budgets_of(models):
        dense, mod = plain(models, budget, "dense"), plain(models, budget, "MoD")
        if not dense or not mod:
            continue
        dense, mod = best_of(dense), best_of(mod)
        rows = [("best dense", dense), ("best MoD", mod), ("the rival of this MoD", rival_of(mod, models))]
        for name, model in rows:
            cells = [
                short(budget),
                name,
                model.name,
                f"{model['parameters']:,}",
                f"{model['forward_flops_per_token']:,.0f}",
                f"{model['steps']:,}",
                f"{model.run.learning_rate:g}",
                model.loss(),
                model.loss("topk") if model.run.route_every else "same",
                "" if model is dense else signed(difference(model, dense)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ablation_table(models):
    """One thing changed in the best MoD model of a budget, at the best learning rate for each change."""
    lines = ["| training FLOPs | changed | FLOPs/token | rate | causal loss | top-k loss | taken | against unchanged |"]
    lines.append("|--:|---|--:|--:|--:|--:|--:|--:|")
    for budget in budgets_of(models):
        base, others = changes(models, budget)
        for name, model in [(f"nothing: {base.name}", base), *others] if others else []:
            taken = statistics.mean(statistics.mean(row["report"].get("taken", [1])) for row in model.rows)
            cells = [
                short(budget),
                name,
                f"{model['forward_flops_per_token']:,.0f}",
                f"{model.run.learning_rate:g}",
                model.loss(),
                model.loss("topk") if model.run.route_every else "same",
                f"{taken:.1%}",
                "" if model is base else signed(difference(model, base)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def changes(models, budget):
    """The best plain MoD model of a budget, and the models that differ from it in one thing, as pairs (name, model)."""
    chosen = plain(models, budget, "MoD")
    if not chosen:
        return None, []
    base = best_of(chosen)
    others = []
    for model in models:
        if model.run.budget != budget or model.run.n_embd != base.run.n_embd or model.run.n_expert:
            continue
        if model.run.block_size != base.run.block_size:
            kind = "context" if model.run.route_every else "dense rival, context"
            others.append((f"{kind} {model.run.block_size}", model))
        elif model.run.n_layer == base.run.n_layer and model.run.route_every:
            before, now = asdict(base.run), asdict(model.run)
            name = ", ".join(label(key, now[key]) for key in now if key != "learning_rate" and now[key] != before[key])
            if name:
                others.append((name, model))
    return base, others


def label(option, value):
    names = {"capacity": f"capacity {value:.4g}" if option == "capacity" else "", "variant": value}
    names["route_every"] = {1: "every block routed", 3: "every third block routed"}.get(value, "")
    return names.get(option) or f"{option} {value}"


# Pictures


def draw_curves(models, path):
    """The isoFLOP curves: loss over parameters and over FLOPs per forward pass, a row for each budget."""
    budgets = [b for b in budgets_of(models) if plain(models, b, "dense") and plain(models, b, "MoD")]
    axes_names = {"parameters": "parameters", "forward_flops_per_token": "FLOPs per token of a forward pass"}
    figure, panels = plt.subplots(
        len(budgets), 2, figsize=(11, 4.2 * len(budgets)), layout="constrained", squeeze=False, sharey="row"
    )
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
            axes.set_xlabel(label)
            axes.grid(alpha=0.3, which="both")
        dense, mod = (best_of(plain(models, budget, kind)) for kind in ("dense", "MoD"))
        low = min(model.mean() for kind in LOOKS for model in plain(models, budget, kind))
        row[0].set_ylim(low - 0.02, low + 0.25)
        row[0].set_ylabel("held-out loss, causal (nats per character)")
        row[0].set_title(
            f"{short(budget)} training FLOPs: best MoD (star) {signed(difference(mod, dense))} against best dense",
            fontsize=10,
            loc="left",
        )
        row[0].legend()
    save(figure, path)


def save(figure, path):
    write_whole(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=110))
    plt.close(figure)


def draw_changes(models, path):
    """What one change in the best MoD model does, a row for each budget at which it was tried."""
    budgets = [budget for budget in budgets_of(models) if changes(models, budget)[1]]
    figure, panels = plt.subplots(
        len(budgets), 1, figsize=(8, 0.8 + 4.5 * len(budgets)), layout="constrained", squeeze=False
    )
    for axes, budget in zip(panels[:, 0], budgets):
        base, others = changes(models, budget)
        others = [(name, model) for name, model in others if "context" not in name]  # another length, another loss
        others.sort(key=lambda pair: pair[1].mean(), reverse=True)
        for y, (_, model) in enumerate(others):
            axes.plot(model.losses(), [y] * len(model.rows), "o", color="#1f4e79", alpha=0.5, markersize=4)
            axes.plot(model.mean(), y, "|", color="#1f4e79", markersize=14)
        axes.axvline(base.mean(), color="#d1495b", label=f"unchanged: MoD {base.name}, 12.5 %, every other block")
        axes.axvspan(min(base.losses()), max(base.losses()), color="#d1495b", alpha=0.15)
        axes.set_yticks(range(len(others)), [name for name, _ in others])
        axes.set_xlabel("held-out loss, causal (nats per character); a dot for each seed")
        axes.set_title(f"{short(budget)} training FLOPs: one thing changed", loc="left", fontsize=10)
        axes.grid(alpha=0.3, axis="x")
        axes.legend(loc="upper right")
    save(figure, path)


# The paper's claims


def claims(models, routing):
    """The paper's claims 1 to 7 beside what was measured; routing: lines of experiments/routing.py."""
    budgets = [b for b in budgets_of(models) if plain(models, b, "dense") and plain(models, b, "MoD")]
    pairs = {b: [best_of(plain(models, b, kind)) for kind in ("dense", "MoD")] for b in budgets}
    rows = [
        (
            "1. The best MoD at equal training FLOPs is at or below the best dense GPT",
            "up to 1.5 % lower",
            *claim_1(pairs),
        ),
        ("2. The best MoD has more parameters than the best dense GPT", "more", *claim_2(pairs)),
        (
            "3. A MoD with fewer FLOPs per forward pass has the best dense loss",
            "up to 50 % fewer",
            *claim_3(models, pairs),
        ),
        (
            "4. A MoD of the best dense GPT's size is as good and faster to train",
            "60 % faster",
            *claim_4(models, pairs),
        ),
        ("5. 12.5 % in every other block is best; stochastic routing fails", "it is; it does", *claim_5(models)),
        ("6. Going without the future costs next to nothing", "97-99 % foretold", *claim_6(pairs, routing)),
        ("7. Routing is structured, and follows the entropy of the prediction", "pictures", *claim_7(routing)),
    ]
    lines = ["| claim | paper | here | verdict | by |", "|---|---|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


ISOFLOP, ROUTING = "`isoflop.py full`", "`experiments/routing.py all`"


def claim_1(pairs):
    differences = {b: difference(mod, dense) for b, (dense, mod) in pairs.items()}
    here = "; ".join(f"{short(b)}: {signed(d)}" for b, d in differences.items())
    percent, error = list(differences.values())[-1]
    verdict = (
        "not reproduced" if percent > 2 * error else "reproduced" if percent < -2 * error else "no difference seen"
    )
    return f"{here} (n = 3)", f"{verdict} at {short(list(pairs)[-1])} FLOPs", ISOFLOP


def claim_2(pairs):
    here = [f"{short(b)}: {mod['parameters']:,} against {dense['parameters']:,}" for b, (dense, mod) in pairs.items()]
    larger = [mod["parameters"] > dense["parameters"] for dense, mod in pairs.values()]
    verdict = "reproduced" if all(larger) else f"at {sum(larger)} of {len(larger)} budgets"
    return "; ".join(here), verdict, ISOFLOP


def claim_3(models, pairs):
    """The best MoD model that has fewer FLOPs per forward pass than the best dense one."""
    here, reached = [], []
    for b, (dense, _) in pairs.items():
        cheaper = [
            model
            for model in plain(models, b, "MoD")
            if model["forward_flops_per_token"] < dense["forward_flops_per_token"]
        ]
        if not cheaper:
            here.append(f"{short(b)}: none is cheaper")
            reached.append(False)
            continue
        best = best_of(cheaper)
        percent, error = difference(best, dense)
        share = best["forward_flops_per_token"] / dense["forward_flops_per_token"]
        here.append(f"{short(b)}: {best.name} at {share:.0%} of the FLOPs, {signed((percent, error))}")
        reached.append(percent <= 2 * (error or 0))
    return "; ".join(here), "reproduced" if reached[-1] else "not reproduced", ISOFLOP


def claim_4(models, pairs):
    """The MoD model whose number of parameters is nearest to the best dense one's."""
    here, reached = [], []
    for b, (dense, _) in pairs.items():
        near = min(plain(models, b, "MoD"), key=lambda m: abs(math.log(m["parameters"] / dense["parameters"])))
        percent, error = difference(near, dense)
        share = near["forward_flops_per_token"] / dense["forward_flops_per_token"]
        here.append(
            f"{short(b)}: {near.name} with {near['parameters'] / dense['parameters']:.2f} of the parameters and "
            f"{share:.2f} of the FLOPs, {signed((percent, error))}"
        )
        reached.append(percent <= 2 * (error or 0) and share < 1)
    return "; ".join(here), "reproduced" if reached[-1] else "not reproduced", ISOFLOP


def claim_5(models):
    tried = [b for b in budgets_of(models) if changes(models, b)[1]]
    if not tried:
        return "not run yet", "open", ISOFLOP
    base, others = changes(models, tried[-1])
    others = {name: difference(model, base) for name, model in others}
    asked = ["capacity 0.0625", "capacity 0.25", "capacity 0.5", "every block routed", "selection stochastic"]
    here = "; ".join(f"{name.replace('selection ', '')} {signed(others[name])}" for name in asked if name in others)
    worse = [others[name][0] > 2 * (others[name][1] or 0) for name in asked if name in others]
    verdict = "reproduced" if all(worse) else "partly" if any(worse) else "not reproduced"
    return f"{short(tried[-1])}: {here}", verdict, ISOFLOP


def claim_6(pairs, routing):
    here = []
    for b, (_, mod) in pairs.items():
        costs = [100 * (c / t - 1) for c, t in zip(mod.losses(), mod.losses("topk"))]
        here.append(f"{short(b)}: {statistics.mean(costs):+.2f} % ± {statistics.stdev(costs):.2f} (n = {len(costs)})")
    right = [row["report"]["predictor_accuracy"] for _, mod in pairs.values() for row in mod.rows]
    here.append(f"foretold {min(right):.1%} to {max(right):.1%} (base rate 87.5 %)")
    verdict = "reproduced" if abs(statistics.mean(costs)) < 0.3 and min(right) > 0.95 else "partly"
    return "; ".join(here), verdict, ISOFLOP


def claim_7(routing):
    if not routing:
        return "not run yet", "open", ROUTING
    learned = [row["learned"] for row in routing]
    character = [x for one in learned for x in one["known_by"]["character"]]
    position = [x for one in learned for x in one["known_by"]["position"]]
    ranks = [x for one in learned for x in one["entropy_ranks_higher"]]
    here = (
        f"the character alone tells {min(character):.0%} to {max(character):.0%} of a decision, the position at most "
        f"{max(position):.0%}; of two tokens the one with the higher entropy is the one taken in "
        f"{min(ranks):.0%} to {max(ranks):.0%} of the pairs, depending on the block ({len(ranks)} blocks)"
    )
    return here, "partly" if min(ranks) < 0.5 < max(ranks) else "reproduced", ROUTING


def short(budget):
    return f"{budget:.0e}".replace("+", "")


def write(models, results):
    """Draw the pictures into the folder `results`; returns the tables."""
    draw_curves(models, results / "curves.png")
    parts = [table(models)]
    if any(changes(models, budget)[1] for budget in budgets_of(models)):
        draw_changes(models, results / "changes.png")
        parts.append(ablation_table(models))
    return "\n\n".join(parts)
