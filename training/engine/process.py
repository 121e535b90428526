"""The engine process: loads the model, then runs the loop until its parent lets go of the socket.

This thread computes; others take commands off the socket, write captured states
(``state_writer.py``) and watch over this one (``watchdog.py``). Nothing here outlives the process,
so it may end at any moment.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch

from training.backends import ipc
from training.backends.flight_recorder import FlightRecorder
from training.config import EngineConfig
from training.core.errors import ConfigError
from training.engine.load import load_decoder
from training.engine.loop import EngineLoop, Inbox
from training.engine.machine import return_free_memory
from training.engine.sampler import Sampler
from training.engine.trainer import Trainer
from training.engine.watchdog import Watchdog

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_PR_SET_PDEATHSIG = 1

_log = logging.getLogger(__name__)


def main(fd: int, recorder_fd: int, parent_pid: int) -> int:
    """Exit codes: 0 told to stop, 1 broken, 2 the model cannot be loaded; the watchdog has one of
    its own."""
    faulthandler.enable()  # what breaks the process says where
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("training").setLevel(logging.INFO)
    _end_with_parent(parent_pid)
    # Ctrl-C and a service manager's SIGTERM reach every process of the group; the server decides
    # when its engine ends, by closing the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sock = socket.socket(fileno=fd)
    configure = ipc.receive(sock)
    if configure is None:
        return 0
    assert isinstance(configure, ipc.Configure)
    try:
        engine = load(configure)
    except ConfigError as error:
        ipc.send(sock, ipc.StartFailed(str(error)))
        return 2
    except Exception as error:
        _log.exception("cannot load %s", configure.model_path)
        reason = f"{type(error).__name__}: {error}"[:500]
        ipc.send(sock, ipc.StartFailed(f"cannot load {configure.base_model}: {reason}"))
        return 2
    inbox: Inbox = queue.SimpleQueue()
    recorder = FlightRecorder(recorder_fd)
    reading = (sock, inbox, recorder)
    threading.Thread(target=_read_all, args=reading, name="reader", daemon=True).start()
    ipc.send(sock, ipc.Ready(engine.trainer.capabilities()))
    loop = EngineLoop(
        engine.trainer,
        engine.sampler,
        inbox,
        _replier(sock),
        sampling_share=configure.engine.sampling_share,
        at_work=recorder.at_work,
        fatal=(torch.AcceleratorError,),  # after one, the device context answers nothing else
    )
    Watchdog(loop.current_work, configure.engine.stall_timeout_s).start()
    try:
        loop.run()
    except Exception:
        _log.exception("the engine cannot go on")
        os._exit(1)  # waiting for nobody, not even for a disk that holds up the state writer
    return 0


class Engine(NamedTuple):
    trainer: Trainer
    sampler: Sampler


def load(configure: ipc.Configure) -> Engine:
    """Raises ``ConfigError`` for a model or setting that cannot be used."""
    engine = configure.engine
    if engine.num_threads is not None:
        torch.set_num_threads(engine.num_threads)
    device, dtype = choose_device(engine), DTYPES[engine.dtype]
    model = load_decoder(configure.model_path, engine, device, dtype)
    longest = model.config.context_length
    if configure.context_length is not None and configure.context_length > longest:
        raise ConfigError(
            f"context_length {configure.context_length} of {configure.base_model} is over the "
            f"model's own {longest}"
        )
    trainer = Trainer(model, engine, configure.base_model, configure.context_length)
    tokenizer_path = configure.model_path / "tokenizer.json"
    if not tokenizer_path.is_file():
        raise ConfigError(f"{configure.model_path} has no tokenizer.json")
    sampler = Sampler(model, engine, tokenizer_path)
    return_free_memory()
    _log.info("loaded %s on %s in %s", configure.base_model, device, engine.dtype)
    return Engine(trainer, sampler)


def choose_device(engine: EngineConfig) -> torch.device:
    if engine.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device is cuda, but torch sees no CUDA device here")
    return torch.device(engine.device)


def _replier(sock: socket.socket) -> Callable[[ipc.Reply | ipc.Written], None]:
    """For any thread: a frame is sent whole before the next one begins."""
    lock = threading.Lock()

    def reply(message: ipc.Reply | ipc.Written) -> None:
        with lock:
            ipc.send(sock, message)

    return reply


def _read_all(sock: socket.socket, inbox: Inbox, recorder: FlightRecorder) -> None:
    """When the socket ends, nobody wants the work in progress: the process ends at once."""
    num_calls = 0

    def begin() -> None:
        recorder.receiving(num_calls + 1)  # they are numbered in the order they are sent

    try:
        while (message := ipc.receive(sock, begin)) is not None:
            assert isinstance(message, ipc.Call)
            num_calls = message.call_id
            inbox.put(message)
            recorder.receiving(0)
    except OSError:
        pass
    except Exception:
        _log.exception("unreadable command")
        os._exit(1)
    os._exit(0)


def _end_with_parent(parent_pid: int) -> None:
    """The kernel kills us when the server dies, also while a long computation runs."""
    if sys.platform != "linux":
        return  # the reader thread sees the socket's end
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(0)
