"""The live curve: one figure in a notebook, lines in a terminal, and never a reason for a run to end."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny

from entrocraft_trl import EntropyCurveCallback
from entrocraft_trl.reports import live
from entrocraft_trl.reports.live import status_line


def record(step, entropy=0.7, **more):
    edges = {"entrocraft/entropy_low": 0.6, "entrocraft/entropy_high": 0.8}
    return {"step": step, "entrocraft/entropy": entropy, **edges, "reward": 0.25, **more}


def state_of(*log, main=True, max_steps=9):
    return SimpleNamespace(log_history=list(log), max_steps=max_steps, is_world_process_zero=main)


class Clock:
    """Time that passes when told to."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(live, "monotonic", clock)
    return clock


@pytest.fixture
def lines(monkeypatch):
    """What goes through tqdm, which keeps the running bars whole."""
    lines = []
    monkeypatch.setattr(live.tqdm, "write", lines.append)
    return lines


def start(callback, notebook, monkeypatch):
    monkeypatch.setattr(live, "is_in_notebook", lambda: notebook)
    callback.on_train_begin(None, state_of(), None)
    return callback


@pytest.fixture
def displayed(monkeypatch):
    """PNGs shown in a pretended notebook: `("new" or "update", bytes)` in order."""
    ipython_display = pytest.importorskip("IPython.display")
    shown = []

    def display(image, display_id):
        assert display_id is True
        shown.append(("new", image.data))
        return SimpleNamespace(update=lambda image: shown.append(("update", image.data)))

    monkeypatch.setattr(ipython_display, "display", display)
    return shown


# ------------------------------------------------------------------------------------------------------------ the line


def test_status_line():
    text = status_line([record(3, 0.5, **{"entrocraft/accepted_rollouts": 0.88}), {"step": 4, "loss": 1.0}], 20)
    assert text == "step 3/20: entropy 0.500, below its band 0.600 to 0.800 nats · reward 0.25 · accepted 88%"
    assert "in its band" in status_line([record(3, 0.6)], 20) and "in its band" in status_line([record(3, 0.8)], 20)
    assert "above its band" in status_line([record(3, 0.81)], 20)


# --------------------------------------------------------------------------------------------------- when and for whom


def test_updates_come_at_most_every_few_seconds_and_at_the_end(clock, lines, monkeypatch):
    callback = start(EntropyCurveCallback(every=5), False, monkeypatch)
    log = []
    for step in range(1, 10):
        clock.now += 2
        log.append(record(step))
        callback.on_log(None, state_of(*log), None)
    # The first reading at 102 s, then the first ones that come 5 seconds or more after the one before.
    assert [line.split(":")[0] for line in lines] == ["step 1/9", "step 4/9", "step 7/9"]
    callback.on_train_end(None, state_of(*log), None)
    callback.on_train_end(None, state_of(*log, {"step": 9, "train_loss": 0.1}), None)
    assert [line.split(":")[0] for line in lines[3:]] == ["step 9/9"]


def test_slow_drawing_makes_updates_rarer(clock, monkeypatch):
    callback = start(EntropyCurveCallback(every=5), False, monkeypatch)
    drawn = []

    def draw(state):
        clock.now += 4  # seconds: a figure of a very long run
        drawn.append(clock.now)

    callback._show = draw
    for step in range(1, 1400):
        clock.now += 1
        callback.on_log(None, state_of(record(step)), None)
    # The first drawing, which imports a library, does not count; then 4 of each 4 + 100 * 4 seconds are 1%.
    assert drawn == [105.0, 114.0, 518.0, 922.0, 1326.0]


def test_only_the_main_process_shows_anything(lines, monkeypatch):
    callback = start(EntropyCurveCallback(every=0), False, monkeypatch)
    callback.on_log(None, state_of(record(1), main=False), None)
    callback.on_train_end(None, state_of(record(1), main=False), None)
    assert lines == []


def test_nothing_is_shown_before_the_first_reading(lines, clock, monkeypatch):
    callback = start(EntropyCurveCallback(every=5), False, monkeypatch)
    callback.on_log(None, state_of({"step": 1, "loss": 0.0}), None)
    callback.on_log(None, state_of(record(2)), None)  # at once: the empty update did not start the clock
    assert len(lines) == 1


@pytest.mark.parametrize("every", [-1.0, float("nan")])
def test_a_wrong_interval_is_refused(every):
    with pytest.raises(ValueError, match="every must be a number of seconds, 0 or more, got"):
        EntropyCurveCallback(every=every)


# ------------------------------------------------------------------------------------------------------ in a notebook


def test_one_figure_is_updated_in_place(displayed, lines, monkeypatch):
    callback = start(EntropyCurveCallback(every=0), True, monkeypatch)
    callback._due = 0.0
    for log in ([record(1)], [record(1), record(2, 0.4)]):
        callback._due = 0.0  # drawing has just taken its time
        callback.on_log(None, state_of(*log), None)
    assert [kind for kind, _ in displayed] == ["new", "update"] and lines == []
    assert all(png.startswith(b"\x89PNG") for _, png in displayed)
    assert displayed[0][1] != displayed[1][1]


def test_a_broken_display_turns_into_lines_with_one_warning(lines, caplog, monkeypatch):
    callback = start(EntropyCurveCallback(every=0), True, monkeypatch)
    monkeypatch.setitem(sys.modules, "IPython.display", None)  # the import raises
    for step in (1, 2, 3):
        callback.on_log(None, state_of(record(step)), None)
    callback.on_train_end(None, state_of(record(4)), None)
    assert [message for message in caplog.messages if "a line of text instead" in message] == caplog.messages
    assert len(caplog.messages) == 1
    assert lines and lines[-1].startswith("step 4/9")


def test_a_closed_terminal_ends_the_lines_and_not_the_training(clock, caplog, monkeypatch):
    def closed(line):
        raise BrokenPipeError("gone")

    monkeypatch.setattr(live.tqdm, "write", closed)
    monkeypatch.setattr(live, "is_in_notebook", lambda: False)
    args = tiny.build_config(max_steps=3, **tiny.WIDE_OPEN)
    trainer = tiny.build_trainer(args=args, callbacks=[EntropyCurveCallback(every=0)])
    trainer.train()
    assert trainer.state.global_step == 3
    assert [message for message in caplog.messages if "live entropy curve" in message] == [
        "The live entropy curve failed with BrokenPipeError: gone. Training goes on without it."
    ]


def test_lines_of_a_training_are_its_log(lines, monkeypatch):
    monkeypatch.setattr(live, "is_in_notebook", lambda: False)
    args = tiny.build_config(max_steps=3, **tiny.WIDE_OPEN)
    trainer = tiny.build_trainer(args=args, callbacks=[EntropyCurveCallback()])
    trainer.train()
    assert lines[0].startswith(f"step 1/3: entropy {tiny.history(trainer, 'entrocraft/entropy')[0]:.3f}, in its band")
    assert lines[-1] == status_line(trainer.state.log_history, 3)


@pytest.mark.subprocess
def test_in_a_real_kernel_one_output_holds_the_last_figure():
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    code = """
from types import SimpleNamespace
from entrocraft_trl.reports.live import EntropyCurveCallback
callback, log = EntropyCurveCallback(every=0), []
state = SimpleNamespace(log_history=log, max_steps=3, is_world_process_zero=True)
callback.on_train_begin(None, state, None)
for step in (1, 2, 3):
    edges = {"entrocraft/entropy_low": 0.6, "entrocraft/entropy_high": 0.8}
    log.append({"step": step, "entrocraft/entropy": 0.5 + 0.1 * step, **edges})
    callback._due = 0.0
    callback.on_log(None, state, None)
callback.on_train_end(None, state, None)
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [output for output in notebook.cells[0].outputs if output.output_type == "display_data"]
    (figure,) = outputs
    assert figure.data["image/png"].startswith("iVBOR")  # PNG in base64


@pytest.mark.subprocess
def test_without_a_display_or_a_usable_backend():
    """Neither is asked for: figures are made without pyplot, which would look for a window system."""
    code = (
        "import sys; from types import SimpleNamespace; from entrocraft_trl.reports import plots; "
        "plots.plot_run([{'step': 1, 'entropy': 1.0}]).savefig(sys.argv[1]); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {"PATH": "/usr/bin:/bin", "MPLBACKEND": "qtagg", "DISPLAY": ":99"}
    done = subprocess.run(
        [sys.executable, "-c", code, "figure.png"], env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
