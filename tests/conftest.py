"""Set before any test module imports torch or transformers: no network, one thread, one CPU."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import gc  # noqa: E402
import subprocess  # noqa: E402

import pytest  # noqa: E402


gc.disable()  # until all is imported: hardly anything of that is garbage, and each collection looks at all of it

# Tests that start processes by their folder, and by the fixture that starts them; others carry the mark themselves.
FOLDERS = {"distributed"}
FIXTURES = {"holder", "hub", "nodes", "processes"}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name in FOLDERS or FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.subprocess)


@pytest.fixture(scope="session", autouse=True)
def no_process_in_the_inner_loop(request):
    """`make check` names the test that starts a process without the mark, instead of growing slow."""

    def refuse(self, words, *args, **kwargs):
        raise AssertionError(f"mark this test with @pytest.mark.subprocess: it starts {words}")

    with pytest.MonkeyPatch.context() as patch:
        if request.config.option.markexpr == "not subprocess":
            patch.setattr(subprocess.Popen, "__init__", refuse)
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_trainings():
    from quick import count_parameters_once, draw_no_figure, quicken_trainings

    gc.freeze()  # what is imported stays, and no collection has to look at it
    gc.enable()
    with pytest.MonkeyPatch.context() as patch:
        quicken_trainings(patch.setattr)
        count_parameters_once(patch.setattr)
        draw_no_figure(patch.setattr)  # from here on, since fixtures of modules save too
        yield


@pytest.fixture(autouse=True)
def saves_with_figure(request, monkeypatch):
    if request.node.get_closest_marker("figure") is not None:
        from quick import draw_figures

        draw_figures(monkeypatch.setattr)


@pytest.fixture(autouse=True)
def one_thread_and_own_folder(monkeypatch, tmp_path):
    """Relative output folders land in the test's own folder; a fixed thread count keeps float sums reproducible."""
    import torch

    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference_folder(tmp_path_factory):
    """A saved tiny model, other weights than the policy's: TRL loads the reference model from a folder (beta > 0)."""
    import tiny

    folder = tmp_path_factory.mktemp("reference")
    tiny.build_model(seed=99).save_pretrained(folder)
    tiny.build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def the_real_model():
    """Folder of the real language model; without it the test is skipped."""
    from entrocraft_trl.tasks.real_model import real_model_path

    try:
        return real_model_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
