# SPDX-License-Identifier: Apache-2.0
"""Two real processes measure the same as one."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

from flax_vlm.build import build
from flax_vlm.evaluation import EVALUATORS
from flax_vlm.evaluation.base import Predictor
from tests.evaluation import fake_questions, fakes

WORKER = """
import json, pathlib, sys
import jax
rank, port, tensor, folder = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_default_matmul_precision", "highest")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
from tests.evaluation import fake_questions, fakes
from flax_vlm.build import build
from flax_vlm.evaluation import EVALUATORS
from flax_vlm.evaluation.base import Predictor
from flax_vlm.training.sharding import batch_sharding, data_shard, make_mesh, replicated

mesh = make_mesh(data=4 // tensor, tensor=tensor)
whole = replicated(mesh)
params = jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(whole, x, x.shape), fakes.make_params()
)
rows = batch_sharding(mesh)
predictor = Predictor(fake_questions.PREDICTIONS, params, {}, rows, data_shard(rows))
results = {}
with jax.transfer_guard("disallow"):
    for name in fake_questions.runnable():
        dataset = fake_questions.DATASETS.get(name, fakes.make_dataset)()
        evaluator = build(
            EVALUATORS, {"name": name}, "evaluator", dataset=dataset, batch_size=14
        )
        pictures = pathlib.Path(folder) if rank == 0 else None
        results[name] = evaluator.run(predictor, pictures)
pathlib.Path(folder, f"{rank}.json").write_text(json.dumps(results))
jax.distributed.shutdown()
"""


def run_workers(folder, tensor):
    script = folder / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    root = pathlib.Path(__file__).parents[2]
    arguments = [port, str(tensor), str(folder)]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    processes = [
        subprocess.Popen([sys.executable, str(script), str(rank), *arguments], env=environment)
        for rank in range(2)
    ]
    try:
        assert [p.wait(120) for p in processes] == [0, 0]
    finally:
        for p in processes:
            p.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


# tensor 4 spans both processes: both of them feed all rows
@pytest.mark.parametrize("tensor", [1, 4])
def test_two_processes_measure_the_same_as_one(tensor, tmp_path):
    first, second = run_workers(tmp_path, tensor)
    alone = Predictor(fake_questions.PREDICTIONS, jax.device_put(fakes.make_params()), {})
    expected = {
        name: build(
            EVALUATORS,
            {"name": name},
            "evaluator",
            dataset=fake_questions.DATASETS.get(name, fakes.make_dataset)(),
            batch_size=9,
        ).run(alone, None)
        for name in fake_questions.runnable()
    }
    assert first == second == expected
    pictures = {"predictions.png", "similarity.png", "answers.png"}
    assert {p.name for p in tmp_path.glob("*.png")} == pictures
