# SPDX-License-Identifier: Apache-2.0
r"""Packs the conversations of a config into full rows, once, for any number of trainings.

    python -m flax_vlm.tools.pack --config configs/llava_shapes_stage2.py --out DIR \
        --config.data.text.length=256 --config.data.chat.num_images=4

writes DIR/index.json and DIR/tokenizer.json. Train on the rows with the same config and

    --config.data.name=packed:DIR/index.json --config.data.rows=packed \
    --config.data.text.tokenizer=file --config.data.text.path=DIR/tokenizer.json

and the same length and num_images. A batch then holds batch_size rows, not conversations. See
data/packing.py.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from flax_vlm.data.conversations import ConversationPreprocess
from flax_vlm.data.packing import filled, first_fit, size_of, write_index
from flax_vlm.experiment import USER_ERRORS, Experiment

FLAGS = flags.FLAGS


def pack(run: Experiment, folder: pathlib.Path) -> dict[str, Any]:
    """Returns counts, having written the index and the tokenizer of a config's training split.

    Args:
        run: of a config with data.rows "conversations".
        folder: of the files; made if it is not there.

    Raises:
        ValueError: if rows are not conversations, or one of them is wrong (named).
    """
    data, spec = run.train_data, run.config["data"]
    preprocess = data.preprocess
    if not isinstance(preprocess, ConversationPreprocess):
        raise ValueError(f"conversations are packed, got data.rows {spec['rows']!r}")
    sizes = [size_of(data.source[n], preprocess) for n in range(len(data.source))]
    length, num_images = preprocess.text_length, preprocess.num_images
    rows = first_fit(sizes, length, num_images)
    folder.mkdir(parents=True, exist_ok=True)
    run.tokenizer.save(folder / "tokenizer.json")
    source = {"name": spec["name"], "split": spec["split"], **spec.get("options", {})}
    index = {"source": source, "examples": len(sizes), "rows": rows}
    write_index(folder / "index.json", {**index, "length": length, "num_images": num_images})
    return {
        "examples": len(sizes),
        "without_room": sum(tokens == 0 for tokens, _ in sizes),
        "rows": len(rows),
        "filled": round(filled(sizes, rows, length), 4),
        "filled_unpacked": round(filled(sizes, sizes, length), 4),
    }


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    if FLAGS.config is None or FLAGS.out is None:
        raise app.UsageError("--config and --out are needed")
    try:
        print(json.dumps(pack(Experiment.from_config(FLAGS.config), pathlib.Path(FLAGS.out))))
    except USER_ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # here, so that `pack` can be imported beside the flags of another program
    config_flags.DEFINE_config_file("config", None, "A recipe: configs/NAME.py[:argument].")
    flags.DEFINE_string("out", None, "Folder of the index.")
    app.run(main)
