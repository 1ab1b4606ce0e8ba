# SPDX-License-Identifier: Apache-2.0
"""Reads the point sets that authors publish, from their own files; docs/scaling.md says where.

    cherti      zeroshot_results.csv of LAION-AI/scaling-laws-openclip (arXiv:2212.07143)
    chinchilla  data/svg_extracted_data.csv of epoch-research/analyzing-chinchilla
                (arXiv:2404.10102; the points of Hoffmann et al. 2022, figure 4)
    nezhurina   scaling_laws/data/all_results.csv.gz of LAION-AI/scaling-laws-for-comparison
                (arXiv:2506.04598), written from the columns that its overview.ipynb reads; that
                file itself was not at hand

None of the three repositories has a licence, so nothing of them is in this package. Units differ:
Cherti's compute is GMAC with attention, Nezhurina's GFLOP without the attention's score and value
matmuls, both forward alone; Chinchilla's is FLOPs forward and backward.
"""

from __future__ import annotations

import gzip
import pathlib

import numpy as np

from flax_vlm.scaling.tables import Columns, parse_columns, read_columns

CHINCHILLA_OUTLIERS = 5  # the largest losses, which are also the fewest tokens per parameter


def read_cherti(
    path: str | pathlib.Path, dataset: str = "imagenet1k", metric: str = "acc1"
) -> Columns:
    """Returns the runs of Cherti et al.: "arch", "samples", "data", "compute" [GMAC], "error".

    Args:
        path: of zeroshot_results.csv.
        dataset: as in its column downstream_dataset, "mscoco_captions".
        metric: one of its columns, "image_retrieval_recall@5"; error = 1 - metric.

    Raises:
        ValueError: if the file has other columns or nothing of this dataset.
    """
    table = read_columns(path)
    wanted = ["arch", "samples_seen_pretty", "upstream_dataset", "gmacs_total", metric]
    _check_columns(path, table, [*wanted, "downstream_dataset"])
    rows = table["downstream_dataset"] == dataset
    _check_rows(path, rows, dataset, table["downstream_dataset"])
    names = ("arch", "samples", "data", "compute", "error")
    found = {name: table[key][rows] for name, key in zip(names, wanted, strict=True)}
    return {**found, "error": 1.0 - found["error"]}


def read_chinchilla(path: str | pathlib.Path, outliers: int = CHINCHILLA_OUTLIERS) -> Columns:
    """Returns the points of Hoffmann et al.'s figure 4: "N", "D", "C" [FLOPs], "loss".

    D = C / (6 N).

    Args:
        path: of svg_extracted_data.csv.
        outliers: how many of the largest losses are left out, as in the replication; 0 keeps all.

    Raises:
        ValueError: if the file has other columns.
    """
    table = read_columns(path)
    _check_columns(path, table, ["Model Size", "Training FLOP", "loss"])
    n, compute, loss = (table[key] for key in ("Model Size", "Training FLOP", "loss"))
    kept = np.argsort(loss, kind="stable")[: len(loss) - outliers]
    kept.sort()
    return {"N": n[kept], "D": (compute / (6 * n))[kept], "C": compute[kept], "loss": loss[kept]}


def read_nezhurina(
    path: str | pathlib.Path,
    family: str = "clip",
    dataset: str = "imagenet1k",
    metric: str = "acc1",
    *,
    pretrained_on: str = "datacomp_1b",
    schedule: str = "cosine",
) -> Columns:
    """Returns the final checkpoints of Nezhurina et al.: "model", "compute" [GFLOP], "error".

    Their selection: C >= 1e6, at most 1e10 samples, and no error of 0.7 or more above 1e11 GFLOP.

    Args:
        path: of all_results.csv.gz, or the unpacked CSV.
        family: "clip", "siglip", "coca" or "mammut".
        dataset: as in its column downstream_dataset.
        metric: one of its columns; error = 1 - metric.
        pretrained_on: as in its column pretrain_dataset.
        schedule: "cosine" or "const".

    Raises:
        ValueError: if the file has other columns or nothing of this selection.
    """
    opened = gzip.open(path, "rt") if str(path).endswith(".gz") else pathlib.Path(path).open()
    with opened as file:
        table = parse_columns(file, str(path))
    texts = dict(
        downstream_dataset=dataset,
        pretrain_dataset=pretrained_on,
        lr_scheduler=schedule,
        eval_type="similarity",
    )
    numbers = ["gflops_total", "total_samples_seen", "epoch", "total_epochs", metric]
    _check_columns(path, table, [*texts, *numbers, "model_simple_namespace"])
    rows = np.char.endswith(table["model_simple_namespace"], f"_{family}")
    for column, value in texts.items():
        rows &= table[column] == value
    error = 1.0 - table[metric]
    rows &= (table["epoch"] == table["total_epochs"]) & np.isfinite(error)
    _check_rows(path, rows, f"{family}, {list(texts.values())}", table["model_simple_namespace"])
    rows &= usual_run(table["gflops_total"], error) & (table["total_samples_seen"] <= 1e10)
    return {
        "model": table["model_simple_namespace"][rows],
        "compute": table["gflops_total"][rows],
        "error": error[rows],
    }


def usual_run(compute: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Returns [n] bool: which runs Nezhurina et al. keep, by compute [GFLOP] and error."""
    return (compute >= 1e6) & ~((compute > 1e11) & (error >= 0.7))


def _check_columns(path: str | pathlib.Path, table: Columns, wanted: list[str]) -> None:
    missing = [name for name in wanted if name not in table]
    if missing:
        raise ValueError(f"{path} has no column {missing}, its columns are {sorted(table)}")


def _check_rows(path: str | pathlib.Path, rows: np.ndarray, what: str, among: np.ndarray) -> None:
    if not rows.any():
        raise ValueError(f"{path} has no row of {what}, choose among {sorted(set(among))}")
