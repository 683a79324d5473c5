"""Reading a folder of documents: .jsonl, .parquet or .txt files, each read once, in the order of their paths."""

import json
import os
import reprlib
from pathlib import Path

from support import data
from support.options import UserError, reason_of


def find_files(folder):
    """
    The files of documents in a folder and those below it, and the paths left out; both sorted.

    Left out are links to folders, files of another kind, and what is hidden: a name that begins with . or __
    """
    files, left_out = [], []
    for path in folder.iterdir():
        hidden = path.name.startswith((".", "__"))
        if path.is_dir() and not path.is_symlink() and not hidden:
            for found, below in zip((files, left_out), find_files(path)):
                found += below
        else:
            (files if path.suffix.lower() in ROWS and path.is_file() and not hidden else left_out).append(path)
    return sorted(files), sorted(left_out)


def documents_of(files, column, **cached_by):
    """
    Each document as {column: its text or None}. No other column matters. A UserError names the file and the line.

    cached_by: what else Hugging Face's cache must depend on.
    """
    some_text = False
    for file in files:
        has_column, others = False, []
        try:
            for where, row in ROWS[Path(file).suffix.lower()](file, column):
                if isinstance(row, dict):
                    has_column |= column in row
                    others = others or list(row)
                    row = {column: row.get(column)}
                if not isinstance(row, dict) or not isinstance(row[column], (str, type(None))):
                    raise UserError(f"{where}: expected an object with a text {column!r}, got {reprlib.repr(row)}")
                some_text |= bool((row[column] or "").encode("utf-8"))  # fails for half of a surrogate pair
                yield row
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise UserError(f"{where}: the text holds half of a surrogate pair, {half!r}; remove it") from None
        except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's errors are of these kinds
            raise UserError(f"{file} cannot be read ({reason_of(error)})") from None
        if others and not has_column:
            raise UserError(f"{file} has no column {column!r}, but {', '.join(others[:8])}; name it with --column")
    if not some_text:
        raise UserError(f"no document in {os.path.commonpath(files)} has text")


# Each yields the rows of a file, with their places for error lines


def rows_of_jsonl(file, column):
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            text = data.text_of(line, where)
            if not text or text.isspace():
                continue
            if text.lstrip().startswith("["):  # not a file of lines, but an array
                text += data.text_of(lines.read(), file)
            try:
                rows = json.loads(text)
            except (ValueError, RecursionError) as error:
                place = f"{file}, line {number + getattr(error, 'lineno', 1) - 1}"
                raise UserError(f"{place} is not JSON ({getattr(error, 'msg', error)})") from None
            for row in rows if isinstance(rows, list) else [rows]:
                yield where, row


def rows_of_parquet(file, column):
    import pyarrow.parquet  # datasets installs it

    with pyarrow.parquet.ParquetFile(file) as table:
        names = table.schema_arrow.names
        if column not in names:
            yield file, dict.fromkeys(names)
            return
        batches = table.iter_batches(256, columns=[column])
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield f"{file}, row {number}", row


def rows_of_txt(file, column):
    yield file, {column: data.text_of(Path(file).read_bytes(), file)}


ROWS = {".jsonl": rows_of_jsonl, ".parquet": rows_of_parquet, ".txt": rows_of_txt}
