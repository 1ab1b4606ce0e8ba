# SPDX-License-Identifier: Apache-2.0
"""LLaVA's two stages: the second goes on from the first, and leaves alone what is frozen."""

import jax
import numpy as np
import pytest

from configs import llava_shapes_stage1, llava_shapes_stage2
from flax_vlm import trees
from flax_vlm.experiment import Experiment

SMALL = {"width": 24, "depth": 1, "num_heads": 2}


def small(config, folder):
    config = config.unlock()
    config.steps, config.batch_size, config.checkpoint.every = 2, 8, 2
    config.mesh.data = 1
    config.data.dir, config.data.options.train_size = str(folder / "data"), 64
    config.model.image.update({**SMALL, "mlp_dim": 32})
    config.model.feature_layer = SMALL["depth"]
    config.model.language_model.update({**SMALL, "mlp_dim": 32, "num_kv_heads": 1})
    config.evals = {}
    return config


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    first = small(llava_shapes_stage1.get_config(), folder)
    second = small(llava_shapes_stage2.get_config(f"mlp,{folder}/1"), folder)
    devices = jax.devices()[:1]
    states = []
    for name, config in (("1", first), ("2", second)):
        (folder / name).mkdir()
        run = Experiment.from_config(config, devices)
        states.append(run.train(folder / name, show_progress=False)[0])
    return run, *states


def test_what_is_frozen_is_bit_identical_to_the_first_stage_and_all_else_is_trained(stages):
    _, first, second = stages
    before = trees.named_leaves(jax.device_get(first.params))
    for path, leaf in trees.named_leaves(jax.device_get(second.params)).items():
        assert np.array_equal(leaf, before[path]) == path.startswith("image/"), path


def test_what_is_frozen_has_no_slots(stages):
    slots = [jax.tree_util.keystr(k) for k, _ in jax.tree.leaves_with_path(stages[2].opt_state)]
    assert any("connector" in slot for slot in slots)
    assert not any("'image'" in slot for slot in slots)


def test_the_second_stage_starts_where_the_first_ended(stages):
    run, first, _ = stages
    born = trees.named_leaves(jax.device_get(run.init_state().params))
    for path, leaf in trees.named_leaves(jax.device_get(first.params)).items():
        np.testing.assert_array_equal(leaf, born[path], err_msg=path)
