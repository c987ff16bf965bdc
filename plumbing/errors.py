"""One-line error messages: a user's mistake ends in one sentence, before any long work starts."""

import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch.distributed as dist
from huggingface_hub import constants
from tqdm import tqdm

CACHE = constants.HF_HUB_CACHE

if hasattr(sys.stdout, "reconfigure"):  # a terminal that cannot show a character shows another one
    sys.stdout.reconfigure(errors="replace")


def stop(message, code=2):
    """Exit with a one-line error on standard error (code 2: a mistake on the command line)."""
    if int(os.environ.get("RANK", 0)) > 0:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # so that torchrun can end this process
        # The first process reports. Once all have joined, they are in sync; before, it may still
        # be importing.
        time.sleep(5 if dist.is_initialized() else 30)
    tqdm.write(f"error: {message}", file=sys.stderr)  # clears a progress bar first
    raise SystemExit(code)


def require(ok, message):
    """Exit with `message` unless `ok`: for a user's mistakes, before any long work starts."""
    if not ok:
        stop(message)


def one_line(error):
    """The text of an error as a single line that can always be printed."""
    return " ".join(str(error).encode(errors="replace").decode().split())[:300]


def can_write(folder):
    """Whether files can be written to a folder, which is made if there is none."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def explain(what, name, error):
    """The rest of a message: why `name` could not be loaded, and what to do about it."""
    text, folder = one_line(error), Path(name)
    config = folder / "config.json"
    own_code = config.is_file() and "auto_map" in config.read_text(errors="replace")
    if own_code or "trust_remote_code" in text:
        return ("needs code from its repository, which is never run; use a model that is built "
                "into transformers")
    if "ignore_mismatched_sizes" in text:
        return ("its weights have the wrong shapes (a reward model or critic needs a head with "
                "one label)")
    if "Unrecognized configuration class" in text:
        return ("is not built as a causal language model in transformers (an encoder-decoder, an "
                "encoder, or no language model); use a decoder-only one, such as Llama or Qwen")
    if "quantiz" in text.lower():
        return ("is quantized, so its weights cannot be trained; name the model that it was made "
                "from, in float32 or bfloat16")
    files = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    pickles = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt")))
    safe = any(file.endswith(".safetensors") for file in files)
    if (pickles and not safe) or "use_safetensors" in text:
        return (f"{pickles[0] if pickles else 'its weights'} is a pickle, which can run arbitrary "
                "code when loaded, so it is refused; if you trust it, load it in transformers and "
                "save it with save_pretrained, as safetensors")
    if not folder.exists() and not constants.HF_HUB_OFFLINE and not can_write(CACHE):
        return (f"nothing can be downloaded, since the cache {CACHE} cannot be written; set "
                "HF_HOME to a folder that can")
    if not folder.exists() and isinstance(error, OSError):  # raised without a connection
        repository = "--repo-type dataset " * (what == "dataset") + name
        return ("not a local folder, and the hub cannot be reached or does not have it; if you "
                "are offline, set HF_HUB_OFFLINE=1 to use cached downloads at once, or fetch it "
                f"elsewhere with `hf download {repository} --local-dir FOLDER` and name that "
                "folder")
    return f"cannot be loaded from a folder or the hub: {type(error).__name__}: {text}"
