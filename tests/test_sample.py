"""Sampling: text, marks and pictures from a checkpoint."""

import dataclasses
import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

import cache
import sample
import train
from support import checkpoint, depth
from support import data as data_module
from support.data import CharTokenizer
from support.options import UserError


def test_sampling_needs_the_checkpoint_alone_and_repeats_by_its_seed(tiny, tmp_path, monkeypatch, capsys):
    train.train(tiny)
    monkeypatch.setattr(data_module, "DATA", tmp_path / "nothing")
    (tmp_path / "prompt.txt").write_bytes(b"a\nb")
    capsys.readouterr()
    outputs = []
    for seed in (1, 1, 2):
        argv = [f"--out_dir={tiny.out_dir}", f"--start=FILE:{tmp_path / 'prompt.txt'}", "--num_samples=2"]
        sample.main([*argv, "--max_new_tokens=30", f"--seed={seed}", "--device=cpu"])
        out, report = capsys.readouterr()
        outputs.append(out)
        assert re.fullmatch(
            r"2 x 30 tokens in [\d.]+ s, [\d,]+ tokens/s; KV cache [\d.]+ MB; "
            r"the routed blocks took [\d.]+% of the tokens\n",
            report,
        )
    texts = outputs[0].split("-" * 80 + "\n")
    assert len(texts) == 2 and all(text.startswith("a\nb") and len(text) == 3 + 30 + 1 for text in texts)
    assert outputs[0] == outputs[1] != outputs[2]


def test_sampling_is_causal_and_uses_the_best_checkpoint(tiny):
    # It diverges, so that the last checkpoint is not the best.
    train.train(dataclasses.replace(tiny, max_iters=30, learning_rate=3.0, decay_lr=False))
    model, info = checkpoint.load(Path(tiny.out_dir), "best", "cpu")
    assert info["step"] < 30
    vocab = info["data"]["vocab"]
    text = "ab"
    for _ in range(10):
        logits, _ = model(torch.tensor([[vocab.index(character) for character in text]]), routing="causal")
        text += vocab[logits[0, -1].argmax()]
    config = sample.SampleConfig(out_dir=tiny.out_dir, start="ab", max_new_tokens=10, temperature=0.0, device="cpu")
    assert sample.sample(config) == [text]
    assert sample.sample(dataclasses.replace(config, temperature=1.0, top_k=1)) == [text]
    assert sample.sample(dataclasses.replace(config, start=""))[0].startswith("\n")


def test_load_gives_a_script_the_model_and_its_tokenizer(tiny):
    train.train(tiny)
    model, tokenizer = sample.load(tiny.out_dir, device="cpu")  # a string; a Path works too
    prompt = tokenizer.encode("ab")
    tokens = cache.generate(model, torch.tensor([prompt]), 10, temperature=0)[0]
    config = sample.SampleConfig(out_dir=tiny.out_dir, start="ab", max_new_tokens=10, temperature=0.0, device="cpu")
    assert [tokenizer.decode(tokens)] == [tokenizer.decode(tokens.tolist())] == sample.sample(config)
    assert tokenizer.decode([-1, 999]) == "\N{REPLACEMENT CHARACTER}" * 2  # -1 stands for no target in mod.py
    with pytest.raises(UserError, match="no checkpoint"):
        sample.load(tiny.out_dir + "-2")


def test_without_a_run_the_model_of_the_repository_is_sampled(capsys):
    model, tokenizer = sample.load()
    assert not model.training and len(model.routed_blocks) == 2 and model.lm_head.weight.dtype == torch.float32
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n"
    x = torch.tensor([tokenizer.encode(text)])
    assert tokenizer.decode(x[0]) == text
    assert model(x[:, :-1], x[:, 1:], routing="causal")[1] < 1.9  # 4.2 if it had learned nothing
    sample.main(["--start=ROMEO:", "--max_new_tokens=20", "--device=cpu"])
    assert capsys.readouterr().out.startswith("ROMEO:")
    assert sum(path.stat().st_size for path in sample.PRETRAINED.iterdir()) < 1.7e6


def marked(out):
    """The characters and marks of what --show_depth prints without colour, each as one text."""
    lines = out.split("\n")[2:-1]
    texts, marks = lines[::2], lines[1::2]
    marks = [mark.ljust(len(text)) for text, mark in zip(texts, marks)]
    return "".join(texts).replace("\N{PILCROW SIGN}", "\n"), "".join(marks)


@pytest.mark.parametrize("start", ["ab", "a", "ab\nba" * 5])  # the last is longer than the window of 16
def test_show_depth_marks_each_character_with_the_number_of_blocks_that_took_it(tiny, start, tmp_path, capsys):
    train.train(dataclasses.replace(tiny, n_layer=4, capacity=0.5))
    (tmp_path / "prompt.txt").write_text(start, encoding="utf-8", newline="")
    config = sample.SampleConfig(
        out_dir=tiny.out_dir, start=f"FILE:{tmp_path / 'prompt.txt'}", max_new_tokens=7, device="cpu", show_depth=True
    )
    model, info = checkpoint.load(Path(tiny.out_dir), "best", "cpu")
    with torch.no_grad():
        for block in model.routed_blocks:
            block.predictor[-1].weight.mul_(100)
    checkpoint.save(Path(tiny.out_dir), 99, model, {}, True, {"data": info["data"]})
    capsys.readouterr()
    (text,) = sample.sample(config)
    printed, marks = marked(capsys.readouterr().out)
    assert printed == text and len(text) == len(start) + 7
    read = text if len(start) <= 16 else text[len(start) - 8 :]  # a longer prompt is read from its last half window
    model(torch.tensor([[info["data"]["vocab"].index(c) for c in read]]), routing="causal")
    depths = sum(block.taken[0].int() for block in model.routed_blocks).tolist()
    assert marks == " " * (len(text) - len(read)) + "".join(".12"[d] for d in depths)
    assert len(set(marks.strip())) > 1


def test_each_sample_has_its_own_marks(tiny, monkeypatch, capsys):
    train.train(dataclasses.replace(tiny, variant="stochastic", n_layer=4, capacity=0.5))
    follow, taken = sample.follow, []

    def other_decisions_for_the_second(*args):
        texts, decided, *rest = follow(*args)
        decided[:, 1] = ~decided[:, 0]
        taken.append(decided)
        return texts, decided, *rest

    monkeypatch.setattr(sample, "follow", other_decisions_for_the_second)
    capsys.readouterr()
    sample.main([f"--out_dir={tiny.out_dir}", "--device=cpu", "--max_new_tokens=9", "--num_samples=2", "--show_depth"])
    _, second = capsys.readouterr().out.split("-" * 80 + "\n")
    assert marked("\n\n" + second)[1] == "".join(".12"[d] for d in taken[0][:, 1].sum(dim=0).tolist())


def test_pictures_of_the_depth(tiny, tmp_path, monkeypatch, capsys):
    train.train(tiny)
    capsys.readouterr()
    argv = [f"--out_dir={tiny.out_dir}", "--device=cpu", "--max_new_tokens=150", "--num_samples=2"]
    parts, pcolormesh = [], Axes.pcolormesh
    monkeypatch.setattr(Axes, "pcolormesh", lambda self, part, **k: parts.append(part) or pcolormesh(self, part, **k))
    taken = []
    follow = sample.follow
    monkeypatch.setattr(sample, "follow", lambda *a: taken.append(follow(*a)) or taken[-1])
    sample.main([*argv, f"--depth_svg={tmp_path / 'text.svg'}", f"--routing_map={tmp_path / 'map.png'}"])
    text = capsys.readouterr().out.split("-" * 80)[0]
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert np.array_equal(np.concatenate(parts, axis=1), taken[0][1][:, 0].numpy()) and len(parts) == 2
    svg = ElementTree.parse(tmp_path / "text.svg")
    drawn = "".join(e.text or "" for e in svg.iter("{http://www.w3.org/2000/svg}text"))
    assert "".join(text.split()) in "".join(drawn.replace("\N{PILCROW SIGN}", "").split())
    assert "@font-face" not in (tmp_path / "text.svg").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.glob("[!.]*.*")) == ["map.png", "text.svg"]


def test_the_report_counts_the_steps_alone_and_the_most_that_the_cache_took(tiny, monkeypatch, capsys):
    train.train(dataclasses.replace(tiny, route_every=0))
    capsys.readouterr()
    now = itertools.count()
    monkeypatch.setattr(sample.time, "perf_counter", lambda: next(now) * 1.0)  # a second from one look to the next
    sample.main([f"--out_dir={tiny.out_dir}", "--device=cpu", "--max_new_tokens=40"])
    report = capsys.readouterr().err
    assert report.startswith("1 x 40 tokens in 40.00 s, 1 tokens/s; KV cache 0.00 MB")
    model, _ = checkpoint.load(Path(tiny.out_dir), "best", "cpu")
    monkeypatch.setattr(cache.LayerCache, "CHUNK", 1)  # otherwise a restarted window has as much room as a full one
    config = sample.SampleConfig(max_new_tokens=16)  # the window of 16 restarts at the last token
    _, _, _, cache_bytes, _ = sample.follow(model, [0], CharTokenizer(["x"] * 28), config, mute())
    assert cache_bytes == 2 * 2 * 16 * 16 * 4  # blocks, keys and values, the window, n_embd, float32


def mute():
    printer = depth.PlainPrinter()
    printer.add = lambda piece, depth: None
    return printer


def test_a_token_without_a_text_is_shown_as_unknown(tiny):
    train.train(dataclasses.replace(tiny, vocab_size=64, max_iters=1, learning_rate=0.0, min_lr=0.0))
    config = sample.SampleConfig(out_dir=tiny.out_dir, max_new_tokens=60, temperature=2.0, device="cpu")
    assert "\N{REPLACEMENT CHARACTER}" in sample.sample(config)[0]


def test_a_dense_model_samples_too(tiny, capsys):
    train.train(dataclasses.replace(tiny, route_every=0))
    sample.main([f"--out_dir={tiny.out_dir}", "--device=cpu", "--max_new_tokens=40", "--top_p=0.9"])
    assert capsys.readouterr().err.endswith(" MB\n")


def test_weights_in_bfloat16_give_a_text_too_and_routing_keeps_float32(tiny, monkeypatch):
    train.train(tiny)
    models, follow = [], sample.follow
    monkeypatch.setattr(sample, "follow", lambda model, *args: (models.append(model), follow(model, *args))[1])
    for dtype, stored in (("bfloat16", torch.bfloat16), ("float32", torch.float32), ("auto", torch.float32)):
        config = sample.SampleConfig(out_dir=tiny.out_dir, max_new_tokens=30, device="cpu", dtype=dtype)
        assert len(sample.sample(config)[0]) == 31
        model = models.pop()
        assert model.transformer.wte.weight.dtype == stored
        assert model.routed_blocks[0].router.weight.dtype == model.routed_blocks[0].logits.dtype == torch.float32
