"""What a run saves and restores: Hugging Face folders, optimizers, schedules, random states."""

import hashlib
import json
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from plumbing.errors import one_line, require, stop
from plumbing.processes import is_first, random_states, set_random_states


@contextmanager
def one_line_failure(what, unfinished=None):
    """If writing fails (a full disk, say), remove the unfinished folder and exit with one line."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        if unfinished and is_first():
            shutil.rmtree(unfinished, ignore_errors=True)
        stop(f"the {what} cannot be written ({one_line(error)}); everything saved earlier is "
             "intact: free some space and continue with --resume", code=1)


# ---------------------------------------------------------------------------- models and optimizers


def whole(tensor):
    """A tensor on the CPU of the first process, put together if it is sharded; else None.

    All processes must call it.
    """
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().cpu() if is_first() else None


def put(tensor, value):
    """Write a whole tensor into one that may be sharded."""
    if hasattr(tensor, "full_tensor"):
        from plumbing.sharding import part_of

        value = part_of(value, tensor)
    with torch.no_grad():
        tensor.copy_(value)


def write_model(folder, model, tokenizer):
    """Write a Hugging Face folder. All processes must call it: each may hold a part of it."""
    if getattr(model, "is_sharded", False):
        from plumbing.sharding import reshard

        reshard(model)
    weights = {name: whole(weight) for name, weight in model.state_dict().items()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # a head tied to the embedding
    if is_first():
        model.save_pretrained(folder, state_dict={name: weight for name, weight in weights.items()
                                                  if name not in tied})
        tokenizer.save_pretrained(folder)


def read_model(folder, model):
    """Load the weights of a Hugging Face folder into a model of the same shape."""
    saved = type(model).from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    weights = saved.state_dict()
    for name, weight in model.state_dict().items():
        put(weight, weights[name])


def optimizer_state(model, optimizer):
    """What the optimizer keeps for each parameter, by its name. All processes must call it."""
    return {name: {key: whole(value) for key, value in optimizer.state[parameter].items()}
            for name, parameter in model.named_parameters() if parameter in optimizer.state}


def load_optimizer_state(model, optimizer, saved):
    """Give each process its part of what `optimizer_state` returned."""
    parameters = dict(model.named_parameters())
    for name, state in saved.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {key: value.clone() for key, value in state.items()}
        for key, value in state.items():
            if value.shape == parameter.shape:
                optimizer.state[parameter][key] = torch.zeros_like(parameter)
                put(optimizer.state[parameter][key], value)


# -------------------------------------------------------------------------------------- checkpoints


def checkpoints(folder):
    """The checkpoints of a run, oldest first."""
    found = (Path(folder) / "checkpoints").glob("[0-9]*")
    return sorted(found, key=lambda path: int(path.name))


def checksums(folder):
    """dict file -> SHA-256 of a checkpoint's files, since safetensors reads a flipped bit."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name != "checksums.json":
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            found[str(path.relative_to(folder))] = digest.hexdigest()
    return found


def save_checkpoint(folder, step, keep, state, trained, tokenizer):
    """Save everything needed to resume. A killed or failed write leaves earlier ones intact.

    checkpoints/000010 holds a Hugging Face folder for each trained model, and in state.pt the
    optimizers, schedules, random states and the run's state.

    Args: folder (of the run); step; keep (how many to keep); state (dict); trained (dict name ->
    (model, optimizer, scheduler)); tokenizer.
    """
    contents = {"state": state, "random": random_states()}
    contents["optimizers"] = {name: optimizer_state(model, optimizer)
                              for name, (model, optimizer, _) in trained.items()}
    contents["schedules"] = {name: scheduler.state_dict()
                             for name, (_, _, scheduler) in trained.items()}
    new, path = folder / "checkpoints/unfinished", folder / f"checkpoints/{step:06d}"
    with one_line_failure(f"checkpoint of update {step}", new):
        if is_first():
            shutil.rmtree(new, ignore_errors=True)
        for name, (model, _, _) in trained.items():
            write_model(new / name, model, tokenizer)
        if is_first():
            torch.save(contents, new / "state.pt")
            (new / "checksums.json").write_text(json.dumps(checksums(new), indent=2) + "\n")
            shutil.rmtree(path, ignore_errors=True)
            new.rename(path)
            for old in checkpoints(folder)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder, trained):
    """Restore models, optimizers, schedules and random states from a run's last checkpoint.

    Exits with one line if that is damaged, or does not fit. Returns: the run's state.
    """
    found = checkpoints(folder)
    require(found, f"--resume {folder}: has no checkpoint; the run stopped before its first one "
                   "(see --save-every)")
    last = found[-1]
    remedy = ("delete that folder to resume from the one before" if len(found) > 1 else
              "start the run again")
    check_checksums(last, remedy)
    try:
        # weights_only: a file that was tampered with runs no code.
        contents = torch.load(last / "state.pt", map_location="cpu", weights_only=True)
        for name, (model, optimizer, scheduler) in trained.items():
            read_model(last / name, model)
            load_optimizer_state(model, optimizer, contents["optimizers"][name])
            load_schedule(scheduler, contents["schedules"][name])
    except Exception as error:
        stop(f"checkpoint {last}: does not fit this run's models ({type(error).__name__}: "
             f"{one_line(error)[:160]}); {remedy}")
    set_random_states(contents["random"])
    return contents["state"]


def check_checksums(last, remedy):
    """Exit with one line if a file of a checkpoint is missing, damaged or not its own."""
    try:
        expected, present = json.loads((last / "checksums.json").read_text()), checksums(last)
        names = expected.keys() | present.keys()
        damaged = sorted(name for name in names if expected.get(name) != present.get(name))
    except Exception:
        damaged = ["checksums.json"]
    require(not damaged, f"checkpoint {last}: {damaged and damaged[0]} is damaged or missing; "
                         f"{remedy}")


def load_schedule(scheduler, saved):
    """Restore a schedule, and make its last step again: --num-updates may have changed."""
    before = {"last_epoch": saved["last_epoch"] - 1, "_step_count": saved["_step_count"] - 1}
    scheduler.load_state_dict(saved | before)
    with warnings.catch_warnings(action="ignore"):  # the optimizer's step is not made again
        scheduler.step()


# ----------------------------------------------------------------------------------- flags of a run


def read_settings(folder):
    """An earlier run's flags and script, from its args.json."""
    path = Path(folder, "args.json")
    require(path.is_file(), f"--resume {folder}: not a run folder (it has no args.json)")
    try:
        settings = json.loads(path.read_text())
        assert isinstance(settings["script"], str) and isinstance(settings["nproc_per_node"], int)
    except Exception:
        stop(f"--resume {folder}: args.json is damaged; the run cannot be resumed without it")
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in settings.items()}


def compare_settings(folder, old, new, may_change):
    """Print which flags of a resumed run have changed, and exit if it would be another run.

    Args: folder; old and new (see `read_settings`); may_change (names).
    """
    require(old["script"] == new["script"],
            f"--resume {folder}: this is a run of {old['script']}.py; resume it with that script")
    for name in new:
        if old.get(name) != new[name] and name not in ("output", "resume"):
            flag = f"--{name.replace('_', '-')}"
            require(name in may_change,
                    f"{flag} {new[name]}: the run in {folder} has {old.get(name)}, and a different "
                    "value would make it a different run; remove the flag, or start a new run")
            if is_first():
                print(f"note: {flag} changed from {old.get(name)} to {new[name]}")
