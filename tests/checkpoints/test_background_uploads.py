"""Uploads beside a run: in order, in threads that nobody waits for, with a limit to the Hub's silence."""

import subprocess
import sys
import threading
from concurrent import futures
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from entrocraft_trl.checkpoints import background_uploads
from entrocraft_trl.checkpoints.background_uploads import UploadQueue, background_by, limit_silence


def test_jobs_run_in_order_and_keep_what_they_return_or_raise():
    uploads, seen = UploadQueue(), []
    start = threading.Event()

    def fail():
        raise ValueError("no")

    first = uploads.submit(start.wait)
    jobs = [uploads.submit(seen.append, 1), uploads.submit(fail), uploads.submit(dict, [("b", 2)], a=3)]
    cancelled = uploads.submit(seen.append, 4)
    assert cancelled.cancel() and uploads.pending() == [first, *jobs]
    start.set()
    futures.wait(jobs)
    assert first.result() and seen == [1] and jobs[2].result() == {"a": 3, "b": 2}
    with pytest.raises(ValueError, match="no"):
        jobs[1].result()
    last = uploads.submit(seen.append, 5)
    futures.wait([last])
    assert seen == [1, 5] and not uploads.pending()


def test_only_what_is_asked_for_within_goes_there():
    uploads = UploadQueue()
    with background_by(uploads.submit) as jobs:
        inside = HfApi().run_as_future(threading.current_thread)
    outside = HfApi().run_as_future(threading.current_thread)
    assert jobs == [inside]
    assert inside.result().daemon and not outside.result().daemon


LEAVING = """
import atexit, threading, time
from entrocraft_trl.checkpoints.background_uploads import UploadQueue, call_at_exit

class Trainer:
    def last(self):
        print("waited for", flush=True)

trainer = Trainer()
call_at_exit(trainer.last)
call_at_exit(Trainer().last)  # nobody holds this one
atexit.register(print, "trackers sent their metrics", flush=True)
UploadQueue().submit(threading.Event().wait)
print("done")
"""


@pytest.mark.subprocess
def test_a_process_ends_under_an_upload_and_runs_what_is_due_at_exit(tmp_path):
    # With huggingface_hub's own pool of threads it never ends.
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["done", "trackers sent their metrics", "waited for"]


@pytest.fixture
def session(monkeypatch):
    session = SimpleNamespace(timeout=SimpleNamespace(read=None), event_hooks={"request": [], "response": []})
    monkeypatch.setattr(background_uploads, "get_session", lambda: session)
    return session


def test_requests_get_a_limit_and_keep_one_that_is_set(session):
    limit_silence(7.0)
    assert session.timeout == 7.0
    session.timeout = SimpleNamespace(read=5.0)
    limit_silence(7.0)
    assert session.timeout.read == 5.0
    assert len(session.event_hooks["request"]) == 1


REFUSED = """
import time
from concurrent.futures import ThreadPoolExecutor
from huggingface_hub import get_session
from entrocraft_trl.checkpoints.background_uploads import limit_silence, patience_is_over

limit_silence(7.0)
(ours,) = [hook for hook in get_session().event_hooks["request"] if hook.__module__.startswith("entrocraft_trl")]

def wait_for_exit():
    try:
        while True:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(time.sleep, 0.01)
    except RuntimeError:
        pass

def upload():
    wait_for_exit()
    try:
        ours("a request")
    except RuntimeError:
        print("refused")
    else:
        print("passed")

ours("a request")
patience_is_over.set() if {over} else None
ours("a request")  # in a notebook the upload may go on
ThreadPoolExecutor(1).submit(upload)
"""


@pytest.mark.subprocess
@pytest.mark.parametrize(("over", "seen"), [(True, "refused"), (False, "passed")])
def test_requests_are_refused_when_python_exits_and_the_patience_is_over(over, seen):
    line = [sys.executable, "-c", REFUSED.replace("{over}", str(over))]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [seen], "")
