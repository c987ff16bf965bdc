"""What a user names: paths, hub names, and functions in python files."""

import importlib.util
import os
import sys
from pathlib import Path

from plumbing.errors import one_line, require, stop

BESIDE = Path(__file__).resolve().parent.parent  # where the scripts are, and the folder tasks
LOADED = {}  # absolute path of a python file -> (when it was last changed, its module)


def find(name):
    """`name` as a path that exists, if it does here or beside the scripts; else as it is.

    So the defaults, such as tasks/mini_tldr-sft, are found from any working directory.
    """
    path, colon, function = name.partition(":")
    here = os.path.exists(path) or os.path.isabs(path)
    return str(BESIDE / path) + colon + function if not here and (BESIDE / path).exists() else name


def check_path(what, name):
    """Exit if `name` looks like a local path, rather than a hub name, and does not exist."""
    check_tasks(name)
    owner, _, rest = name.partition("/")
    is_path = name.startswith((".", "/", "~")) or "/" in rest or (rest and os.path.isdir(owner))
    is_path = is_path or name.endswith((".json", ".jsonl", ".csv", ".parquet"))
    require(not is_path or os.path.exists(name),
            f"{what} {name}: no such file or folder; give a path or a hub name")


def check_tasks(name):
    """Exit if `name` is in the folder of the embedded tasks, and that has not been copied."""
    require(not name.startswith("tasks/") or os.path.exists(name),
            f"{name}: not found; copy the folder tasks to {BESIDE}, or name your own with --model, "
            "--reward and --dataset")


def load_module(path):
    """Import the python file at `path`; again only if it has been changed since (in a notebook)."""
    check_tasks(path)
    require(os.path.isfile(path), f"{path}: no such file")
    key, changed = os.path.abspath(path), os.stat(path).st_mtime_ns
    if LOADED.get(key, (None, None))[0] != changed:
        LOADED[key] = changed, import_file(path)
    return LOADED[key][1]


def import_file(path):
    """A new module from the python file at `path`."""
    spec = importlib.util.spec_from_file_location(path, path)
    module = sys.modules[path] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        stop(f"{path}: cannot be imported: {type(error).__name__}: {one_line(error)}")
    return module


def load_function(spec):
    """The function named by "path/to/file.py:function"."""
    path, name = find(spec).rsplit(":", 1)
    function = getattr(load_module(path), name, None)
    require(callable(function), f"{spec}: {path} has no function {name}")
    return function
