"""
One of two nodes that resume from the loopback Hub, each with one process. Run by test_hub_download.py.

    python hub_nodes_worker.py RESULT_FILE CASE...     in the node's own folder; a case is REPOSITORY=OUTPUT_DIR

Writes for each case what was raised, or which checkpoint is there then and what is in it.
"""

import json
import logging
import sys
from pathlib import Path

import tiny
import torch

from entrocraft_trl.checkpoints import background_uploads, hub_download
from entrocraft_trl.checkpoints.hub_download import fetch_for_all
from entrocraft_trl.checkpoints.manifest import list_checkpoints


class Messages(logging.Handler):
    def emit(self, record):
        told.append(record.getMessage())


told: list[str] = []


def fetch(args, repository: str, output_dir: str) -> dict:
    args.hub_model_id, args.output_dir = repository, output_dir
    told.clear()
    try:
        fetch_for_all(args)
    except OSError as error:
        return {"error": str(error)}
    complete = [step for step, reason in list_checkpoints(Path(output_dir)).items() if reason is None]
    weights = {step: (Path(output_dir) / f"checkpoint-{step}" / "model.safetensors").read_text() for step in complete}
    left = sorted(path.name for path in Path(output_dir).glob("*")) if Path(output_dir).is_dir() else []
    return {"weights": weights, "left": left, "told": list(told)}


def main(result_file: str, *cases: str) -> None:
    logging.getLogger("entrocraft_trl").addHandler(Messages())
    for module in (background_uploads, hub_download):
        module.SILENCE_LIMIT = 2.0
    args = tiny.build_config(ddp_backend="gloo")
    results = {case: fetch(args, *case.split("=")) for case in cases}
    Path(result_file).write_text(json.dumps(results))
    # A process that leaves while the other's threads still talk to it ends both with an abort now and then.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
