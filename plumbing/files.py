"""What a user names: paths, hub names, and functions in python files."""

import hashlib
import importlib.util
import os
import sys
from contextlib import contextmanager
from pathlib import Path

from plumbing.errors import one_line, require, stop

BESIDE = Path(__file__).resolve().parent.parent  # where the scripts are, and the folder tasks
KINDS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv",
         ".parquet": "parquet", ".txt": "text"}  # suffix of a file of rows -> what reads it
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
LOADED = {}  # absolute path of a python file -> (its module, dict file -> when it was changed)
NEIGHBOURS = {}  # name of a module that such a file imports from its folder -> (file, when changed)


def find(name):
    """`name` as a path that exists, if it does here or beside the scripts; else as it is.

    So the defaults, such as tasks/mini_tldr-sft, are found from any working directory.
    """
    path, colon, function = name.partition(":")
    here = os.path.exists(name) or os.path.exists(path) or os.path.isabs(path)
    return str(BESIDE / path) + colon + function if not here and (BESIDE / path).exists() else name


def check_path(what, name):
    """Exit if `name` looks like a local path, rather than a hub name, and does not exist."""
    require(os.path.exists(name) or not looks_like_path(name),
            f"{what} {name}: no such file or folder; give a path or a hub name")


def looks_like_path(name):
    """Whether `name` must be a local path, since a hub name has another form: owner/name."""
    check_tasks(name)
    owner, _, rest = name.partition("/")
    return bool(name.startswith((".", "/", "~")) or "/" in rest or (rest and os.path.isdir(owner))
                or (not rest and "." in name) or name.lower().endswith((*KINDS, *COMPRESSED)))


def check_tasks(name):
    """Exit if `name` is in the folder of the embedded tasks, and that has not been copied."""
    require(not name.startswith("tasks/") or os.path.exists(name),
            f"{name}: not found; copy the folder tasks to {BESIDE}, or name your own with --model, "
            "--reward and --dataset")


def load_module(path):
    """Import the python file at `path`, which may import what lies beside it, as a script may.

    It is imported again if it, or what it imported from its folder, has changed (in a notebook).
    """
    check_tasks(path)
    require(os.path.isfile(path), f"{path}: no such file")
    key = os.path.abspath(path)
    module, files = LOADED.get(key, (None, {}))
    if module is None or any(when_changed(file) != before for file, before in files.items()):
        try:
            module = import_file(key)
        except Exception as error:
            stop(f"{path}: cannot be imported: {type(error).__name__}: {one_line(error)}")
        folder = os.path.dirname(key) + os.sep
        files = {file: changed for file, changed in NEIGHBOURS.values() if file.startswith(folder)}
        LOADED[key] = module, files | {key: when_changed(key)}
    return module


def when_changed(file):
    return os.path.exists(file) and os.stat(file).st_mtime_ns


def import_file(path):
    """A new module from the python file at `path` (absolute). See `beside`."""
    name = module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with beside(os.path.dirname(path)):
            spec.loader.exec_module(module)
    except Exception:
        del sys.modules[name]
        raise
    return module


def module_name(path):
    """The name of the module for a file: my for my.py, under which other processes can import it.

    Its functions are pickled by that name. If another module has it, such as a file of the same
    name in another folder, a part is added that makes it unique.
    """
    name = Path(path).stem
    if name in sys.modules:
        free = sys.modules[name] is LOADED.get(path, [None])[0]
    else:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        free = name.isidentifier() and (spec is None or spec.origin == path)
    return name if free else f"{name}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"


@contextmanager
def beside(folder):
    """Within this, python files in `folder` are what is imported first, as for a script there.

    Afterwards, what is installed comes first: a function may still import a file beside it.
    """
    for name, (file, changed) in list(NEIGHBOURS.items()):
        elsewhere = not file.startswith(folder + os.sep) and in_folder(name, folder)
        if elsewhere or when_changed(file) != changed:
            sys.modules.pop(name, None)
            del NEIGHBOURS[name]
    before, write = set(sys.modules), sys.dont_write_bytecode
    importlib.invalidate_caches()
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True  # it would be taken for up to date for one second
    try:
        yield
    finally:
        sys.dont_write_bytecode = write
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)
        for name in sys.modules.keys() - before:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if file.startswith(folder + os.sep) and in_folder(name, folder):
                NEIGHBOURS[name] = file, when_changed(file)


def in_folder(name, folder):
    """Whether the first part of a module's name is a python file or a package in `folder`."""
    path = os.path.join(folder, name.partition(".")[0])
    return os.path.isfile(f"{path}.py") or os.path.isdir(path)


def load_function(spec):
    """The function named by "path/to/file.py:function"."""
    path, name = find(spec).rsplit(":", 1)
    function = getattr(load_module(path), name, None)
    require(callable(function), f"{spec}: {path} has no function {name}")
    return function
