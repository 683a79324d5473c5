"""
What the runs of isoflop.py say: tables in Markdown, pictures, and verdicts on the paper's claims. It trains nothing.

Read from top to bottom: a model and its losses, which models are compared, tables, pictures, claims.
"""

import hashlib
import math
import statistics
from dataclasses import asdict, dataclass, replace

import numpy as np
from matplotlib import rc_context, ticker
from matplotlib.figure import Figure  # not pyplot, which would change a notebook's settings
from scipy import stats

from experiments.runner import FACTOR, FRESH, SEEDS, choice_loss, too_risky
from plot import markdown, spread
from support.files import write_whole

LOOKS = {
    "dense": dict(color="#1f4e79", marker="o", linestyle="-"),
    "MoD": dict(color="#d1495b", marker="s", linestyle="--"),
}
LONG = 1e14  # training FLOPs of the set long
MARGIN = 0.5  # percent of the loss: the most that still counts as "as good"
SAVING = 0.75  # of the FLOPs per forward pass: the most that counts as cheaper
DENSE_BASELINE = "dense, without these blocks"


@dataclass
class Model:
    """The runs of one model at its best learning rate."""

    run: object  # the run of seed 1
    choice: float  # the loss on the half for choosing: of seed 1, or the mean of two or of all SEEDS
    rows: list  # lines to report: without seed 1, which chose the rate; with fewer than three seeds, all
    first: list  # the lines of SEEDS
    fresh: list  # the lines of the FRESH seeds; empty until all are done
    halves: tuple = ("report",)  # halves of the held-out text to report on; "choose" is the half for choosing

    @property
    def kind(self):
        return "MoD" if self.run.route_every else "dense"

    @property
    def name(self):
        return f"{self.run.n_layer}×{self.run.n_embd}"

    @property
    def seeds(self):
        return ", ".join(str(row["run"]["seed"]) for row in self.rows)

    @property
    def complete(self):
        return len(self.rows) >= len(SEEDS) - 1

    def __getitem__(self, name):
        return self.rows[0][name]

    def losses(self, routing="causal"):
        return [statistics.mean(row[half][f"val_loss_{routing}"] for half in self.halves) for row in self.rows]

    def mean(self):
        return statistics.mean(self.losses())


def models_of(done):
    """Each model at its chosen learning rate, without models of which a seed diverged."""
    found, models = {}, []  # found: {model: {learning rate: {seed: line}}}
    for run, row in done.items():
        rates = found.setdefault(replace(run, learning_rate=0, seed=SEEDS[0]), {})
        rates.setdefault(run.learning_rate, {})[run.seed] = row
    for run, rates in found.items():
        # The chosen rate has the most seeds. Until they are there, choose as `search` does.
        most = max(map(len, rates.values()))
        losses = {rate: choice_loss(rows.values()) for rate, rows in rates.items() if len(rows) == most}
        rate = min(losses, key=losses.get)
        near = [losses.get(other, math.nan) for other in (rate / FACTOR, rate, rate * FACTOR)]  # nan: not run yet
        if most > 1 and too_risky(*near):
            rate /= FACTOR
        rows = rates[rate]
        first, fresh = ([rows[seed] for seed in group if seed in rows] for group in (SEEDS, FRESH))
        if first and all(row["report"] for row in rows.values()):
            choice = choice_loss(first if len(first) in (2, len(SEEDS)) else first[:1])
            fresh = fresh if len(fresh) == len(FRESH) else []
            rows = first[1:] if len(first) > 2 else first
            models.append(Model(replace(run, learning_rate=rate), choice, rows, first, fresh))
    return models


def final(roles):
    """{role: model or None} by the fresh seeds, on both halves of the held-out text, if each model has them."""
    if not all(model.fresh for model in roles.values() if model):
        return roles
    return {role: m and replace(m, rows=m.fresh, halves=("choose", "report")) for role, m in roles.items()}


def paired(a, b):
    """Two models with the lines to compare: if one lacks seeds, those of the seeds that both have."""
    if a.complete and b.complete:
        return a, b
    found = [{row["run"]["seed"]: row for row in model.first} for model in (a, b)]
    shared = found[0].keys() & found[1].keys()
    return [replace(m, rows=[rows[seed] for seed in sorted(shared)] or m.rows) for m, rows in zip((a, b), found)]


def difference(a, b):
    """How far a's mean loss lies above b's, in percent, and half of the 95% interval (infinity without all seeds)."""
    mean, other = (model.mean() for model in paired(a, b))
    percent = 100 * (mean / other - 1)
    if not (a.complete and b.complete):
        return percent, math.inf
    error = math.hypot(*(stats.sem(model.losses()) for model in (a, b)))
    return percent, t_95(min(len(a.rows), len(b.rows))) * 100 * error / other


def t_95(seeds):
    """Half of a 95% interval in standard errors: Student's t with one degree of freedom less than seeds."""
    return stats.t.ppf(0.975, seeds - 1)


def compared(a, b):
    """The `difference` as text, with the one on each half of the held-out text: "-0.13% ± 0.53 (+0.26, -0.53)"."""
    halves = [[replace(model, halves=(half,)) for model in (a, b)] for half in ("choose", "report")]
    text = ", ".join(signed_percent(difference(*pair)[0]).removesuffix("%") for pair in halves)
    return f"{signed(difference(a, b), f'seeds: {paired(a, b)[0].seeds}')} ({text})"


def signed(difference, no_interval="too few seeds"):
    percent, half = difference
    return signed_percent(percent) + (f" ± {half:.2f}" if half < math.inf else f" ({no_interval})")


def signed_percent(value):
    return f"{value:+.2f}%".replace("-0.00", "+0.00")


def short(budget):
    return f"{budget:.0e}".replace("+", "")


# Which models are compared


def plain(models, budget, kind):
    """The models of the isoFLOP comparison, smallest first."""
    chosen = [model for model in models if model.run.plain and (model.run.budget, model.kind) == (budget, kind)]
    return sorted(chosen, key=lambda model: model["parameters"])


def best_of(models):
    """The best model on the data for choosing, if possible among those with all seeds: a single one may be lucky."""
    return min([model for model in models if model.complete] or models, key=lambda model: model.choice, default=None)


def find(run, models):
    """The model with the options of this run, at any learning rate, or None."""
    return next((model for model in models if replace(model.run, learning_rate=run.learning_rate) == run), None)


def baseline_of(model, models):
    """The dense model that is this MoD model, or this variant of it, without its routed blocks; or None."""
    return find(replace(model.run, n_layer=model.run.n_layer // 2, route_every=0, variant=""), models)


def candidates(models, budget):
    """{role: model} of the models that claims 1 to 4 compare at a budget; None where there is no such model."""
    dense, mod = (best_of(plain(models, budget, kind)) for kind in LOOKS)
    if not dense or not mod:  # all models of a kind diverged
        return {}

    def best_within(key, low, high):
        return best_of([m for m in plain(models, budget, "MoD") if low < m[key] / dense[key] <= high])

    cheaper, as_large = best_within("forward_flops_per_token", 0, SAVING), best_within("parameters", 0.8, 1.25)
    return {"dense": dense, "MoD": mod, "baseline": baseline_of(mod, models), "cheaper": cheaper, "as large": as_large}


def comparisons(models):
    """{budget: candidates and "distance", the `difference` of MoD from dense} where sizes and seeds are complete."""
    found = {}
    for budget in sorted({model.run.budget for model in models}):
        kinds = [plain(models, budget, kind) for kind in LOOKS]
        if all(len(kind) > 1 and best_of(kind).complete for kind in kinds):
            roles = final(candidates(models, budget))
            found[budget] = {**roles, "distance": difference(roles["MoD"], roles["dense"])}
    return found


def distances(models):
    """{budget: the `difference` of the best MoD from the best dense GPT}, also of the set long once both are known."""
    found = {budget: roles["distance"] for budget, roles in comparisons(models).items()}
    sizes = {kind: plain(models, LONG, kind) for kind in ("MoD", "dense")}
    if all(len(some) > 1 and best_of(some).fresh for some in sizes.values()):
        found[LONG] = difference(*final({kind: best_of(some) for kind, some in sizes.items()}).values())
    return found


def changes(models, budget):
    """The best plain MoD model of a budget, and [(name, model, what to compare it with)] with one thing changed."""
    base, others = best_of(plain(models, budget, "MoD")), []
    for model in models:
        changed = {key: value for key, value in asdict(model.run).items() if value != getattr(base.run, key)}
        changed.pop("learning_rate", None)
        name = change_name(*changed.popitem()) if len(changed) == 1 else None
        if name and model.run.block_size == base.run.block_size:
            others.append((name, model, base))
        elif name and (baseline := baseline_of(model, models)):  # another context has another scale of losses
            others.append((f"{name}, against its baseline", model, baseline))
    return base, sorted(others, key=lambda other: other[0])


def change_name(option, value):
    """The name of a change, or None for an option of the size."""
    if option == "route_every":
        return {0: "no block routed", 1: "every block routed"}.get(value, f"one block in {value} routed")
    if option == "variant":
        return f"{value} routing" if value in ("stochastic", "position") else value.replace("_", " ")
    if option == "causal_method":
        return "decided by the router, no predictor"
    return {"capacity": f"capacity {value}", "block_size": f"context {value}"}.get(option)


def ablated(models):
    """The largest budget at which something else than the size was changed, or None."""
    found = [b for b in comparisons(models) if any(model.kind == "MoD" for _, model, _ in changes(models, b)[1])]
    return max(found, default=None)


def with_experts(models):
    """{name: model} of the models with experts and those of their shape without, at the largest budget; all seeds."""
    mixtures = sorted([m for m in models if m.complete and m.run.experts], key=lambda m: m.run.budget)
    if not mixtures:
        return {}
    mod = mixtures[-1].run.base
    dense = replace(mod, route_every=0)
    runs = {"dense": dense, "MoD": mod, DENSE_BASELINE: replace(dense, n_layer=mod.n_layer // 2)}
    of_this_shape = [m.run for m in mixtures if replace(m.run.base, learning_rate=mod.learning_rate) == mod]
    runs |= {run.experts: run for run in of_this_shape}
    return {name: model for name, run in runs.items() if (model := find(run, models)) and model.complete}


# Tables

COLUMNS = "FLOPs | :model | parameters | FLOPs/token | steps | rate | causal | top-k"


def cells(name, model, against=None):
    """The cells of a model: size, cost, learning rate, losses, and the difference from the model `against`."""
    return {
        "FLOPs": short(model.run.budget),
        "model": f"{name}, {model.name}",
        "parameters": f"{model['parameters']:,}",
        "FLOPs/token": f"{model['forward_flops_per_token']:,.0f}",
        "steps": f"{model['steps']:,}",
        "rate": f"{model.run.learning_rate:g}",
        "seeds": model.seeds,
        "causal": spread(model.losses(), "{:.4f}"),
        "top-k": spread(model.losses("topk"), "{:.4f}") if model.run.route_every else "same",
        **dict.fromkeys(("against", "against dense", "against MoD"), compared(model, against) if against else ""),
    }


def isoflop_table(models):
    """The best models of each budget, and the baseline of the best MoD model."""
    rows = []
    for roles in comparisons(models).values():
        dense, baseline = roles["dense"], roles["baseline"]
        same = baseline and baseline.run == dense.run
        rows.append(cells("best dense (also the baseline)" if same else "best dense", dense))
        rows.append(cells("best MoD", roles["MoD"], dense))
        if baseline and not same:  # None: it diverged
            rows.append(cells("baseline of the best MoD", baseline, dense))
    return markdown(f"{COLUMNS} | against dense", rows)


def trend(found):
    """The slope of a line through {budget: difference}, in points per factor of ten, and half of its 95% interval."""
    x, (mean, half) = np.log10(list(found)), np.array(list(found.values())).T
    weight = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    return weight @ mean, math.hypot(*(weight * half))


def crossover(models):
    """How the distance between the best models changes with the budget; where it would be zero, if that is clear."""
    found = distances(models)
    if len(found) < 2:
        return ""
    slope, half = trend(found)
    if len(found) < 3 or abs(slope) <= half:
        return f"From {short(min(found))} to {short(max(found))} FLOPs it stays open whether MoD and dense cross."
    x, y = np.log10(list(found)).mean(), statistics.mean(percent for percent, _ in found.values())
    text = f"For ten times the budget the gap changes by {slope:+.2f} ± {half:.2f} percentage points (95%).\n"
    return text + f"A straight line through the gaps is at zero at {short(10 ** (x - y / slope))} FLOPs."


def ablation_table(models):
    """The best MoD model of a budget with one thing changed, each change at its best learning rate."""
    if not ablated(models):
        return ""
    base, others = changes(models, ablated(models))
    rows = []
    for name, model, against in [(f"nothing: {base.name}", base, None), *others]:
        taken = statistics.mean(statistics.mean(row["report"].get("taken", [1])) for row in model.rows)
        rows.append({**cells(name, model, against), "changed": name, "taken": f"{taken:.1%}"})
    return markdown("FLOPs | :changed | FLOPs/token | rate | causal | top-k | taken | against", rows)


def causal_table(models):
    """Three ways to decide without look-ahead in the same MoD model, by fresh seeds: loss, and agreement with top-k."""
    if not ablated(models):
        return ""
    run = changes(models, ablated(models))[0].run
    runs = {"predictor": run, "router, with an auxiliary loss": replace(run, causal_method="router")}
    runs["expert threshold"] = replace(run, variant="expert_threshold")
    ways = {name: find(run, models) for name, run in runs.items()}
    if not all(model and model.fresh for model in ways.values()):
        return ""
    ways, rows = final(ways), []
    for name, model in ways.items():
        found = [row[half] for row in model.rows for half in model.halves]
        taken = [share for one in found for share in one["taken"]]
        shares = [[one[key] for one in found] for key in ("predictor_accuracy", "predictor_recall")] + [taken]
        shares = [f"{statistics.mean(of):.1%}" for of in shares]
        shares[-1] += f" ({min(taken):.1%} to {max(taken):.1%})"
        losses = [spread(model.losses(routing), "{:.4f}") for routing in ("causal", "topk")]
        against = "" if name == "predictor" else compared(model, ways["predictor"])
        rows.append([name, f"{model['forward_flops_per_token']:,.0f}", *losses, against, *shares])
    return markdown(":decides | FLOPs/token | causal | top-k | against predictor | agreement | recall | taken", rows)


def expert_table(models):
    """Dense, MoD, MoE and MoDE of one shape at equal training FLOPs, the best first."""
    kinds = with_experts(models)
    named = sorted(kinds.items(), key=lambda pair: pair[1].mean())
    rows = [cells(name, model, kinds.get("MoD") if name != "MoD" else None) for name, model in named]
    return markdown(f"{COLUMNS} | against MoD", rows)


def long_pairs(models):
    """{budget: {"MoD": 4×64, "dense": 2×64}, by fresh seeds}: a pair that was trained longer and longer."""
    sizes = {m.run.budget: m for m in models if m.run.plain and (m.kind, m.name) == ("MoD", "4×64")}
    pairs = {budget: {"MoD": mod, "dense": baseline_of(mod, models)} for budget, mod in sorted(sizes.items())}
    return {b: final(pair) for b, pair in pairs.items() if all(m and m.fresh for m in pair.values())}


def long_table(models):
    """The models of the set long, each at its best rate so far; how far MoD lies from dense models and its controls."""
    ours = [m for budget, pair in long_pairs(models).items() if budget < LONG for m in pair.values()]
    ours += sorted((m for m in models if m.run.budget == LONG), key=lambda m: (m.kind, m["parameters"]))
    rows = []
    for model in ours:
        others = {}
        if model.kind == "MoD":
            best = best_of([m for m in ours if (m.kind, m.run.budget) == ("dense", model.run.budget)])
            baseline = others["its baseline"] = baseline_of(model, ours)
            others["MoD"] = find(replace(model.run, variant=""), ours) if model.run.variant else None
            others["the best dense"] = best if best != baseline else None
        pairs = {name: final({"model": model, "other": m}) for name, m in others.items() if m}
        against = "; ".join(f"{name} {pair['other'].name}: {compared(*pair.values())}" for name, pair in pairs.items())
        shown = replace(final({"model": model})["model"], halves=("report",))  # for all alike: the first half is harder
        rows.append(cells(model.run.variant or model.kind, shown) | {"against": against})
    return markdown("FLOPs | :model | parameters | FLOPs/token | steps | rate | seeds | causal | :against", rows)


def tables(models):
    """{name: table}, without those for which runs are missing."""
    found = {"isoflop": isoflop_table, "crossover": crossover, "changes": ablation_table, "causal": causal_table}
    found |= {"experts": expert_table, "long": long_table}
    return {name: text for name, table in found.items() if (text := table(models))}


# Pictures

style = rc_context({"axes.grid": True, "grid.alpha": 0.3, "axes.titlelocation": "left", "axes.titlesize": 10})


def save(figure, path):
    """Save a PNG that holds the hash of its runs.jsonl, so that a test finds pictures older than the runs."""
    metadata = {"Description": hash_of(path.parent / "runs.jsonl")}
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110, metadata=metadata))


def hash_of(path):
    """The hash of a text file, the same for all line endings; empty if there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else ""


def draw(models, results):
    """Draw the pictures into the folder `results`, without those for which runs are missing."""
    if comparisons(models):
        draw_curves(models, results / "curves.png")
    if len(distances(models)) > 1:
        draw_crossover(models, results / "crossover.png")


@style
def draw_curves(models, path):
    """The isoFLOP curves: loss over parameters and over FLOPs per forward pass, a row for each budget."""
    found = comparisons(models)
    figure = Figure(figsize=(11, 4.2 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 2, squeeze=False, sharey="row")
    for row, (budget, roles) in zip(panels, found.items()):
        draw_budget(row[0], models, budget, "parameters", "parameters")
        draw_budget(row[1], models, budget, "forward_flops_per_token", "FLOPs per token of a forward pass")
        means = [model.mean() for kind in LOOKS for model in plain(models, budget, kind)]
        row[0].set_ylim(min(means) - 0.02, max(means) + 0.02)
        row[0].set_ylabel("causal loss on the second half (nats per character)\nno bar: seed 1 alone")
        by = "fresh seeds" if roles["dense"].rows == roles["dense"].fresh else "seeds 2 to 4"
        distance = f"best MoD (star) {signed(roles['distance'])} against best dense"
        row[0].set_title(f"{short(budget)} training FLOPs: {distance}, by {by}")
        row[0].legend()
    save(figure, path)


def draw_budget(axes, models, budget, x, xlabel):
    """The losses of one budget's models over x, a field of runs.jsonl; a line for each depth, a star for the best."""
    for kind, look in LOOKS.items():
        chosen = plain(models, budget, kind)
        for depth in sorted({model.run.n_layer for model in chosen}):
            line = [model for model in chosen if model.run.n_layer == depth]
            means = [model.mean() for model in line]
            bars = [statistics.stdev(model.losses()) if len(model.rows) > 1 else 0 for model in line]
            label = kind if depth == chosen[0].run.n_layer else None
            thin = {**look, "markersize": 5, "linewidth": 0.8, "capsize": 3}
            axes.errorbar([model[x] for model in line], means, yerr=bars, label=label, **thin)
        text = dict(textcoords="offset points", ha="center", fontsize=7, color=look["color"])
        for model in chosen:
            axes.annotate(model.name, (model[x], model.mean()), xytext=(0, -11 if kind == "dense" else 6), **text)
        best = best_of(chosen)
        axes.plot(best[x], best.mean(), marker="*", markersize=15, color=look["color"], zorder=5)
    axes.set(xscale="log", xlabel=xlabel)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


@style
def draw_crossover(models, path):
    """Over the budget, how far the best MoD lies above the best dense GPT, and a MoD of one size above its baseline."""
    found = distances(models)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    mean, half = zip(*found.values())
    look = {**LOOKS["MoD"], "linestyle": "", "capsize": 4}  # no line between them: a few budgets are not a curve
    axes.errorbar(list(found), mean, yerr=half, **look, label="the best MoD above the best dense GPT")
    if pairs := long_pairs(models):
        mean, half = zip(*(difference(*pair.values()) for pair in pairs.values()))
        look |= {"mfc": "white", "label": "MoD 4×64 above dense 2×64, its baseline"}
        axes.errorbar([1.1 * budget for budget in pairs], mean, yerr=half, **look)
    axes.axhline(0, color=LOOKS["dense"]["color"], label="the dense GPT")
    axes.set_yscale("symlog", linthresh=1)  # a seed that hardly learned must not flatten all others
    axes.set_yticks([-10, -3, -1, -0.5, 0, 0.5, 1, 3, 10])
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="loss of MoD above dense (percent)")
    axes.set_title("How far MoD lies above a dense GPT with as many training FLOPs (95% intervals)")
    axes.legend()
    save(figure, path)


# The paper's claims: the claim, what the paper says, and the command whose runs test it

WHERE = {  # headings of results/README.md
    "isoflop full": "isoflop-curves",
    "isoflop laptop": "ablations",
    "isoflop experts": "depth-and-experts",
    "routing all": "with-and-without-the-future-what-the-router-learned",
}
CLAIMS = (
    ("1. At equal training FLOPs the best MoD is at or below the best dense GPT", "up to 1.5% below", "isoflop full"),
    ("2. The best MoD has more parameters than the best dense GPT, at no more FLOPs per pass", "more", "isoflop full"),
    ("3. A MoD with fewer FLOPs per forward pass matches the best dense GPT", "up to 50% fewer", "isoflop full"),
    ("4. A MoD of the best dense GPT's size is as good, and faster", "upwards of 60% faster", "isoflop full"),
    ("5. 12.5% in every other block is best; stochastic routing fails", "yes; drastically worse", "isoflop laptop"),
    ("6. Giving up look-ahead costs almost nothing", "97-99% predicted", "isoflop full"),
    ("7. Routing is structured and follows the entropy of the prediction", "pictures", "routing all"),
    ("8. The gains of MoD and of experts add up", "yes", "isoflop experts"),
)
NOT_RUN = "not run yet", "open"


def claims(models, learned, timed):
    """The paper's claims beside our results, and the verdicts: two tables. learned, timed: of routing.py, bench.py."""
    found = comparisons(models)
    third, fourth = (as_good_and_cheaper(found, role, timed) for role in ("cheaper", "as large"))
    last = claim_5(models), claim_6(found), claim_7(learned), claim_8(models)
    rows, verdicts = [], []
    for (claim, paper, command), (here, verdict) in zip(CLAIMS, (claim_1(found), claim_2(found), third, fourth, *last)):
        rows.append([claim, paper, here, verdict, f"`experiments.{command}`"])
        verdicts.append([claim, f"[{verdict}](results/README.md#{WHERE[command]})"])
    return markdown(":claim | :paper | :here | :verdict | :command", rows), markdown(":claim | :verdict", verdicts)


def how_many(held):
    """The verdict on a claim of several parts."""
    return "reproduced" if all(held) else "partly" if any(held) else "not reproduced"


def claim_1(found):
    """What was found here, and the verdict, as in all functions below."""
    here = "; ".join(f"{short(b)}: {compared(roles['MoD'], roles['dense'])}" for b, roles in found.items())
    percent, half = found[max(found)]["distance"]
    verdict = "not reproduced" if percent > half else "reproduced" if percent < -half else "no difference seen"
    return here, f"{verdict}, at {short(max(found))}"


def claim_2(found):
    """Larger without costing more per pass, the paper's reason: routed blocks alone make any model larger."""
    here, held = [], []
    for b, roles in found.items():
        size, cost = (roles["MoD"][x] / roles["dense"][x] for x in ("parameters", "forward_flops_per_token"))
        held.append(size > 1 and cost <= 1)
        here.append(f"{short(b)}: {size:.2f} times as many, at {cost:.2f} times the FLOPs")
    return "; ".join(here), how_many(held)


def as_good_and_cheaper(found, role, timed):
    """Claims 3 and 4: whether the MoD in this role is as good as the best dense GPT, with fewer FLOPs per pass."""
    here, verdict = [], "not testable with these sizes"
    for b, roles in found.items():
        mod, dense = roles[role], roles["dense"]
        if not mod:
            here.append(f"{short(b)}: none in the grid")
            continue
        percent, half = difference(mod, dense)
        size, cost = (mod[x] / dense[x] for x in ("parameters", "forward_flops_per_token"))
        good, bad = percent + half < MARGIN and cost <= SAVING, percent - half > MARGIN or cost > SAVING
        verdict = f"{'reproduced' if good else 'not reproduced' if bad else 'undecided'}, at {short(b)}"
        here.append(f"{short(b)}: {mod.name} against {dense.name} {compared(mod, dense)}")
    if mod:  # at the largest budget
        pair = mod.run.n_layer, mod.run.n_embd, f"{dense.run.n_layer}x{dense.run.n_embd}"
        times = [t["train_time_ratio"] for t in timed if (t["n_layer"], t["n_embd"], t.get("against")) == pair]
        time = f"{times[0]:.2f} of the time of a training step" if times else "time not measured"
        here[-1] += f", with {size:.2f} of the parameters, {cost:.2f} of the FLOPs per forward pass, {time}"
    return "; ".join(here), verdict


def claim_5(models):
    """Each change is worse; stochastic routing drastically, by more than one percent."""
    asked = ["capacity 0.0625", "capacity 0.25", "capacity 0.5", "every block routed", "stochastic routing"]
    for b in reversed(comparisons(models)):
        base, others = changes(models, b)
        found = {name: model for name, model, _ in others if model.complete}
        if found.keys() >= set(asked):
            here = "; ".join(f"{name} {compared(found[name], base)}" for name in asked)
            worse = [n for n in asked if np.subtract(*difference(found[n], base)) > (n == "stochastic routing")]
            rest = ", ".join(name for name in asked if name not in worse)
            partly = f"partly (worse: {', '.join(worse)}; not: {rest})" if worse else "not reproduced"
            return f"{here}, at the size that is best for 12.5%", f"{partly if rest else 'reproduced'}, at {short(b)}"
    return NOT_RUN


def claim_6(found):
    """The causal loss is at most 0.3% higher, and the predictor is right as often as the paper's."""
    costs, right = {}, 1
    for b, roles in found.items():
        mod = roles["MoD"]
        costs[b] = statistics.mean(100 * (causal / topk - 1) for causal, topk in zip(mod.losses(), mod.losses("topk")))
        right = min(right, *(row[half]["predictor_accuracy"] for half in mod.halves for row in mod.rows))
    loss = "; ".join(f"{short(b)}: loss {signed_percent(cost)}" for b, cost in costs.items())
    partly = f"partly: no visible cost, but at worst {right:.1%} predicted (paper: 97%)"
    verdict = "not reproduced" if max(costs.values()) > 0.3 else "reproduced" if right > 0.97 else partly
    return f"{loss}; at least {right:.1%} predicted (base rate 87.5%)", verdict


def claim_7(learned):
    """Most decisions follow the character, and every block clearly prefers uncertain tokens."""
    if not learned:
        return NOT_RUN
    learned = [row["learned"] for row in learned]
    keys = ("character", "character and the one before", "position")
    character, before, position = ([x for one in learned for x in one["known_by"][key]] for key in keys)
    ranks = [0.5 if x is None else x for one in learned for x in one["entropy_ranks_higher"]]
    uncertain, certain = sum(x > 0.6 for x in ranks), sum(x < 0.4 for x in ranks)
    here = (
        f"structured: the character explains {min(character):.0%} to {max(character):.0%} of a decision's entropy, "
        f"with the one before {min(before):.0%} to {max(before):.0%}, the position at most {max(position):.1%}; "
        f"entropy: of {len(ranks)} routed blocks {uncertain} clearly prefer uncertain tokens, {certain} certain ones"
    )
    if sum(x > 0.2 for x in character) < len(character) / 2:
        return here, "not reproduced"
    return here, "reproduced" if uncertain == len(ranks) else "partly: structured, not by entropy"


def claim_8(models):
    """Staged MoDE beats MoD and the dense GPT without the routed blocks; integrated MoDE beats MoE of its capacity."""
    # Staged MoDE against MoE is shown, not judged: its steps cost half as much. That dense GPT shows what this gains.
    judged = [("staged MoDE", "MoD"), ("staged MoDE", DENSE_BASELINE), ("integrated MoDE", "MoE, lowered capacity")]
    pairs = [*judged, ("staged MoDE", "MoE")]
    kinds = with_experts(models)
    if not all(name in kinds for pair in pairs for name in pair):
        return NOT_RUN
    found = {(a, b): difference(kinds[a], kinds[b]) for a, b in pairs}
    here = "; ".join(f"{a} against {b} {compared(kinds[a], kinds[b])}" for a, b in pairs)
    unclear = all(abs(found[pair][0]) <= found[pair][1] for pair in judged)
    verdict = "no difference seen" if unclear else how_many([sum(found[pair]) < 0 for pair in judged])
    return here, f"{verdict}, at {short(kinds['MoD'].run.budget)}"
