"""Keeps XLA's alarm about slow compilation from users: it asks them to file bugs where nothing is wrong.

XLA has no switch for it: TF_CPP_MIN_LOG_LEVEL=3 would silence it and every other error message of C++ code with it. So
a small process of its own reads what this one writes to its standard error, drops the alarms and passes on the rest. It
is not a thread, because it must still pass on the last words of a process that C++ code aborts.

It drops one more message: that a program from the compilation cache may not run here, because the processor lacks
"prefer-no-gather" or "prefer-no-scatter". These are preferences of the compiler, which no processor has
(https://github.com/openxla/xla/issues/44565).
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

# What the process runs; it imports nothing of lipjax, to start within milliseconds. An alarm begins with a line that
# names its source file, and ends with the line that asks for a bug report and the row of stars that may follow.
_FILTER = r"""
import os, select
FIRST, LAST, MOST = b"slow_operation_alarm.cc:", b"attach the results.", 30
LOADED, PREFERENCE = b"cpu_aot_loader.cc:", b"Target machine feature +prefer-no-"
left, dropped, stars = b"", 0, False
def show(data):
    while data:
        data = data[os.write(1, data):]
def line(text):
    global dropped, stars
    if FIRST in text:
        dropped, stars = 1, False
    elif dropped:
        stars = LAST in text
        dropped = 0 if stars or dropped == MOST else dropped + 1
    elif stars and text.strip(b"*\r\n") == b"":
        stars = False
    elif LOADED in text and PREFERENCE in text:
        pass
    else:
        stars = False
        show(text)
while True:
    # A line that is not finished, such as a question, is shown after a moment.
    if left and not dropped and FIRST not in left and LOADED not in left and not select.select([0], [], [], 0.2)[0]:
        show(left)
        left = b""
    data = os.read(0, 65536)
    if not data:
        break
    *lines, left = (left + data).split(b"\n")
    for text in lines:
        line(text + b"\n")
if left:
    line(left)
"""


@contextlib.contextmanager
def no_slow_compile_alarm() -> Iterator[None]:
    """Inside, what this process and C++ code in it write to standard error passes a filter that drops the alarm."""
    with contextlib.ExitStack() as stack:
        try:
            original = os.dup(2)
            stack.callback(os.close, original)
            # In a session of its own: Ctrl-C is for the training, whose last words are still to be passed on.
            reader = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _FILTER],
                stdin=subprocess.PIPE,
                stdout=original,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError:  # no standard error, or no process: better an alarm than nothing
            yield
            return
        assert reader.stdin is not None
        os.dup2(reader.stdin.fileno(), 2)
        reader.stdin.close()
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)  # the last writer: the filter ends
            with contextlib.suppress(subprocess.TimeoutExpired):
                reader.wait(timeout=5)  # a process that was started inside and lives on may hold it open
