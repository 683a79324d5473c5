"""Comparing runs in one picture and one table."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import plot
import train
from helpers import told


def test_plot_draws_the_runs_and_tables_mean_and_spread_over_seeds(tiny, tmp_path, capsys, monkeypatch):
    losses = []
    for seed in (1, 2):
        rows = train.train(dataclasses.replace(tiny, seed=seed, out_dir=str(tmp_path / f"mod-{seed}")))
        losses.append(rows[-1]["val_loss_causal"])
    train.train(dataclasses.replace(tiny, seed=2, out_dir=str(tmp_path / "mod-2"), resume=True))  # no other setting
    train.train(dataclasses.replace(tiny, route_every=0, out_dir=str(tmp_path / "dense")))
    train.train(dataclasses.replace(tiny, seed=1, out_dir=str(tmp_path / "mod-1-again")))
    capsys.readouterr()
    runs = [str(tmp_path / name) for name in ("mod-1", "mod-2", "dense", "mod-1-again")]
    train.train(dataclasses.replace(tiny, seed=2, out_dir=str(tmp_path / "again" / "mod-2")))
    train.train(dataclasses.replace(tiny, seed=3, route_every=0, aux_weight=1.0, out_dir=str(tmp_path / "dense-3")))
    groups = plot.group_by_setting(
        [plot.read_run(run) for run in [*runs, tmp_path / "again/mod-2", tmp_path / "dense-3"]]
    )
    # No group swallows another, and aux_weight does not matter in a dense model.
    assert [len(group) for _, group in groups] == [2, 2, 2]
    capsys.readouterr()
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    for x in plot.AXES:
        plot.main([*runs, "--x", x, "--out", str(tmp_path / "losses.png")])
    first = plot.read_run(runs[0])["rows"]
    for figure, (key, label) in zip(figures, plot.AXES.values(), strict=True):
        curve = figure.axes[0].get_lines()[0]
        assert list(curve.get_xdata()) == [row[key] for row in first] and figure.axes[0].get_xlabel() == label
        assert list(curve.get_ydata()) == [row["val_loss_causal"] for row in first]
    out = capsys.readouterr().out
    assert f"| {np.mean(losses):.3f} ± {np.std(losses, ddof=1):.3f} |" in out
    assert "MoD 2×16, 2 seeds: mod-1, ..." in out and f"| {runs[2]} |" in out
    assert f"| {runs[3]} |" in out  # repeating a seed is not a second measurement
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_stopped_early_does_not_count_as_a_seed(tiny, tmp_path):
    for seed in (1, 2):
        train.train(dataclasses.replace(tiny, seed=seed, out_dir=str(tmp_path / str(seed))))
    metrics = tmp_path / "2" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    groups = plot.group_by_setting([plot.read_run(tmp_path / name) for name in "12"])
    assert [run["rows"][-1]["step"] for _, (run,) in groups] == [6, 3]


def test_a_name_is_drawn_as_it_is(tiny, tmp_path, monkeypatch):
    train.train(tiny)
    names = ["cash$$", r"$\frac$", "_hidden", "\u6c34"]
    for name in names:
        shutil.copytree(tiny.out_dir, tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path / "runs")
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.main(names)
    assert [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()] == names
    assert Path("losses.png").exists()


def test_an_existing_folder_is_not_read_as_a_pattern(tiny, tmp_path, monkeypatch, capsys):
    train.train(tiny)
    for name in ("run[1]", "run1", "run*", "run2", "run?"):
        shutil.copytree(tiny.out_dir, tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path / "runs")
    for names, expected in (
        (["run[1]"], ["run[1]"]),
        (["run*"], ["run*"]),
        (["run?", "run2"], ["run?", "run2"]),
        (["run[12]"], ["run1", "run2"]),
        (["r*"], ["run*", "run1", "run2", "run?", "run[1]"]),
        ([str(tmp_path / "runs" / "run[1]")], [str(tmp_path / "runs" / "run[1]")]),
    ):
        capsys.readouterr()
        plot.main(names)
        rows = capsys.readouterr().out.splitlines()[2:]
        assert [row.split(" | ")[0].removeprefix("| ") for row in rows[: rows.index("")]] == expected


HUGE = f'{{"flops": 1{400 * "0"}, "x": "low"}}'


@pytest.mark.parametrize("metrics", ["[" * 100_000, "{}", '"text"', "", '{"val_loss_causal": "low"}', HUGE])
def test_nonsense_in_place_of_the_evaluations_is_one_line(tiny, metrics):
    train.train(tiny)
    path = Path(tiny.out_dir) / "metrics.jsonl"
    whole = path.read_text(encoding="utf-8").splitlines()[0]
    path.write_text(json.dumps(json.loads(whole) | json.loads(metrics)) if "low" in metrics else metrics)
    reason = "is not the out_dir of a run: it needs" if metrics else "has no evaluation yet"
    assert f"{tiny.out_dir} {reason}" in told(plot, [tiny.out_dir])


@pytest.mark.parametrize("damage", [{"parameters": "many"}, {"config": {"seed": 1}}, {"data": {}}])
def test_facts_that_are_missing_are_one_line(tiny, damage):
    train.train(tiny)
    path = Path(tiny.out_dir) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | damage), encoding="utf-8")
    assert f"{tiny.out_dir} is not the out_dir of a run" in told(plot, [tiny.out_dir])


def test_a_folder_that_is_not_a_run_is_left_out_with_a_line(tiny, tmp_path, capsys):
    train.train(tiny)
    (tmp_path / "out-gpt2").mkdir()
    capsys.readouterr()
    plot.main([str(tmp_path / "out-gpt2"), tiny.out_dir, "--out", str(tmp_path / "losses.png")])
    printed = capsys.readouterr()
    assert printed.err.startswith(f"Left out: {tmp_path / 'out-gpt2'} is not the out_dir of a run")
    assert printed.err.count("\n") == 1 and printed.out.count("| run") == 1
