"""Data sets in GPT-2's tokens: the tokens, the split, kills, two processes at once, large corpora."""

import codecs
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import tiktoken
from hypothesis import strategies as st

import sample
import train
from data.shakespeare_char import prepare
from helpers import ROOT, told
from support import data as data_module
from support.options import UserError
from train import TrainConfig

openwebtext = importlib.import_module("data.openwebtext.prepare")
shakespeare = importlib.import_module("data.shakespeare.prepare")


@pytest.fixture
def tiny_encoding(monkeypatch):
    """An encoding that needs no file: all bytes and some pairs."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {pair: 256 + i for i, pair in enumerate((b"th", b"the", b" a", b"\xc3\xa9", b"\n\n"))}
    encoding = tiktoken.Encoding(
        "tiny", pat_str=r"\s?\w+|\s+|[^\s\w]+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )
    monkeypatch.setattr(data_module, "gpt2_encoding", lambda: encoding)
    return encoding


@pytest.fixture
def threads(monkeypatch):
    """Use threads, because other processes would not have the tiny encoding."""
    pytest.importorskip("datasets")

    def pool(processes, context, initializer, initargs):
        return ThreadPoolExecutor(processes, initializer=initializer, initargs=initargs)

    monkeypatch.setattr(openwebtext, "ProcessPoolExecutor", pool)


@pytest.fixture(scope="session")
def real_encoding():
    try:
        return data_module.gpt2_encoding()
    except UserError as error:
        pytest.skip(str(error))


def write_documents(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def reference(texts, encoding, val_every, seed):
    """The expected tokens, by a plain loop over the documents."""
    splits = {"train": [], "val": []}
    for i, text in enumerate(texts):
        group, place = divmod(i, val_every)
        chosen = place == np.random.default_rng([seed, group]).integers(val_every)
        if text:
            splits["val" if chosen else "train"] += [*encoding.encode_ordinary(text), encoding.eot_token]
    return splits


def words(n, seed=0):
    """n documents made of words from this project's texts."""
    known = " ".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("*.py")))
    known = known.split(" ")
    rng = np.random.default_rng(seed)
    starts, lengths = rng.integers(len(known) - 800, size=n), rng.integers(1, 800, size=n)
    return [" ".join(known[start : start + length]) for start, length in zip(starts, lengths)]


def prepared(folder):
    meta, data = data_module.load(folder)
    return {split: tokens.tolist() for split, tokens in data.items()}, meta


TEXTS = ["the cat", "", "<|endoftext|> is text here", "caf\u00e9\n\nthe end", "\U0001f600", *"abcdefgh"]


def test_documents_become_the_tokens_that_a_plain_loop_gives(tmp_path, tiny_encoding, threads, capsys):
    texts = TEXTS * 60  # several chunks
    write_documents(tmp_path / "in" / "a.jsonl", texts[:100])
    write_documents(tmp_path / "in" / "b.jsonl", texts[100:])
    argv = ["--input", str(tmp_path / "in"), "--val_every=7", "--seed=3"]
    for processes in (1, 3):
        out = tmp_path / f"out{processes}"
        openwebtext.main([*argv, "--out", str(out), f"--processes={processes}"])
        tokens, meta = prepared(out)
        assert tokens == reference(texts, tiny_encoding, 7, 3)
        assert (meta["job"]["documents"], meta["without_text"], meta["tokenizer"]) == (len(texts), 60, "gpt2")
        text = tiny_encoding.decode_bytes([token for token in tokens["val"] if token != tiny_encoding.eot_token])
        assert math.isclose(meta["val_bytes_per_token"], len(text) / len(tokens["val"]))
        assert sorted(path.name for path in out.iterdir()) == ["lock", "meta.json", "train.bin", "val.bin"]
    assert "780 documents (60 without text left out)" in capsys.readouterr().out


def test_folders_of_text_files_and_parquet_are_read_too(tmp_path, tiny_encoding, threads):
    pd = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    texts = ["one\n\ntwo\r\nthree", "four", "f\u00fcnf"] * 4
    for i, text in enumerate(texts):
        path = tmp_path / "texts" / f"{i % 2}" / f"{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8"))
    (tmp_path / "tables").mkdir()
    # Files are sorted by path, and line ends become \n.
    in_order = [texts[i].replace("\r\n", "\n") for i in [*range(0, 12, 2), *range(1, 12, 2)]]
    pd.write_table(pyarrow.table({"body": in_order}), tmp_path / "tables" / "a.parquet")
    for name, more in (("texts", []), ("tables", ["--column=body"])):
        out = ["--out", str(tmp_path / f"{name}_out"), "--val_every=3", "--seed=0", "--processes=1"]
        openwebtext.main(["--input", str(tmp_path / name), *out, *more])
        assert prepared(tmp_path / f"{name}_out")[0] == reference(in_order, tiny_encoding, 3, 0), name


@pytest.mark.parametrize("at", range(6))
def test_stopped_at_any_chunk_it_ends_with_the_same_bytes(tmp_path, tiny_encoding, threads, monkeypatch, at, capsys):
    monkeypatch.setattr(openwebtext, "CHUNK", 10)
    monkeypatch.setattr(openwebtext, "SAVE_EVERY", 2)
    write_documents(tmp_path / "in.jsonl", TEXTS * 5)
    argv = ["--input", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out"), "--val_every=4", "--processes=2"]
    work = openwebtext.tokens_of_chunk

    def stopped(chunk):
        if chunk == at:
            raise UserError("stopped")
        return work(chunk)

    with monkeypatch.context() as patch:
        patch.setattr(openwebtext, "tokens_of_chunk", stopped)
        assert "stopped" in told(openwebtext, argv)
    assert not (tmp_path / "out" / "meta.json").exists()
    openwebtext.main(argv)
    assert prepared(tmp_path / "out")[0] == reference(TEXTS * 5, tiny_encoding, 4, 2357)
    assert ("Continuing after" in capsys.readouterr().out) == (at >= 2)


def test_other_options_start_over(tmp_path, tiny_encoding, threads, monkeypatch):
    monkeypatch.setattr(openwebtext, "CHUNK", 10)
    monkeypatch.setattr(openwebtext, "SAVE_EVERY", 1)
    write_documents(tmp_path / "in.jsonl", TEXTS * 5)
    argv = ["--input", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out"), "--processes=1"]
    with monkeypatch.context() as patch:
        patch.setattr(data_module, "commit", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            openwebtext.main([*argv, "--val_every=4"])
    assert (tmp_path / "out" / "progress.json").exists()
    openwebtext.main([*argv, "--val_every=5"])
    assert prepared(tmp_path / "out")[0] == reference(TEXTS * 5, tiny_encoding, 5, 2357)


@pytest.mark.parametrize("meanwhile", ["another job", "shorter part", "{", "null", "flipped bit", "other text"])
def test_leftovers_of_another_job_or_an_edit_are_not_continued(
    tmp_path, tiny_encoding, threads, monkeypatch, meanwhile
):
    monkeypatch.setattr(openwebtext, "CHUNK", 10)
    monkeypatch.setattr(openwebtext, "SAVE_EVERY", 2)
    texts, out = TEXTS * 5, tmp_path / "out"
    write_documents(tmp_path / "in.jsonl", texts)
    argv = ["--input", str(tmp_path / "in.jsonl"), "--out", str(out), "--processes=1", "--val_every=4"]
    work = openwebtext.tokens_of_chunk

    def until(last):
        def stopped(chunk):
            if chunk == last:
                raise UserError("stopped")
            return work(chunk)

        return stopped

    monkeypatch.setattr(openwebtext, "tokens_of_chunk", until(4))
    told(openwebtext, argv)
    if meanwhile == "another job":  # it wrote more than this one and was stopped before its first save
        monkeypatch.setattr(openwebtext, "SAVE_EVERY", 1000)
        monkeypatch.setattr(openwebtext, "tokens_of_chunk", until(6))
        told(openwebtext, [*argv, "--val_every=5"])
    elif meanwhile == "shorter part":
        os.truncate(out / "train.part", 10)
    elif meanwhile in ("{", "null"):
        (out / "progress.json").write_text(meanwhile)
    elif meanwhile == "flipped bit":
        whole = (out / "progress.json").read_text()
        (out / "progress.json").write_text(whole.replace('"chunks": 4', '"chunks": 0'))
        assert (out / "progress.json").read_text() != whole
    else:
        texts = texts[::-1]
        write_documents(tmp_path / "in.jsonl", texts)
    monkeypatch.setattr(openwebtext, "tokens_of_chunk", work)
    openwebtext.main(argv)
    assert prepared(out)[0] == reference(texts, tiny_encoding, 4, 2357)


def test_a_finished_data_set_is_not_made_again(tmp_path, tiny_encoding, threads, monkeypatch, capsys):
    write_documents(tmp_path / "in.jsonl", TEXTS * 5)
    argv = ["--input", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out"), "--processes=1", "--val_every=4"]
    openwebtext.main(argv)
    monkeypatch.setattr(openwebtext, "tokens_of_chunk", None)
    openwebtext.main(argv)
    assert "out holds exactly this data already" in capsys.readouterr().out


def test_a_mistake_with_documents_is_one_line_and_makes_no_folder(tmp_path, tiny_encoding, threads, monkeypatch):
    write_documents(tmp_path / "in" / "a.jsonl", TEXTS)
    (tmp_path / "mixed").mkdir()
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / "mixed" / name).write_text("x")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    write_documents(tmp_path / "numbers.jsonl", [1, 2])
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    for name in ("a.gz", *(f"a{i}" for i in range(200))):
        (tmp_path / "other" / name).touch()
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        ("--input in", "name a folder for documents of your own, such as --out data/my_set"),
        ("--input in --out=", "the data set's folder is an empty name"),
        ("--input none --out new", "no folder or file none"),
        ("--input mixed --out new", "must hold files of one kind, .jsonl, .parquet or .txt; mixed holds .jsonl, .txt"),
        ("--input empty --out new", "empty holds no file"),
        ("--input other --out new", "other holds .gz, a0, a1, a10, a100, a101, a102, a103"),
        ("--input broken.jsonl --out new", "prepare.py: broken.jsonl, line 2 is not JSON (Expecting value)"),
        ("--input numbers.jsonl --out new", "numbers.jsonl, line 1: expected an object with a text 'text', got"),
        ("--input in --out new --column=body", "a.jsonl has no column 'body', but text; name it with"),
        ("--input in --out new --val_every=1", "--val_every must be at least 2, got 1"),
        ("--input in --out new --processes=0", "--processes must be at least 1, got 0"),
    ):
        line = told(openwebtext, arguments.split())
        assert message in line and len(line) < 300, arguments
        assert not (tmp_path / "new").exists()
    assert "in has 13 documents, too few for --val_every=" in told(
        openwebtext, "--input in --out new --val_every=1000000000 --processes=1".split()
    )
    with openwebtext.locked(tmp_path, tmp_path / "new" / "lock", "prepare.py", "--out"):
        assert told(openwebtext, "--input in --out new".split()).endswith("wait for it, or name another --out")
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda name, **options: asked.append((name, options)) or range(5))
    assert "gave 5 documents, it has 8,013,769; delete it" in told(openwebtext, [])
    assert asked[0][0] == "Skylion007/openwebtext" and re.fullmatch("[0-9a-f]{40}", asked[0][1]["revision"])


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_tokens_that_were_moved_and_linked_do_not_count_as_progress(tmp_path, tiny_encoding, threads, monkeypatch):
    write_documents(tmp_path / "in" / "a.jsonl", words(50))
    arguments = ["--input", str(tmp_path / "in"), "--val_every=10", "--processes=1", "--out"]
    openwebtext.main([*arguments, str(tmp_path / "whole")])
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # interrupted with all tokens written
        patch.setattr(data_module, "commit", lambda *a: 1 / 0)
        openwebtext.main([*arguments, str(out)])
    moved = (out / "train.part").rename(tmp_path / "moved")
    (out / "train.part").symlink_to(moved)
    openwebtext.main([*arguments, str(out)])
    assert prepared(out)[1] == prepared(tmp_path / "whole")[1] and moved.is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_no_write_follows_a_link_in_the_folder_of_a_data_set(tmp_path, tiny_encoding, threads):
    """A stranger's folder may hold a link under each name that prepare.py writes, also the temporary ones."""
    write_documents(tmp_path / "in" / "a.jsonl", words(50))
    arguments = ["--input", str(tmp_path / "in"), "--val_every=10", "--processes=1", "--out"]
    openwebtext.main([*arguments, str(tmp_path / "whole")])
    treasure, out = tmp_path / "treasure", tmp_path / "out"
    treasure.write_text("precious")
    out.mkdir()
    names = ["train.part", "val.part", "train.bin", "val.bin", "meta.json", "meta.json.part", "meta.json.part.tmp"]
    for name in [*names, "progress.json", "progress.json.tmp"]:
        (out / name).symlink_to(treasure)
    openwebtext.main([*arguments, str(out)])
    assert treasure.read_text() == "precious"
    assert prepared(out)[1] == prepared(tmp_path / "whole")[1]
    (out / "lock").unlink()
    (out / "lock").symlink_to(treasure)
    assert "lock is a link, a lock must be a file of its own" in told(openwebtext, [*arguments, str(out)])
    assert treasure.read_text() == "precious"


NO = "not a document"
FOLDERS = {  # the files, and the names of what is left out
    "brackets": ({"c.txt": "c", "notes [2020].txt": "d", "notes [2021].txt": "e"}, []),
    "a pattern and what it matches": ({"a*.txt": "a", "a?.txt": "b", "ab.txt": "c", "ac.txt": "d"}, []),
    "signs of an address": ({"a::b.txt": "a", "c#d%20.txt": "b", "http:.txt": "c", "{x,y}.txt": "d"}, []),
    "case of the suffix": ({"a.TXT": "a", "b.txt": "b", "c.Txt": "c"}, []),
    "folders": ({"[b]/a.txt": "a", "b.txt/c.txt": "b", "b.txt/d/e.txt": "c", "c.txt": "d"}, []),
    "hidden": (
        {".a.txt": NO, "._b.txt": NO, "__MACOSX/c.txt": NO, "b.txt": "b", "c.txt": "c"},
        ["._b.txt", ".a.txt", "__MACOSX"],
    ),
    "a notebook's copies": (
        {".ipynb_checkpoints/a-1.txt": NO, "a.txt": "a", "d/.b/c.txt": NO, "d/e.txt": "e"},
        [".ipynb_checkpoints", str(Path("d", ".b"))],
    ),
    "other kinds": (
        {"LICENSE": NO, "README.md": NO, "a.txt": "a", "a.txt.gz": NO, "b.txt": "b"},
        ["LICENSE", "README.md", "a.txt.gz"],
    ),
    "many other kinds": ({f"{i}.md": NO for i in range(10, 30)} | {"a.txt": "a", "b.txt": "b"}, 20 * ["..."]),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_each_file_is_taken_once_or_named_as_left_out(tmp_path, tiny_encoding, threads, kind, capsys):
    files, left_out = FOLDERS[kind]
    folder = tmp_path / ("set" if os.name == "nt" else "set [x]*")
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.write_text(text)
        except OSError:
            pytest.skip("this system has no such names")
    argv = ["--out", str(tmp_path / "out"), "--val_every=2", "--seed=1", "--processes=1"]
    openwebtext.main(["--input", str(folder), *argv])
    texts = [text for text in files.values() if text != NO]
    assert prepared(tmp_path / "out")[0] == reference(texts, tiny_encoding, 2, 1)
    line = f"Files taken: {len(texts)}"
    if len(left_out) == 20:
        line += "; left out: 20 (10.md, 11.md, 12.md, 13.md, 14.md, 15.md, 16.md, 17.md, ...)"
    elif left_out:
        line += f"; left out: {len(left_out)} ({', '.join(left_out)})"
    assert capsys.readouterr().out.count(f"{line}\n") == (2 if left_out else 1)  # before the work and after it


@pytest.mark.skipif(os.name == "nt", reason="making links needs a right there")
def test_links_to_files_are_followed_and_others_named(tmp_path, tiny_encoding, threads, capsys):
    folder = tmp_path / "in"
    for name in ("a.txt", "elsewhere/b.txt", "elsewhere/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    folder.mkdir()
    for name, target in (("a.txt", "a.txt"), ("b.txt", "elsewhere/b.txt"), ("far", "elsewhere"), ("gone.txt", "none")):
        (folder / name).symlink_to(tmp_path / target)
    argv = ["--out", str(tmp_path / "out"), "--val_every=2", "--seed=1", "--processes=1"]
    openwebtext.main(["--input", str(folder), *argv])
    assert prepared(tmp_path / "out")[0] == reference(["a.txt", "elsewhere/b.txt"], tiny_encoding, 2, 1)
    assert "Files taken: 2; left out: 2 (far, gone.txt)" in capsys.readouterr().out


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(**columns):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({name: pyarrow.array(*values) for name, values in columns.items()}), sink)
    return sink.getvalue().to_pybytes()


A, B, BOM = {"text": "a"}, {"text": "b"}, codecs.BOM_UTF8
READ = {  # files, and the texts in them
    "id is a number here and a text there": ([lines(A | {"id": 1}, B | {"id": 2}), lines(A | {"id": "x"})], "aba"),
    "url in one file only": ([lines(A, B), lines(A | {"url": "x"}, B)], "abab"),
    "date is null first": ([lines(A | {"date": None}, B | {"date": None}), lines(A | {"date": "2020-01-01"})], "aba"),
    "a column changes within a file": ([lines(A | {"meta": [1]}, B | {"meta": {"k": 1}}, A | {"meta": "x"})], "aba"),
    "texts like dates": ([lines({"text": "2020-01-01"}, {"text": "2021-01-01"})], ["2020-01-01", "2021-01-01"]),
    "text is null in the first file": ([lines({"text": None}, {"text": None}), lines(A, B)], [None, None, "a", "b"]),
    "some rows lack it": ([lines({"id": 1}, A, B, A, B, {"id": 2})], [None, *"abab", None]),
    "an empty file": ([b"", lines(A, B)], "ab"),
    "blank lines and a byte order mark": ([BOM + b"\n" + lines(A) + b"\n \n" + lines(B), BOM + lines(A)], "aba"),
    "joined files with byte order marks": ([BOM + lines(A) + BOM + lines(B)], "ab"),
    "line ends of Windows": ([(lines(A, B)).replace(b"\n", b"\r\n")], "ab"),
    "text that JSON escapes": ([lines({"text": "\ufeffa\r\nb\0\U0001f600"}, B)], ["\ufeffa\r\nb\0\U0001f600", "b"]),
    "each row has names of its own": ([lines(*({f"k{i}": i} | (A, B)[i % 2] for i in range(99)))], ("ab" * 50)[:99]),
    "no line end at the end": ([lines(A, B).rstrip()], "ab"),
    "an array": ([json.dumps([A, B, A]).encode()], "aba"),
    "an array on several lines": ([BOM + b"\n" + json.dumps([A, B], indent=2).encode(), lines(A)], "aba"),
}
REFUSED = {  # files, and the line
    "an object": ([lines(A, {"text": {"body": "x"}})], "0.jsonl, line 2: expected an object with a text 'text', got"),
    "a list": ([lines({"text": ["a", "b"]})], "0.jsonl, line 1: expected an object with a text 'text', got {'text'"),
    "mixed types": ([lines(A), lines(A, B, {"text": 5})], "1.jsonl, line 3: expected an object with a text 'text'"),
    "texts only": ([lines("a", "b")], "0.jsonl, line 1: expected an object with a text 'text', got 'a'"),
    "a long list": ([lines({"text": ["word " * 99] * 999})], "0.jsonl, line 1: expected an object"),
    "Latin-1": ([lines(A) + b'{"text": "caf\xe9"}\n'], "0.jsonl, line 2 is not UTF-8 (byte 13: invalid continuation"),
    "UTF-16": (["\ufeff".encode("utf-16-le") + lines(A).decode().encode("utf-16-le")], "0.jsonl, line 1 is in UTF-16"),
    "UTF-16 without a mark": ([lines(A).decode().encode("utf-16-le")], "0.jsonl, line 1 holds a NUL character"),
    "bad JSON": ([lines(A, B) + b"\n{'text': 1}\n"], "0.jsonl, line 4 is not JSON (Expecting property name enclosed"),
    "cut off": ([lines(A, B)[:-4]], "0.jsonl, line 2 is not JSON (Unterminated string starting at)"),
    "a cut array": ([b'[\n{"text": "a"},\n{"text"'], "0.jsonl, line 3 is not JSON (Expecting ':' delimiter)"),
    "nested too deeply": ([b'{"text": "a", "b": ' + b"[" * 200_000], "0.jsonl, line 1 is not JSON ("),
    "half a surrogate pair": ([lines(A, {"text": "\ud83d"})], "0.jsonl, line 2: the text holds half of a surrogate"),
    "no column": ([lines({"body": "a", "id": 1})], "0.jsonl has no column 'text', but body, id; name it with --column"),
    "one file without the column": ([lines(A, B), lines({"content": "a"})], "1.jsonl has no column 'text', but"),
    "no text": ([lines({"text": None}), lines({"text": ""})], "no document in in has text"),
    "nothing": ([b""], "has text"),
}


@pytest.mark.parametrize("kind", READ)
def test_only_the_text_column_is_read(tmp_path, tiny_encoding, threads, kind):
    files, texts = READ[kind]
    check_documents(tmp_path, tiny_encoding, files, ".jsonl", texts)


def check_documents(tmp_path, encoding, files, suffix, texts):
    (tmp_path / "in").mkdir()
    for i, raw in enumerate(files):
        (tmp_path / "in" / f"{i}{suffix}").write_bytes(raw)
    argv = ["--out", str(tmp_path / "out"), "--val_every=2", "--seed=1", "--processes=1"]
    openwebtext.main(["--input", str(tmp_path / "in"), *argv])
    tokens, meta = prepared(tmp_path / "out")
    assert tokens == reference(texts, encoding, 2, 1)
    assert (meta["job"]["documents"], meta["without_text"]) == (len(texts), sum(not text for text in texts))


@pytest.mark.parametrize("kind", REFUSED)
def test_a_bad_row_is_refused_by_its_file_and_line(tmp_path, tiny_encoding, kind, monkeypatch):
    pytest.importorskip("datasets")
    files, message = REFUSED[kind]
    (tmp_path / "in").mkdir()
    for i, raw in enumerate(files):
        (tmp_path / "in" / f"{i}.jsonl").write_bytes(raw)
    monkeypatch.chdir(tmp_path)
    line = told(openwebtext, ["--input", "in", "--out", "out"])
    assert message in line and len(line) < 300
    assert not (tmp_path / "out").exists()


def test_only_the_text_column_of_a_table_is_read(tmp_path, tiny_encoding, threads):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    files = [
        table(text=(["a", None], pyarrow.string()), id=([1, 2],)),
        table(id=(["x"],), text=(["b"], pyarrow.large_string())),
        table(text=(["b"],), when=([2**62], pyarrow.timestamp("us"))),  # a year that Python does not have
        table(text=(["c", "c"], pyarrow.dictionary(pyarrow.int8(), pyarrow.string()))),
        table(text=([None], pyarrow.null()), id=([[1]],)),
        table(text=(["d", ""], pyarrow.string_view())),
    ]
    check_documents(tmp_path, tiny_encoding, files[:4], ".parquet", ["a", None, "b", "b", "c", "c"])
    (tmp_path / "more").mkdir()
    check_documents(tmp_path / "more", tiny_encoding, files[4:] + files[:1], ".parquet", [None, "d", "", "a", None])


def test_a_bad_table_is_refused_by_its_file_and_row(tmp_path, tiny_encoding, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    for i, (raw, message) in enumerate(
        (
            (table(text=([b"a", b"b"],)), "row 1: expected an object with a text 'text', got {'text': b'a'}"),
            (table(text=([{"a": 1}],)), "row 1: expected an object with a text 'text', got {'text': {'a': 1}}"),
            (table(body=(["a"],), id=([1],)), " has no column 'text', but body, id; name it with --column"),
            (table(text=(["a"],))[:-9], " cannot be read ("),
            (b"", " cannot be read ("),
        )
    ):
        (tmp_path / f"{i}.parquet").write_bytes(raw)
        assert f"{i}.parquet" in told(openwebtext, ["--input", f"{i}.parquet", "--out", "out"])
        assert message in told(openwebtext, ["--input", f"{i}.parquet", "--out", "out"])


def test_text_files_follow_the_one_rule(tmp_path, tiny_encoding, threads, monkeypatch):
    text = "caf\u00e9\n\nto be\n"
    files = [raw.encode() for raw in (text, text.replace("\n", "\r\n"), text.replace("\n", "\r"))]
    check_documents(tmp_path, tiny_encoding, [*files, BOM + files[1]], ".txt", [text] * 4)
    monkeypatch.chdir(tmp_path)
    for raw, message in (
        (b"S\xfcd", "is not UTF-8 (byte 1: invalid start byte); convert it first"),
        ("to be".encode("utf-16"), "is in UTF-16; convert it to UTF-8 first"),
        (b"to\0be", "holds a NUL character (character 2)"),
    ):
        (tmp_path / "in" / "2.txt").write_bytes(raw)
        assert f"{Path('in', '2.txt')} {message}" in told(openwebtext, ["--input", "in", "--out", "new"])


def test_a_source_has_a_name_wherever_the_command_runs(tmp_path, tiny_encoding, threads, monkeypatch):
    write_documents(tmp_path / "corpus" / "deeper" / "a.jsonl", TEXTS)
    for folder, given in (("corpus", "."), ("corpus/deeper", ".."), (".", "corpus")):
        monkeypatch.chdir(tmp_path / folder)
        openwebtext.main(["--input", given, "--out", str(tmp_path / "out"), "--val_every=4", "--processes=1"])
        assert prepared(tmp_path / "out")[1]["source"] == "corpus"


def test_without_the_tokenizer_it_says_how_to_bring_it(tmp_path, monkeypatch):
    def offline(name):
        raise OSError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    for script in (openwebtext, shakespeare):
        line = told(script, ["--out", str(tmp_path / "new")])
        assert "(OSError: no route to host); fetch" in line and "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4" in line
    assert not (tmp_path / "new").exists()
    line = told(train, ["--dataset=openwebtext", "--max_iters=1", f"--out_dir={tmp_path / 'out'}"])
    assert "is not prepared; this takes hours and a large disk: python" in line


def test_shakespeare_in_these_tokens_has_the_split_of_characters(tmp_path, tiny_encoding):
    text = "the caf\u00e9, " * 50
    (tmp_path / "text").write_text(text, encoding="utf-8")
    shakespeare.main(["--input", str(tmp_path / "text"), "--out", str(tmp_path / "gpt2")])
    prepare.main(["--input", str(tmp_path / "text"), "--out", str(tmp_path / "char")])
    tokens, meta = prepared(tmp_path / "gpt2")
    chars, char_meta = prepared(tmp_path / "char")
    for split in ("train", "val"):
        assert tiny_encoding.decode(tokens[split]) == "".join(char_meta["vocab"][token] for token in chars[split])
    assert meta["text_sha256"] == char_meta["text_sha256"] and meta["vocab_size"] == tiny_encoding.n_vocab
    assert math.isclose(meta["val_bytes_per_token"], len(text[-50:].encode()) / len(tokens["val"]))
    assert "val_bytes_per_token" not in char_meta


@hypothesis.settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(st.text())
def test_a_text_comes_back_token_by_token(tiny_encoding, text):
    tokenizer = data_module.GPT2Tokenizer()
    decode = tokenizer.decoder()
    pieces = [decode(token) for token in tokenizer.encoding.encode_ordinary(text)]
    assert "".join(pieces) == text
    assert all(
        not piece.startswith("\N{REPLACEMENT CHARACTER}") or "\N{REPLACEMENT CHARACTER}" in text for piece in pieces
    )
    decode = tokenizer.decoder()  # half a character before another one, a padding token, no target
    assert "".join(map(decode, (0xC3, 97, 5000, -1))) == "\N{REPLACEMENT CHARACTER}a" + 2 * "\N{REPLACEMENT CHARACTER}"


def test_a_model_of_these_tokens_trains_and_samples(tmp_path, tiny_encoding, capsys):
    (tmp_path / "text").write_text("the caf\u00e9, " * 200, encoding="utf-8")
    shakespeare.main(["--input", str(tmp_path / "text"), "--out", str(tmp_path / "set")])
    config = TrainConfig(
        out_dir=str(tmp_path / "run"), dataset=str(tmp_path / "set"), device="cpu", vocab_size=300, block_size=16,
        batch_size=8, n_layer=2, n_head=2, n_embd=32, max_iters=200, eval_interval=200, learning_rate=1e-2,
    )  # fmt: skip
    row = train.train(config)[-1]
    tokens, meta = prepared(tmp_path / "set")
    nats_per_byte = row["val_loss_causal"] * len(tokens["val"]) / len(tiny_encoding.decode_bytes(tokens["val"]))
    assert math.isclose(row["bits_per_byte"], nats_per_byte / math.log(2))
    assert f"({row['bits_per_byte']:.4f} bits per byte)" in capsys.readouterr().out
    argv = [f"--out_dir={config.out_dir}", "--device=cpu", "--start=the caf\u00e9", "--temperature=0"]
    sample.main([*argv, "--max_new_tokens=27"])
    assert capsys.readouterr().out.startswith("the caf\u00e9, the caf\u00e9, the caf\u00e9")
    sample.main([*argv[:2], "--max_new_tokens=5", "--show_depth", "--num_samples=2"])


# With GPT-2's own tokenizer, in real processes


def test_gpt2s_encoding_is_tiktokens(real_encoding):
    assert real_encoding.n_vocab == 50257 and real_encoding.encode_ordinary("Hello world") == [15496, 995]


def test_real_processes_give_the_tokens_of_a_plain_loop_and_the_documents_back(tmp_path, real_encoding):
    """On this project's texts, or with CORPUS=FOLDER on .jsonl files."""
    datasets = pytest.importorskip("datasets")
    folder = os.environ.get("CORPUS")
    texts = words(2000)
    if folder:
        files = sorted(map(str, Path(folder).glob("*.jsonl")))
        texts = datasets.load_dataset("json", data_files=files, split="train")["text"]
    else:
        folder = tmp_path / "in"
        write_documents(folder / "a.jsonl", texts)
    command = [sys.executable, "-m", openwebtext.__name__, "--input", str(folder), "--out", str(tmp_path / "out")]
    subprocess.run([*command, "--val_every=50", "--processes=2"], cwd=ROOT, check=True, capture_output=True)
    tokens, meta = prepared(tmp_path / "out")
    assert tokens == reference(texts, real_encoding, 50, 2357)
    in_val = [i % 50 == np.random.default_rng([2357, i // 50]).integers(50) for i in range(len(texts))]
    for split in ("train", "val"):
        ends = np.flatnonzero(np.array(tokens[split]) == real_encoding.eot_token)
        parts = np.split(np.array(tokens[split]), ends + 1)[:-1]
        assert [real_encoding.decode(part[:-1].tolist()) for part in parts] == [
            text for text, val in zip(texts, in_val) if text and val == (split == "val")
        ]


def test_processes_that_tokenize_do_not_import_pytorch():
    code = f"import sys, {openwebtext.__name__}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


KILLED = """
import os, signal, sys
import data.openwebtext.prepare as prepare
save = prepare.save
def killed(done, *args):
    save(done, *args)
    if done["chunks"]:
        os.kill(os.getpid(), signal.SIGKILL)
prepare.save = killed
prepare.main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")
def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path, real_encoding):
    pytest.importorskip("datasets")
    texts = [text[:60] for text in words(20_000)]
    write_documents(tmp_path / "in.jsonl", texts)
    out = tmp_path / "out"
    argv = ["--input", str(tmp_path / "in.jsonl"), "--out", str(out), "--processes=2"]
    command = [sys.executable, "-c", KILLED, *argv]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300)  # until its processes have ended too
    assert killed.returncode == -signal.SIGKILL and not (out / "meta.json").exists()
    command = [sys.executable, "-m", openwebtext.__name__, *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Continuing after" in done.stdout
    assert prepared(out)[0] == reference(texts, real_encoding, 2000, 2357)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_process_is_reported_and_not_waited_for(tmp_path, real_encoding):
    pytest.importorskip("datasets")
    write_documents(tmp_path / "in.jsonl", [text[:60] for text in words(50_000)])
    out = tmp_path / "out"
    command = [sys.executable, "-m", openwebtext.__name__, "--input", str(tmp_path / "in.jsonl"), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--processes=2"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (out / "train.part").exists() or not (out / "train.part").stat().st_size:
        assert process.poll() is None
        time.sleep(0.02)
    for pid in children.read_text().split():
        if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(int(pid), signal.SIGKILL)
            break
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and error.splitlines()[-1].startswith("prepare.py: out of memory (A process in the")


def peak_memory(command):
    """The peak of anonymous memory (no mapped files) of a command and its processes together, in bytes."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    peak = 0
    while process.poll() is None:
        total = 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.getpgid(int(folder.name)) == process.pid:
                    rollup = (folder / "smaps_rollup").read_text()
                    total += int(rollup.split("Anonymous:")[1].split()[0]) * 1024
            except (OSError, IndexError):
                pass  # the process has just ended
        peak = max(peak, total)
        time.sleep(0.05)
    assert process.returncode == 0
    return peak


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path, real_encoding):
    pytest.importorskip("datasets")
    peaks = []
    for times in (1, 10):
        texts = words(7000 * times)  # about 17 MB each
        write_documents(tmp_path / f"{times}.jsonl", texts)
        command = [sys.executable, "-m", openwebtext.__name__, "--input", str(tmp_path / f"{times}.jsonl")]
        peaks.append(peak_memory([*command, "--out", str(tmp_path / f"out{times}"), "--processes=2"]))
        print(f"{times} x: {(tmp_path / f'{times}.jsonl').stat().st_size / 1e6:.0f} MB, peak {peaks[-1] / 1e6:.0f} MB")
    assert peaks[1] < 1.2 * peaks[0]
