"""Files that are whole or not there, their hashes, and locks."""

import contextlib
import errno
import hashlib
import json
import os

import filelock

from support.options import UserError, show

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # the errors of file systems without locks


def write_json(path, content):
    text = json.dumps(content, indent=1)  # ASCII, because UTF-8 cannot encode a file name that is not UTF-8 itself
    write_whole(path, lambda file: file.write(text.encode("ascii")))


def write_whole(path, write):
    """
    Write a file under a temporary name, then rename it: at any time `path` is the whole old file or the whole new one,
    if one process at a time writes it. Returns its SHA-256.
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


@contextlib.contextmanager
def locked(folder, path, program, option):
    """
    Keep a second process of `program` out of `folder`, which `option` names, by a lock on the file `path`. The
    operating system drops the lock when the process ends.
    """
    if path.is_symlink():  # opening the lock empties the file
        raise UserError(f"{path} is a link, a lock must be a file of its own; delete the link")
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"another {program} is at work in {folder}; wait for it, or name another {option}") from None
    except (OSError, NotImplementedError) as error:  # some versions of filelock raise the second for ENOSYS
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise
        show(f"The file system of {folder} has no locks; make sure that no second {program} uses this folder")
    try:
        yield
    finally:
        lock.release()
