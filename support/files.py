"""Files that are whole or not there, their hashes, and locks."""

import hashlib
import json
import os

from filelock import FileLock

from support.options import UserError


def write_json(path, content):
    text = json.dumps(content, indent=1)  # ASCII, because UTF-8 cannot encode a file name that is not UTF-8 itself
    write_whole(path, lambda file: file.write(text.encode("ascii")))


def write_whole(path, write):
    """
    Write a file under a temporary name, then rename it: at any time `path` is the whole old file or the whole new one.

    Returns its SHA-256.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # in a stranger's folder it may be a link to any file
        with open(temporary, "xb") as file:  # exclusively, which follows no link
            write(file)
            file.flush()
            os.fsync(file.fileno())
        sha256 = sha256_of(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return sha256


def sha256_of(path):
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_json(content):
    """The SHA-256 of a JSON's contents, whatever their order and spacing in the file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def lock_at(path):
    """A lock that raises filelock.Timeout while another process holds it. It goes when its process ends."""
    if path.is_symlink():  # opening the lock empties the file
        raise UserError(f"{path} is a link, a lock must be a file of its own; delete the link")
    return FileLock(path, timeout=0)
