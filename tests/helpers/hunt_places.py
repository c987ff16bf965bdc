"""Is every way to write every place of exercises/hunt.py's copies as harmless as it should be?

    python -m tests.helpers.hunt_places             # all scripts, three minutes
    python -m tests.helpers.hunt_places grpo.py     # some of them

Writes all places of a script at once, first each in its first way, then in its second, and so on,
and compares what the script's `main` computes with the script itself, as --check does, but to 1e-9.
Run it when you have edited a place.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import torch

from exercises import hunt, hunt_check

BUGS, PLACES = hunt.load_bugs(hunt.Args.bugs)


def ways(text):
    """The parts of an outer «one¦other»."""
    parts, depth = [""], 0
    for letter in text.removeprefix("«").removesuffix("»"):
        depth += {"«": 1, "»": -1}.get(letter, 0)
        if letter == "¦" and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts if text.startswith("«") and depth == 0 else [text]


def written(script):
    """The script's text with its places in the first way, in the second, and so on."""
    text = (hunt.ROOT / script).read_text()
    places = [(old, ways(new)) for old, new in PLACES if text.count(old) == 1]
    for way in range(max(len(news) for _, news in places)):
        copy = text
        for old, news in places:
            copy = copy.replace(old, hunt.choose(news[way % len(news)], way))
        yield hunt.import_all(copy)


def close(found, expected):
    tolerance = 1e-9 * (1 + expected.nan_to_num().abs().max())
    return torch.allclose(found, expected, rtol=0, atol=tolerance, equal_nan=True)


def check(text, script):
    """What hunt_check says of a copy's text."""
    with (tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()),
          contextlib.redirect_stderr(io.StringIO())):
        copy = Path(folder) / "copy.py"
        copy.write_text(text)
        _, message = hunt_check.check(str(copy), script, planted=script)
    return message


def main(scripts):
    hunt_check.same = close
    different = 0
    for script in scripts or sorted({bug["script"] for bug in BUGS}):
        for way, text in enumerate(written(script), 1):
            message = check(text, str(hunt.ROOT / script))
            different += not message.startswith("mended")
            print(f"{script}, way {way}: {message}", flush=True)
    return different


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
