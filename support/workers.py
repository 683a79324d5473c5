"""Worker processes. No PyTorch here, because those that tokenize a large corpus do not need it."""

import multiprocessing
import os
import sys
import threading


def at_most(processes):
    """As many processes as asked for, but on Windows at most 61: a pool cannot wait for more there."""
    return min(processes, 61) if sys.platform == "win32" else processes


def end_with_parent():
    """In a worker process: end when its parent ends. A parent that is killed cannot tell its workers to."""
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
