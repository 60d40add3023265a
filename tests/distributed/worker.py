"""What one of several gloo processes does: every check of test_distributed.py, in one launch.

``torchrun --standalone --nproc_per_node 2 tests/distributed/worker.py FOLDER [CHECK...]`` writes FOLDER/results.json:
for each check, all by default, its measurements or the error that ended it, as process 0 saw it.
"""

import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import hf_multimax  # noqa: E402, F401


def main(folder: Path, *names: str) -> None:
    from distributed import adapters, data_parallel, fully_sharded, prepared, trainers

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    for module in (trainers, data_parallel, fully_sharded, prepared, adapters):
        for name, check in module.CHECKS.items():
            if names and name not in names:
                continue
            try:
                results[name] = {"world_size": dist.get_world_size(), **check(folder)}
            except Exception:
                results[name] = {"error": traceback.format_exc()}
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
