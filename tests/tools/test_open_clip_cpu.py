# SPDX-License-Identifier: Apache-2.0
"""benchmarks/open_clip_cpu.py, as far as it goes without torch."""

import importlib.util
import subprocess
import sys

import pytest

from flax_vlm import trees
from flax_vlm.program import Program
from tests.integration.conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "open_clip_cpu.py"
# of open_clip 3.3.0's models, counted by the script
OPEN_CLIP = {"clip_b32": 151_277_313, "siglip_b16": 203_155_970}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("open_clip_cpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", list(OPEN_CLIP))
def test_our_model_has_as_many_parameters_as_the_one_it_is_compared_with(script, name):
    program = Program.from_config(script.our_config(script.MODELS[name][1], batch=8))
    assert trees.num_parameters(program.shapes.params) == OPEN_CLIP[name]
    assert program.batch_size == 8 and program.config["micro_batches"] == 1


STAND_IN = f"""
import importlib.util, runpy, sys
sys.path.insert(0, sys.argv[1])
assert runpy.run_path({str(SCRIPT)!r})["provide_torchvision"]() == "stand-in"
import torchvision.transforms.functional
from torchvision.transforms import InterpolationMode, Normalize
from torchvision.ops.misc import FrozenBatchNorm2d
class Mine(FrozenBatchNorm2d, Normalize): pass
assert {{InterpolationMode.BICUBIC: 1, InterpolationMode.BILINEAR: 2}}["BICUBIC"] == 1
assert importlib.util.find_spec("torchvision.datasets")
assert importlib.util.find_spec("torchvisions") is None
"""


def test_where_torchvision_cannot_be_imported_a_stand_in_takes_its_place(tmp_path):
    (tmp_path / "torchvision").mkdir()
    # what PyPI's build says beside another torch
    text = "import torchvision.ops\nraise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision" / "__init__.py").write_text(text)
    (tmp_path / "torchvision" / "ops.py").write_text("")
    command = [sys.executable, "-c", STAND_IN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
