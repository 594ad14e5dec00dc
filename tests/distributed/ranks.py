"""
What the ranks of one launch do: the parts named on the command line, one after the other.

    ranks.py BACKEND REFERENCE_FOLDER PART...

A part is a module with `run(backend, reference)`, which returns an accelerator and what this rank has to say.
"""

from launching import start_worker, write_result


start_worker()

import gc  # noqa: E402
import importlib  # noqa: E402
import sys  # noqa: E402

from quick import draw_no_figure, quicken_trainings  # noqa: E402


if __name__ == "__main__":
    backend, reference, *names = sys.argv[1:]
    parts = {name: importlib.import_module(name) for name in names}
    quicken_trainings()
    draw_no_figure()
    gc.freeze()
    values = {}
    for name, part in parts.items():
        accelerator, values[name] = part.run(backend, reference)
    write_result(accelerator, **values)
