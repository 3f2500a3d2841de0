"""How a process of training ends: its exit code, and the reason as the last thing said, by the launcher too.

Exit codes: 0 done, 1 failed while running, 2 bad usage or configuration, 130 Ctrl-C, 143 SIGTERM. torchrun and
accelerate launch end with 1 whatever their processes did; their report closes with the text given to `record_reason`.
"""

import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from klft.writing import escaping_output, visible_lines

T = TypeVar("T")
GRACE = 3.0  # seconds that a call which took too long has to give way, before the process is ended around it
# What collectives say (gloo, NCCL, TCPStore) when the process at the other end is gone.
_GONE = re.compile(r"connection (was )?(closed|reset|refused|aborted)|broken pipe|remote process exited", re.IGNORECASE)


class LostRank(RuntimeError):
    """Another process of the run ended while this one waited for it in a collective."""


def record_reason(reason: str, *, delay: int = 0) -> None:
    """Give the launcher the text that closes its report. Without a launcher (torchrun, accelerate) nothing is done.

    It takes the earliest reason for the cause, by whole seconds; `delay` puts one that follows from another's later.
    """
    path, reason = os.environ.get("TORCHELASTIC_ERROR_FILE"), visible_lines(reason.rstrip())
    if path:
        details = {"py_callstack": reason, "timestamp": str(int(time.time()) + delay)}
        with suppress(OSError):  # the disk may be full, and that be the reason
            Path(path).write_text(json.dumps({"message": {"message": reason, "extraInfo": details}}))


def leave(code: int) -> NoReturn:
    """End the process now: threads of collectives can hang or abort an interpreter that shuts down beside them."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error of torch's means that the process at the other end of a collective is gone."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    inside_torch = frame is not None and "torch" in Path(frame.tb_frame.f_code.co_filename).parts
    return isinstance(error, LostRank) or (inside_torch and _GONE.search(str(error)) is not None)


@contextmanager
def reasons_recorded(hint: Callable[[], str] = str) -> Iterator[None]:
    """Record exceptions from inside for the launcher; of a rank that is gone they become a LostRank with `hint()`."""
    try:
        yield
    except LostRank:
        raise
    except Exception as error:
        if not is_lost_rank(error):
            record_reason("".join(traceback.format_exception(error)))
            raise
        said = f"another process of this run is gone: its last lines say why, unless it was killed. {hint()}".strip()
        record_reason(f"LostRank: {said}", delay=2)
        raise LostRank(said) from error


@contextmanager
def exit_codes() -> Iterator[None]:
    """Around a program's main part: after it the process group is ended, else a run that succeeded may abort.

    A failure keeps its traceback, with the reason last, and exits with 1; Ctrl-C is one line, from rank 0, and 130.
    With a process group these end the process at once, see `leave`. What a console cannot show, and what it would
    obey in a traceback, is written as escapes.
    """

    def interrupt(*_: object) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a launcher hands it on once more
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with escaping_output(), reasons_recorded():
            yield
        end_process_group()
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", 0)) == 0:
            print("\nerror: interrupted (Ctrl-C)", file=sys.stderr)
        if _process_group():
            leave(130)
        raise SystemExit(130) from None
    except BaseException as error:
        code: object = error.code if isinstance(error, SystemExit) else traceback.format_exc().rstrip()
        if isinstance(code, str):
            print(visible_lines(code), file=sys.stderr)
        number = code if isinstance(code, int) else int(code is not None)
        if _process_group():
            leave(number)
        raise SystemExit(number) from None
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, before)


def _process_group() -> Any:
    """torch.distributed, if there is a process group; whoever made one has imported it."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def end_process_group() -> None:
    """Destroy torch's process group, if there is one."""
    if dist := _process_group():
        dist.destroy_process_group()


def within(seconds: float | None, what: Callable[[], str], call: Callable[[], T]) -> T:
    """The result of `call()`. Raises TimeoutError, which `what()` begins, after `seconds`; None: no limit.

    The main thread is interrupted where it waits, by the signal of Ctrl-C: handlers of Exception inside do not stop
    that. What does not give way (C code, another thread) cannot be ended by Python. Then, after GRACE seconds, the
    process is ended, with the stack, the reason last, and exit code 1.
    """
    if seconds is None:
        return call()
    lock, over, caller, reasons = threading.Lock(), threading.Event(), threading.current_thread(), []

    def watch() -> None:
        if over.wait(seconds):
            return
        with lock:
            if over.is_set():
                return
            reasons.append(f"{what()} has not returned within {seconds:g} seconds")
            if caller is threading.main_thread() and hasattr(signal, "pthread_kill"):
                signal.pthread_kill(caller.ident or 0, signal.SIGINT)
        if not over.wait(GRACE):
            stack = "".join(traceback.format_stack(sys._current_frames().get(caller.ident or 0)))
            reason = f"TimeoutError: {reasons[0]}, nor given way {GRACE:g} seconds later: the process is ended"
            record_reason(f"{stack}{reason}")
            print(visible_lines(f"Still in:\n{stack}{reason}"), file=sys.stderr)
            leave(1)

    # A shell's background jobs ignore Ctrl-C, and would ignore this interrupt with it.
    ignored = caller is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    try:
        if ignored:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=watch, name="klft-time-limit", daemon=True).start()
        try:
            result = call()
        finally:
            with lock:  # either the watch sees this, or its interrupt is on its way
                over.set()
        if not reasons:
            return result
        time.sleep(0.1)  # the interrupt may be still to come
    except BaseException as error:
        over.set()
        if not reasons:
            raise
        raise TimeoutError(reasons[0]) from error
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise TimeoutError(reasons[0])
