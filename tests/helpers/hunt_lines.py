"""Can the planted bugs of exercises/hunt.py be found without understanding them?

    python -m tests.helpers.hunt_lines 20            # the copies of seeds 1 to 20
    python -m tests.helpers.hunt_lines 20 --lines    # and every unique line, the bugs' marked

A place is a block of lines in which a copy differs from its script. A line is unique if it is in no
script and in no other copy of the same seed. The first table has, for each bug, means over the
seeds: the places, the unique lines, those of the bug's place, and the places that have some.

The second plays students who look for the bug by a rule, without reading: for each of the bugs, how
often the rule picks the bug's place. With ties, a draw among them decides. "Rarest line",
"commonest line" and "versions" compare the same copy over all seeds, as a class can; "left alone
elsewhere" looks for lines of the script that most other copies of the seed do not rewrite. The last
row is a blind choice.
"""

import difflib
from collections import Counter
from typing import Annotated, NamedTuple

import tyro

from exercises import hunt
from lab.family import SCRIPTS

BUGS, PLACES = hunt.load_bugs(hunt.Args.bugs)


class Place(NamedTuple):
    """A block of lines in which a copy differs from its script."""

    number: int  # from the top of the file
    old: tuple[str, ...]  # the script's lines
    lines: tuple[str, ...]  # the copy's
    is_bug: bool


def lines_of(text):
    return [line.strip() for line in text.splitlines() if line.strip()]


def text_of(script):
    return (hunt.ROOT / script).read_text()


def places_of(bug, key):
    """The places of a copy. The imports, which are the same in all copies, are none."""
    script = hunt.import_all(text_of(bug["script"])).splitlines()
    copy = hunt.plant(bug, PLACES, key).splitlines()
    planted = {line for old, new in bug["bug"]
               for line in {*lines_of(hunt.choose(new, key))} - {*lines_of(old)}}
    blocks = difflib.SequenceMatcher(None, script, copy, autojunk=False).get_opcodes()
    differ = [(lines_of("\n".join(script[i:j])), lines_of("\n".join(copy[start:end])))
              for tag, i, j, start, end in blocks if tag != "equal"]
    return [Place(number, tuple(old), tuple(lines), bool(planted & {*lines}))
            for number, (old, lines) in enumerate(differ) if lines]


def unique_lines(copies):
    """The lines of each of one seed's copies that are in no script and in no other copy."""
    known = {line for name in SCRIPTS for line in lines_of(text_of(f"{name}.py"))}
    lines = [{line for place in places for line in place.lines} - known for places in copies]
    count = Counter(line for some in lines for line in some)
    return [{line for line in some if count[line] == 1} for some in lines]


def left_alone(copies):
    """For each line of the scripts, the share of the copies with it that leave it as it is."""
    rewritten = Counter(line for places in copies
                        for line in {line for place in places for line in place.old})
    present = Counter(line for bug in BUGS for line in {*lines_of(text_of(bug["script"]))})
    return {line: 1 - rewritten[line] / count for line, count in present.items()}


def rules(unique, alone, times, versions):
    """What students may look for among a copy's places: dict name -> function of a place.

    Args: unique (the copy's unique lines); alone (see left_alone); times (line -> how many seeds'
    copies have it); versions (what a place replaces -> how many versions there are over the seeds).
    """
    comments = lambda place: sum("#" in line for line in place.lines)
    return {
        "most unique lines": lambda place: len(unique & {*place.lines}),
        "fewest unique lines": lambda place: -len(unique & {*place.lines}),
        "largest place": lambda place: len(place.lines),
        "smallest place": lambda place: -len(place.lines),
        "longest line": lambda place: max(map(len, place.lines)),
        "shortest line": lambda place: -min(map(len, place.lines)),
        "most comments": comments,
        "fewest comments": lambda place: -comments(place),
        "first place": lambda place: -place.number,
        "last place": lambda place: place.number,
        "rarest line": lambda place: -min(times[line] for line in place.lines),
        "commonest line": lambda place: max(times[line] for line in place.lines),
        "fewest versions": lambda place: -versions[place.old],
        "most versions": lambda place: versions[place.old],
        "lines only added": lambda place: not place.old,
        "left alone elsewhere": lambda place: max((alone.get(line, 0) for line in place.old),
                                                  default=0),
        "blind": lambda place: 0,
    }


def hit(places, rule):
    """How likely a student who follows the rule, and draws among ties, picks the bug's place."""
    best = max(map(rule, places))
    tied = [place.is_bug for place in places if rule(place) == best]
    return sum(tied) / len(tied)


def study(seeds):
    """Two tables: for each bug, means over seeds of what is counted; and of the rules' hits."""
    copies = {seed: [places_of(bug, f"{seed} {number}") for number, bug in enumerate(BUGS, 1)]
              for seed in seeds}
    unique = {seed: unique_lines(copies[seed]) for seed in seeds}
    alone = {seed: left_alone(copies[seed]) for seed in seeds}
    mean = lambda values: sum(values) / len(seeds)
    counts, hits = [], []
    for n in range(len(BUGS)):
        in_seed = [{line for place in copies[seed][n] for line in place.lines} for seed in seeds]
        times = Counter(line for lines in in_seed for line in lines)
        versions = Counter(old for old, _ in {(place.old, place.lines) for seed in seeds
                                              for place in copies[seed][n]})
        own = lambda place, seed: len(unique[seed][n] & {*place.lines})
        counts.append({
            "places": mean([len(copies[seed][n]) for seed in seeds]),
            "unique lines": mean([len(unique[seed][n]) for seed in seeds]),
            "the bug's": mean([sum(own(place, seed) for place in copies[seed][n] if place.is_bug)
                               for seed in seeds]),
            "places with some": mean([sum(own(place, seed) > 0 for place in copies[seed][n])
                                      for seed in seeds])})
        found = [{name: hit(copies[seed][n], rule)
                  for name, rule in rules(unique[seed][n], alone[seed], times, versions).items()}
                 for seed in seeds]
        hits.append({name: mean([one[name] for one in found]) for name in found[0]})
    return counts, hits


def show(seed):
    """Print every line that is unique to one of a seed's copies, with a mark at the bugs'."""
    copies = [places_of(bug, f"{seed} {number}") for number, bug in enumerate(BUGS, 1)]
    for number, (places, unique) in enumerate(zip(copies, unique_lines(copies)), 1):
        print(f"\nseed {seed}, {hunt.place(number, BUGS[number - 1])}")
        for place in places:
            for line in place.lines:
                if line in unique:
                    print("  bug " if place.is_bug else "      ", line)


def table(rows, columns):
    print(f"{'':32}" + "".join(f"{column:>18}" for column in columns))
    for number, row in enumerate(rows, 1):
        print(f"{hunt.place(number, BUGS[number - 1]):32}"
              + "".join(f"{row[column]:>18.2f}" for column in columns))


def main(seeds: Annotated[int, tyro.conf.Positional] = 20, lines: bool = False):
    """Args: seeds: copies of seeds 1 to this; lines: list the unique lines, bugs marked."""
    for seed in range(1, seeds + 1) if lines else ():
        show(seed)
    counts, hits = study(range(1, seeds + 1))
    table(counts, list(counts[0]))
    print()
    for name in hits[0]:
        shares = [row[name] for row in hits]
        print(f"{name:20}" + "".join(f"{value:6.2f}" for value in shares)
              + f"   mean {sum(shares) / len(shares):.2f}")


if __name__ == "__main__":
    tyro.cli(main)
