"""The runs of :mod:`distributed.trainers` under a DeepSpeed config of the recipes: one process of several.

    python deepspeed_worker.py FOLDER CONFIG PRECISION

The models are loaded from FOLDER/start.
"""

import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # noqa: E402
import torch  # noqa: E402

from distributed import trainers  # noqa: E402

deepspeed.init_distributed(dist_backend="gloo", verbose=False)

folder, path, autocast = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "autocast"
config = json.loads(path.read_text())
config["torch_autocast"]["enabled"] = autocast
torch.set_num_threads(1)
results = {}
for name in ("plain", "output"):
    results[name] = trainers.train(folder / name, name, processes=2, start=folder / "start" / name, deepspeed=config)
if torch.distributed.get_rank() == 0:
    (folder / "results.json").write_text(json.dumps(results))
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)  # threads of gloo and DeepSpeed that are still there would abort the interpreter's end
