"""Stopping on request: Ctrl-C, SIGTERM, a closed terminal."""

import contextlib
import os
import signal
import sys
import threading

from support import ranks


class Stop:
    """
    A context in which Ctrl-C, SIGTERM and SIGHUP (a closed terminal) only set `requested` to the signal's number. The
    training loop checks it where stopping is safe. After that, Ctrl-C sets `again` and stops at once (not under
    torchrun, where it may be the same request again). Other signals then do nothing more.
    """

    FIRST, AT_ONCE = b"Stopping after this step", "Stopped at once; earlier saves are intact"
    requested, again = None, False

    def __enter__(self):
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():  # other threads may not set handlers
            numbers = [signal.SIGINT, signal.SIGTERM]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
                numbers.append(signal.SIGHUP)
            self.handlers = {number: signal.signal(number, self.ask) for number in numbers}
        return self

    def ask(self, number, frame):
        if self.requested and (number != signal.SIGINT or ranks.under_torchrun()):
            return  # the same request again: a closed terminal may send SIGHUP twice, a scheduler signals each process
        if self.requested:
            self.again = True
            raise KeyboardInterrupt(self.AT_ONCE)
        self.requested = number
        if not ranks.is_main():
            return
        once_more = b"" if ranks.under_torchrun() else b". Press Ctrl-C again to stop now"
        with contextlib.suppress(OSError):  # the same Ctrl-C may have ended the program that reads our output
            # print is not safe in a signal handler. Not simply 2: after `2>&-` that may be the number of another file.
            os.write(sys.stderr.fileno(), b"\n" + self.FIRST + once_more + b"\n")

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
