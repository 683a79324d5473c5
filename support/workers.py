"""Worker processes. No PyTorch here, because those that tokenize a large corpus do not need it."""

import multiprocessing
import os
import threading


def end_with_parent():
    """In a worker process: end when its parent ends. A parent that is killed cannot tell its workers to."""
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
