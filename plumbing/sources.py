"""Where rows come from: files, folders, hub datasets and python functions, as datasets.Dataset.

Text stays as it is written, whatever it looks like: 007, NA, 2024-01-05.
"""

import glob
import os
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import datasets
import pyarrow
from pandas._libs.parsers import STR_NA_VALUES
from pyarrow import json as arrow_json

from plumbing.errors import can_write, explain, one_line, require, stop
from plumbing.files import COMPRESSED, KINDS, find, load_function, looks_like_path
from plumbing.processes import is_first

datasets.disable_progress_bars()

READABLE = f"{', '.join(KINDS)}, or one of these compressed as {', '.join(COMPRESSED)}"
TEXTS = {"prompt", "question", "completion", "chosen", "rejected"}  # columns of text


def text_columns(args):
    """Names of the columns that hold text: TRL's, and those that flags (--prompt-column) name."""
    return TEXTS | {column for flag, column in vars(args).items()
                    if flag.endswith("_column") and column}


def load_dataset(name, split, config=None, texts=TEXTS):
    """A hub dataset, a folder, a file (see READABLE), or what a function returns.

    Args: name; split ("train", "test", ...; ignored for a single file); config (of a hub dataset
    that has several); texts (names of the columns that hold text).
    """
    function = load_function(name) if ".py:" in name else None
    path = name if function else find(name)
    if not function:
        check_source(name, path)
    let_datasets_write()
    try:
        dataset = function(split) if function else read_dataset(path, split, config, texts)
    except Exception as error:
        cause = one_line(error.__cause__ or "")  # names the row that is not valid JSON
        require(not cause.startswith("JSON"),
                f"dataset {name}, split {split}: not valid JSON ({cause}, counting from 0); fix or "
                "remove that row")
        stop(f"dataset {name}, split {split}: {explain('dataset', name, error)}")
    require(isinstance(dataset, datasets.Dataset),
            f"dataset {name}: the function must return a datasets.Dataset, not {type(dataset)}")
    require(len(dataset) > 0, f"dataset {name}, split {split}: is empty")
    require("__index_level_0__" not in dataset.column_names,  # what pandas makes of such rows
            f"dataset {name}: rows have more fields than the header; quote texts with commas")
    return dataset


def check_source(name, path):
    """Exit if `path` is a file that cannot be read, or looks like one and does not exist."""
    what = f"give a folder, a hub name, or a file: {READABLE}"
    require(os.path.exists(path) or not looks_like_path(path),
            f"dataset {name}: no such file or folder; {what}")
    if os.path.isfile(path):
        require(kind_of(path), f"dataset {name}: files of this kind cannot be read; {what}")
        require(os.path.getsize(path) > 0, f"dataset {name}: is empty")
        require("::" not in path, f"dataset {name}: `datasets` cannot read a path with ::; rename "
                                  "it")


def suffix(path):
    """What ends a file's name, in small letters, without that of its compression."""
    path = Path(path.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def kind_of(path):
    """What in `datasets` reads a file, by its suffix: "json", "csv", ...; None: nothing does."""
    return KINDS.get(suffix(path))


def read_dataset(path, split, config, texts):
    """`load_dataset` for everything but functions, without its checks."""
    saved = [f"{path}/{file}" for file in ("dataset_dict.json", "dataset_info.json")]
    if any(map(os.path.isfile, saved)):
        dataset = datasets.load_from_disk(path)
        return dataset[split] if isinstance(dataset, datasets.DatasetDict) else dataset
    if os.path.isfile(path):
        return read_files({"train": [path]}, "train", texts)
    if os.path.isdir(path) and glob.has_magic(os.path.abspath(path)):
        return read_files(files_of(path, config), split, texts)
    if not config and "main" in datasets.get_dataset_config_names(path):
        config = "main"
    kind = datasets.load_dataset_builder(path, config).name
    return read_as_written(kind, split, texts, path, name=config)


def files_of(folder, config):
    """Which files `datasets` takes for which split of a folder: dict split -> paths.

    It would take brackets in the folder's name for a pattern, so it gets a folder of links.
    """
    with tempfile.TemporaryDirectory() as links:
        links = shutil.copytree(os.path.abspath(folder), f"{links}/data", copy_function=os.symlink)
        found = datasets.load_dataset_builder(links, config).config.data_files
        return {split: [os.readlink(path) for path in paths] for split, paths in found.items()}


def read_files(files, split, texts):
    """One split of files that are all of the same kind: dict split -> paths."""
    first = next(iter(files.values()))[0]
    kind, more = kind_of(first), {"sep": "\t"} if suffix(first) == ".tsv" else {}
    escaped = {name: [glob.escape(os.path.abspath(path)) for path in paths]
               for name, paths in files.items()}
    return read_as_written(kind, split, texts, kind, data_files=escaped, **more)


def read_as_written(kind, split, texts, path, **options):
    """datasets.load_dataset, where text stays as it is written.

    Args: kind (of the files); split; texts (names of columns); path; options (what else it takes).
    """
    if kind == "csv":
        rows = datasets.load_dataset(path, split=split, streaming=True, **options)
        columns = next(iter(rows), [])
        options |= {"converters": {name: str for name in columns if name in texts},
                    "keep_default_na": False,  # but in the other columns
                    "na_values": {name: sorted(STR_NA_VALUES) for name in columns
                                  if name not in texts}}
    elif kind == "json":
        options["encoding_errors"] = "strict"  # the default, but with a cache of its own
    elif kind == "text":
        options |= {"features": datasets.Features({"prompt": datasets.Value("string")}),
                    "encoding": "utf-8-sig"}  # one prompt a line
    with patch.object(arrow_json, "read_json", partial(read_json, arrow_json.read_json)):
        return datasets.load_dataset(path, split=split, **options)


def read_json(arrow_read_json, file, **options):
    """pyarrow.json.read_json, which takes text for a date if all of a column looks like one.

    If it has done so, the file is read again, with the type of these columns given.
    """
    table = arrow_read_json(file, **options)
    schema = pyarrow.schema([(field.name, without_dates(field.type)) for field in table.schema])
    if schema.equals(table.schema):
        return table
    file.seek(0)
    parse_options = arrow_json.ParseOptions(explicit_schema=schema)
    return arrow_read_json(file, parse_options=parse_options, **options)


def without_dates(kind):
    """An Arrow type with text in the place of dates, at any depth."""
    if pyarrow.types.is_temporal(kind):
        return pyarrow.string()
    if pyarrow.types.is_list(kind):
        return pyarrow.list_(without_dates(kind.value_type))
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([(field.name, without_dates(field.type)) for field in kind])
    return kind


@cache
def let_datasets_write():
    """Where the cache of `datasets` cannot be written, give it one that lasts as long as this run.

    Returns: what removes that in the end, or None.
    """
    usual = datasets.config.HF_DATASETS_CACHE
    if can_write(usual):
        return None
    temporary = tempfile.TemporaryDirectory()
    datasets.config.HF_DATASETS_CACHE = temporary.name
    if is_first():
        print(f"note: the cache {usual} cannot be written, so every run reads its datasets anew; "
              "set HF_HOME to a folder that can")
    return temporary
