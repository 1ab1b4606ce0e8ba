# SPDX-License-Identifier: Apache-2.0
"""What the documents and launch files tell people to type: every flag, config key, file and program
exists."""

import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from flax_vlm.hub.checkpoint_config import checkpoint_config
from flax_vlm.training.profiling import Stopwatch
from tests.hub import test_generate
from tests.hub.folders import write_folder
from tests.integration.test_configs import NEEDS_THE_HUB

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(f for f in (ROOT / "launch").iterdir() if f.is_file()),
    *sorted((ROOT / "configs").rglob("*.py")),
]
PROGRAM = re.compile(
    r"(train\.py|eval\.py|-m flax_vlm\.tools\.\w+"
    r"|launch/slurm\.sh|tpu_vm\.sh train|docker run .*flax_vlm:\w+)"
)
STARTS_TRAIN = ("launch/slurm.sh", "tpu_vm.sh train", "docker run")


def commands(document):
    """Yields (module, arguments) of every command line in a document, continuation lines joined."""
    text = re.sub(r"\\\n[#\s]*", " ", document.read_text())
    for line in text.splitlines():
        found = PROGRAM.search(line)
        if not found:
            continue
        name = found.group(1)
        module = name.removeprefix("-m ").removesuffix(".py")
        module = "train" if name.startswith(STARTS_TRAIN) else module
        rest = re.split(r"[`'\"|&;]|\s#|\s{3,}", line[found.end() :])[0]
        arguments = [word.strip("[](),.") for word in shlex.split(rest.replace("...", ""))]
        if any(word.startswith("--") or word.startswith("configs/") for word in arguments):
            yield module, arguments


COMMANDS = [
    pytest.param(module, arguments, id=f"{document.name}:{' '.join([module, *arguments])[:70]}")
    for document in DOCUMENTS
    for module, arguments in commands(document)
]


@pytest.fixture(scope="module")
def flags_of():
    """Returns the flags that a program defines; each is asked once, in a process of its own."""
    known = {}

    def ask(module):
        if module not in known:
            code = f"import {module}; from absl import flags; print(*flags.FLAGS)"
            command = [sys.executable, "-c", code]
            source = pathlib.Path(importlib.util.find_spec(module).origin).read_text()
            # flags that exist only where the module is a program: its help names them
            asks_help = "import argparse" in source or "\n    flags.DEFINE" in source
            if asks_help:
                command = [sys.executable, "-m", module, "--help"]
            found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert found.stdout, found.stderr  # absl's help exits with 1
            words = re.findall(r"--(\w+)", found.stdout) if asks_help else found.stdout.split()
            known[module] = set(words)
        return known[module]

    return ask


def test_there_are_commands_to_check():
    modules = {parameter.values[0] for parameter in COMMANDS}
    assert len(COMMANDS) > 15 and {"train", "eval", "flax_vlm.tools.aot_compile"} <= modules


def _start(recipe, folder):
    """Returns a tiny checkpoint in the place of the one that a recipe downloads."""
    if recipe == "llava_finetune":
        return test_generate.write(folder, test_generate.LLAVA, "llava")
    return write_folder(folder, "siglip")[0]


@pytest.mark.parametrize(("module", "arguments"), COMMANDS)
def test_every_flag_and_config_key_in_a_command_exists(
    module, arguments, flags_of, tmp_path, monkeypatch
):
    assert importlib.util.find_spec(module), f"there is no {module}"
    flags = {word[2:].partition("=")[0] for word in arguments if word.startswith("--")}
    unknown = {f.replace("-", "_") for f in flags if not f.startswith("config.")} - flags_of(module)
    assert not unknown
    recipe = next(
        (w for w in re.split("[ =]", " ".join(arguments)) if w.startswith("configs/")), ""
    )
    path = ROOT / recipe.partition(":")[0]
    if path.suffix == ".py" and path.stem not in ("NAME", "X"):
        assert path.exists(), recipe
        spec = importlib.util.spec_from_file_location("recipe", path)
        config = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(config)
        if path.parent.name == "ladders":
            argument = recipe.partition(":")[2]
            assert config.get_ladder(*filter(None, [argument])).rungs()
            return
        if path.stem in NEEDS_THE_HUB:
            folder = _start(path.stem, tmp_path)
            monkeypatch.setattr(
                config, "checkpoint_config", lambda start: checkpoint_config(folder)
            )
        config = config.get_config()
        for flag in (f for f in flags if f.startswith("config.")):
            node = config
            for key in flag.split(".")[1:]:
                assert key in node, f"{flag} is no key of {recipe}"
                node = node[key]


@pytest.mark.parametrize(
    "name",
    [
        "docs/scaling_out.md",
        "docs/running.md",
        "docs/checkpoints.md",
        "docs/scaling.md",
        "README.md",
    ],
)
def test_every_file_that_a_document_names_exists(name):
    document = ROOT / name
    text = document.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    links = [link for link in links if link and "://" not in link]
    missing = [link for link in links if not (document.parent / link).exists()]
    paths = re.findall(r"(?<![\w/.])(?:launch|configs|tests|docs|flax_vlm)/[\w./]*\w", text)
    missing += [path for path in paths if not (ROOT / path).exists() and "NAME" not in path]
    modules = re.findall(r"python -m ((?:tests|flax_vlm)[\w.]+)", text)
    missing += [m for m in modules if importlib.util.find_spec(m) is None]
    assert not missing


def test_every_heading_that_a_link_jumps_to_exists():
    text = (ROOT / "docs" / "scaling_out.md").read_text()
    headings = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.M)
    }
    jumps = set(re.findall(r"\]\(#([\w-]+)\)", text))
    assert jumps and jumps <= headings


def test_the_goodput_command_prints_what_a_run_left(tmp_path):
    text = (ROOT / "docs" / "scaling_out.md").read_text()
    (code,) = re.findall(r'```bash\npython -c "\n(.+?)"\n```', text, re.S)
    watch = Stopwatch(tmp_path / "timings.jsonl")
    with watch.measure("step"):
        pass
    watch.record(0, 5)
    code = code.replace("/shared/run1", str(tmp_path))
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0 and '"goodput": ' in found.stdout, found.stderr
