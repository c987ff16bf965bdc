"""Where rows come from: files, folders, hub datasets and python functions, as datasets.Dataset."""

import os
from pathlib import Path

import datasets

from plumbing.errors import explain, one_line, require, stop
from plumbing.files import check_path, find, load_function

datasets.disable_progress_bars()


def load_dataset(name, split, config=None):
    """A hub dataset, a folder of save_to_disk, a .json(l), .csv or .parquet file, or a function's.

    Args: name; split ("train", "test", ...; ignored for a single file); config (of a hub dataset
    that has several).
    """
    function = load_function(name) if ".py:" in name else check_path("dataset", find(name))
    require(not os.path.isfile(name) or os.path.getsize(name) > 0, f"dataset {name}: is empty")
    try:
        dataset = function(split) if function else read_dataset(find(name), split, config)
    except Exception as error:
        cause = one_line(error.__cause__ or "")  # names the row that is not valid JSON
        require(not cause.startswith("JSON"),
                f"dataset {name}, split {split}: not valid JSON ({cause}, counting from 0); fix or "
                "remove that row")
        stop(f"dataset {name}, split {split}: {explain('dataset', name, error)}")
    require(isinstance(dataset, datasets.Dataset),
            f"dataset {name}: the function must return a datasets.Dataset, not {type(dataset)}")
    require(len(dataset) > 0, f"dataset {name}, split {split}: is empty")
    return dataset


def read_dataset(name, split, config):
    """`load_dataset` for everything but functions, without its checks."""
    saved = [f"{name}/{file}" for file in ("dataset_dict.json", "dataset_info.json")]
    if any(map(os.path.isfile, saved)):
        dataset = datasets.load_from_disk(name)
        return dataset[split] if isinstance(dataset, datasets.DatasetDict) else dataset
    if os.path.isfile(name):
        kind = Path(name).suffix[1:].replace("jsonl", "json")
        return datasets.load_dataset(kind, data_files=name, split="train")
    if not config and "main" in datasets.get_dataset_config_names(name):
        config = "main"
    return datasets.load_dataset(name, config, split=split)
