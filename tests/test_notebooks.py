"""What a run leaves behind in the interpreter, and how the terminal and the schedule behave."""

import io
import os
import runpy
import signal
import sys
import threading

import pytest
import torch
from helpers.tiny import ROOT, scalars

import rloo
from plumbing import get_scheduler
from plumbing.run import caught

SIGNALS = """
import os, signal
calls = 0
def reward(completions, **_):
    global calls
    calls += 1
    if calls == {call}:
        for _ in range({times}):
            os.kill(os.getpid(), signal.{signal})
    if calls == {call} and {fails}:
        raise ValueError("late")
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def run(world, tmp_path):
    """Run rloo.py with a reward that interrupts it, as a cell of a notebook does."""

    def run(times, signal="SIGINT", fails=False, call=4):  # 1 to 3: dry run and first evaluation
        (tmp_path / "r.py").write_text(SIGNALS.format(times=times, signal=signal, fails=fails,
                                                      call=call))
        try:
            rloo.main(rloo.Args(output=f"{tmp_path}/run", **world.flags | {
                "reward": (f"{tmp_path}/r.py:reward",), "save_every": 0}))
        except BaseException as error:
            sys.last_traceback = error.__traceback__  # as an interactive interpreter keeps it
            return error, sorted(os.listdir(tmp_path / "run"))
        return None, sorted(os.listdir(tmp_path / "run"))

    return run


@pytest.fixture
def handlers():
    """Handlers of somebody else: of a notebook's kernel, say."""
    def mine(number, frame):
        raise KeyboardInterrupt

    before = {number: signal.signal(number, mine) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda: {signal.getsignal(number) for number in before} == {mine}
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("how", "error", "saved"), [
    (dict(times=0), type(None), True),
    (dict(times=0, fails=True), SystemExit, False),
    (dict(times=1), SystemExit, True),
    (dict(times=1, signal="SIGTERM"), SystemExit, True),
    (dict(times=2), KeyboardInterrupt, False),
    (dict(times=1, call=2), KeyboardInterrupt, False),  # nothing to save yet
])
def test_signal_handlers_are_what_they_were(how, error, saved, run, handlers):
    found, files = run(**how)
    assert type(found) is error and ("checkpoints" in files) == saved
    assert handlers()
    if error is SystemExit and saved:
        assert found.code == 128 + getattr(signal, how.get("signal", "SIGINT"))


def test_another_thread_may_run_it(run, handlers):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(times=0)[0]))
    thread.start()
    thread.join()
    assert found == [None] and handlers()


def test_a_handler_that_python_did_not_install(monkeypatch):
    installed = []
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *both: installed.append(both))
    with caught([]):
        pass
    assert installed[-2:] == [(signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.SIG_DFL)]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_cannot_show_a_character(encoding, world, tmp_path, monkeypatch):
    (tmp_path / "d.jsonl").write_text('{"prompt": "größer 我 a"}\n{"prompt": "größer 我 a"}\n')
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    runpy.run_path(f"{ROOT}/plumbing/errors.py")  # as when python starts
    flags = world.flags | {"dataset": f"{tmp_path}/d.jsonl", "num_updates": 1}
    rloo.main(rloo.Args(output=f"{tmp_path}/run", **flags))
    sys.stdout.flush()
    prompt = {"ascii": "gr??er ? a", "latin-1": "größer ? a"}[encoding]
    assert f"prompt   {prompt}\n" in shown.getvalue().decode(encoding)


@pytest.mark.parametrize(("name", "expected"), [
    ("constant", [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]),
    ("linear", [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]),
    ("cosine", [0, 0.25, 0.5, 0.75, 1, 0.8535533905932737, 0.5, 0.14644660940672627]),
])
def test_every_schedule_has_the_warm_up(name, expected):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    found, scheduler = [], get_scheduler(name, optimizer, 4, 8)
    for _ in range(8):
        found += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_run_logs_the_warm_up_of_a_constant_schedule(world, tmp_path):
    rloo.main(rloo.Args(output=f"{tmp_path}/run", **world.flags | {
        "lr_schedule": "constant", "warmup_updates": 2, "lr": 0.5}))
    assert scalars(tmp_path / "run")["policy/lr"] == [(1, 0.0), (2, 0.25), (3, 0.5)]
