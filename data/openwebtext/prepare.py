"""
OpenWebText, or a folder of documents of your own, in GPT-2's tokens:

    python -m data.openwebtext.prepare                                         # downloads OpenWebText, see README.md
    python -m data.openwebtext.prepare --input my_documents --out data/my_set  # .jsonl, .parquet or .txt files

Needs Hugging Face datasets: pip install datasets

An end-of-text token follows each document. Of every --val_every documents, one drawn by --seed goes to val.bin and the
others to train.bin, in order (files are sorted by path). README.md says which files are read, and how. After a stop or
a kill, the same command continues.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it from the top of the repository: python -m data.openwebtext.prepare")

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.openwebtext import documents as reading
from support import data
from support.files import locked, sha256_of, sha256_of_json, write_json
from support.options import UserError, errors_in_one_line, expanded, reason_of, show
from support.workers import at_most, end_with_parent

OPENWEBTEXT = "Skylion007/openwebtext"
OPENWEBTEXT_REVISION = "79d93d786212f7344586290adb811d4ae6a1762c"  # without it, whatever is newest
OPENWEBTEXT_DOCUMENTS = 8_013_769  # to notice a partial download
CHUNK = 256  # documents per task of a process
SAVE_EVERY = 64  # chunks between two saves


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument(
        "--input", type=expanded, help="a folder of documents, or a file; default: download OpenWebText"
    )
    parser.add_argument("--column", default="text", help="the text's column in .jsonl and .parquet files (%(default)s)")
    parser.add_argument("--out", type=data.folder_of, help="the folder to write to (OpenWebText: this script's folder)")
    parser.add_argument(
        "--val_every", type=int, default=2000, help="one in this many documents is for validation (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=2357, help="draws the documents for validation (%(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="number of processes (%(default)s)")
    with errors_in_one_line("prepare.py", "use fewer --processes"):
        args = parser.parse_args(argv)
        if args.input and not args.out:
            raise UserError("name a folder for documents of your own, such as --out data/my_set")
        for name, least in (("val_every", 2), ("seed", 0), ("processes", 1)):
            if getattr(args, name) < least:
                raise UserError(f"--{name} must be at least {least}, got {getattr(args, name)}")
        prepare(args, args.out or Path(__file__).resolve().parent)


def prepare(args, out):
    vocab_size = data.gpt2_encoding().n_vocab  # first, so that a missing tokenizer shows before the download
    documents, source, files, note = load_documents(args.input, args.column)
    out.mkdir(parents=True, exist_ok=True)
    # The bytes depend on these. Earlier work with other values is useless.
    job = {"source": source, "documents": len(documents), "files": files, "column": args.column}
    job |= {"val_every": args.val_every, "seed": args.seed, "chunk": CHUNK}
    with locked(out, out / "lock", "prepare.py", "--out"):
        with contextlib.suppress(UserError):  # there is no data yet, or it is damaged
            if data.load(out)[0].get("job") == job:
                show(f"{out} holds exactly this data already")
                return
        parts, done = tokenize(documents, job, args, out)
        if done["train"] == 0 or done["val"] == 0:
            raise UserError(
                f"{source} has {len(documents)} documents, too few for --val_every={args.val_every}: "
                "no tokens for train or none for val; make it smaller"
            )
        meta = {"tokenizer": "gpt2", "vocab_size": vocab_size, "text_sha256": done["digest"]}
        meta |= {"source": source, "job": job, "without_text": done["without_text"]}
        meta = data.commit(out, parts, meta)
        (out / "progress.json").unlink()
    tokens = ", ".join(f"{split}.bin {n:,} tokens" for split, n in meta["tokens"].items())
    skipped = f" ({meta['without_text']:,} without text left out)" if meta["without_text"] else ""
    show(f"{source}: {len(documents):,} documents{skipped}\n{note}{out}: {tokens}, meta.json")


def load_documents(path, column):
    """The documents as a Hugging Face Dataset, mapped from the disk; source and fingerprint of their files; a note."""
    try:
        import datasets
        import pyarrow  # datasets installs it
    except ImportError:
        raise UserError("this needs Hugging Face datasets: pip install datasets") from None
    if path is None:
        try:
            documents = datasets.load_dataset(OPENWEBTEXT, revision=OPENWEBTEXT_REVISION, split="train")
        except Exception as error:  # the hub, the network and the disk all raise their own
            raise UserError(
                f"OpenWebText could not be loaded ({reason_of(error)}); start again, finished downloads are kept. "
                "Without internet, pass .jsonl, .parquet or .txt files with --input"
            ) from None
        if len(documents) != OPENWEBTEXT_DOCUMENTS:
            raise UserError(
                f"{OPENWEBTEXT} gave {len(documents):,} documents, it has {OPENWEBTEXT_DOCUMENTS:,}; delete it from "
                "Hugging Face's cache (~/.cache/huggingface) and start again"
            )
        return documents, "OpenWebText", OPENWEBTEXT, ""
    if not path.exists():
        raise UserError(f"no folder or file {path}")
    files, left_out = reading.find_files(path) if path.is_dir() else ([path], [])
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) != 1 or not kinds <= reading.ROWS.keys():
        found = ", ".join(sorted({file.suffix or file.name for file in files or left_out})[:8]) or "no file"
        raise UserError(f"--input must hold files of one kind, .jsonl, .parquet or .txt; {path} holds {found}")
    names = [str(file.relative_to(path)) for file in left_out[:8]] + ["..."] * (len(left_out) > 8)
    note = f"Files taken: {len(files):,}" + (f"; left out: {len(left_out):,} ({', '.join(names)})" if names else "")
    if left_out:
        show(note)  # also before hours of work
    stats = [(str(file.relative_to(path.parent)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    fingerprint = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    code = tuple(sha256_of(module.__file__) for module in (reading, data))  # or the cache outlives its rules
    try:
        documents = datasets.Dataset.from_generator(
            reading.documents_of,
            datasets.Features({column: datasets.Value("large_string")}),
            gen_kwargs={"files": tuple(map(str, files)), "column": column, "fingerprint": fingerprint, "code": code},
            writer_batch_size=CHUNK,
        )
    except Exception as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        reason = reason_of(error.__cause__ or error)
        raise UserError(f"{path} cannot be copied to Hugging Face's cache ({reason}); HF_HOME moves it") from None
    pyarrow.default_memory_pool().release_unused()  # reading files leaves buffers behind
    return documents, Path(os.path.abspath(path)).name, fingerprint, f"{note}\n"  # abspath: "." has no name


def tokenize(documents, job, args, out):
    """
    Write the tokens to out/train.part and out/val.part; returns these paths and the progress.

    This process only appends the chunks in order. `tokens_of_chunk` does the work in the other processes.
    """
    parts = {split: out / f"{split}.part" for split in data.SPLITS}
    done = {"job": job, "chunks": 0, "train": 0, "val": 0, "without_text": 0, "digest": ""}
    progress = out / "progress.json"
    for part in parts.values():
        if part.is_symlink():  # in a stranger's folder it may lead to any file
            part.unlink()  # what it led to does not count as progress
    # Nothing to continue: there is no progress.json, or it is damaged.
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        before = json.loads(progress.read_text(encoding="utf-8"))
        own = before.pop("sha256", None)  # of an earlier version, which had none, the work still counts
        right = own in (None, sha256_of_json(before)) and before["job"] == job
        if right and all(part.stat().st_size >= 2 * before[split] for split, part in parts.items()):
            done = before
    after = min(done["chunks"] * CHUNK, len(documents))
    if after:
        print(f"Continuing after {after:,} of {len(documents):,} documents")
    chunks = range(done["chunks"], -(-len(documents) // CHUNK))
    # Not forked: the fork of a process with threads, such as Arrow's, can hang.
    pool = ProcessPoolExecutor(at_most(args.processes), multiprocessing.get_context("spawn"), start, (documents, args))
    files = {split: open(part, "ab") for split, part in parts.items()}
    pace = {} if sys.stderr.isatty() else {"mininterval": 60, "maxinterval": 60}  # in a log file each update stays
    bar = tqdm(total=len(documents), initial=after, unit="doc", dynamic_ncols=True, **pace)
    with files["train"], files["val"], bar, pool:
        for split, file in files.items():
            file.truncate(2 * done[split])  # a kill may have left more than was counted
        save(done, files, progress)  # from here on these files belong to this job
        waiting = deque()
        for chunk in chunks:
            # A bounded queue: if the disk is slow, the tokens that wait for it must not fill the memory.
            waiting.append(pool.submit(tokens_of_chunk, chunk))
            while len(waiting) > (2 * args.processes if chunk < chunks[-1] else 0):
                tokens, without_text, digest = waiting.popleft().result()
                for split, file in files.items():
                    file.write(tokens[split].tobytes())
                    done[split] += len(tokens[split])
                done["digest"] = hashlib.sha256((done["digest"] + digest).encode()).hexdigest()
                done["without_text"] += without_text
                done["chunks"] += 1
                bar.update(min(CHUNK, len(documents) - bar.n))
                if done["chunks"] % SAVE_EVERY == 0:
                    save(done, files, progress)
        save(done, files, progress)
    return parts, done


def save(done, files, progress):
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    write_json(progress, {**done, "sha256": sha256_of_json(done)})


# In the other processes


def start(documents, args):
    global work
    end_with_parent()
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
    work = documents, args, data.gpt2_encoding()


def tokens_of_chunk(chunk):
    """A chunk's tokens for train and val, its number of documents without text, and its text's SHA-256."""
    documents, args, encoding = work
    first = chunk * CHUNK
    texts = documents[first : first + CHUNK][args.column]
    tokens = {split: [] for split in data.SPLITS}
    digest = hashlib.sha256()
    for i, text in enumerate(texts, start=first):
        if not text:
            continue
        digest.update(hashlib.sha256(text.encode("utf-8")).digest())
        split = "val" if i % args.val_every == drawn(args.seed, i // args.val_every, args.val_every) else "train"
        tokens[split] += [*encoding.encode_ordinary(text), encoding.eot_token]
    arrays = {split: np.array(ids, dtype=data.DTYPE) for split, ids in tokens.items()}
    return arrays, sum(not text for text in texts), digest.hexdigest()


@functools.cache
def drawn(seed, group, size):
    """Which of a group of `size` documents is for validation."""
    return int(np.random.default_rng([seed, group]).integers(size))


if __name__ == "__main__":
    main()
