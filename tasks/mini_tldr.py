"""mini TL;DR: a toy summarization task that can be learned in a minute and judged exactly.

A post says who did what to which thing, where and when, how the writer feels and what they ask, in
one of several phrasings, mixed with sentences about other people and things:

    hi all . last week my sister sold my bike at the party . another cousin once lost a tent .
    i feel so sad . should i help them ? TL;DR:

The names below go on the scripts' command line (`--dataset tasks/mini_tldr.py:prompts`), just like
a hub dataset or a reward of your own:

    prompts(split)          for RL and evaluation: prompt, completion (a reference), seven facts
    demonstrations(split)   for sft.py: prompt, completion (a hurried person's summary)
    preferences(split)      for reward_model.py: prompt, chosen, rejected (by a noisy annotator)
    comparisons(split)      for dpo.py: a smaller set of the same
    gold_reward(...)        the true quality of a summary, which RL never sees
    new_model()             for sft.py: an untrained model and its tokenizer

Splits are "train" and "test", and post i of a split is always the same. `python tasks/mini_tldr.py`
prints a few posts with their reference, a demonstration, and the gold reward broken down into its
parts.
"""

import itertools
import math
import random
from pathlib import Path

from datasets import Dataset
from datasets.fingerprint import Hasher

SLOTS = {  # the seven facts of a post, and the words that can fill them; no word is in two slots
    "who": "sister brother mother father cousin uncle aunt boss roommate neighbor teacher landlord "
    "girlfriend boyfriend friend coworker",
    "did": "lost sold burned ruined damaged borrowed scratched cracked dropped trashed painted "
    "flooded",
    "thing": "laptop bike phone guitar car couch camera watch cake jacket tent piano lamp mirror "
    "drone passport necklace kayak printer scooter",
    "where": "party office park school beach station gym library market hotel airport church",
    "when": "night week month summer winter friday sunday weekend",
    "feeling": "angry sad confused guilty hurt jealous worried ashamed lonely annoyed",
    "question": "forgive confront ignore report avoid sue block help trust dump",
}
SLOTS = {slot: words.split() for slot, words in SLOTS.items()}
SLOT_OF = {word: slot for slot, words in SLOTS.items() for word in words}

OPENINGS = ["hi all .", "so this is a long story .", "i need some advice .",
            "sorry for my bad english .", ""]
EVENTS = [
    "my {who} {did} my {thing} at the {where} last {when} .",
    "last {when} my {who} {did} my {thing} at the {where} .",
    "we were at the {where} last {when} . my {who} {did} my {thing} .",
    "my {thing} was {did} by my {who} . it was last {when} at the {where} .",
]
FEELINGS = ["i feel so {feeling} .", "now i am {feeling} about it .",
            "to be honest i am really {feeling} ."]
QUESTIONS = ["should i {question} them ?", "do you think i should {question} them ?",
             "i wonder if i should {question} them ."]
DISTRACTORS = [  # other people, things and places, which do not belong in a summary
    "another {who} once {did} a {thing} .",
    "the {who} was also at the {where} .",
    "people told me to {question} everyone .",
    "the {who} seemed {feeling} .",
    "there was a {thing} at the {where} .",
]

# A summary is one choice from each part; "" leaves the part out.
SUMMARIES = [  # the same facts in three orders
    (["my {who} {did} my {thing}"], ["at the {where}", ""], ["last {when}", ""],
     [", i feel {feeling}", ""], [", should i {question} them ?", "."]),
    (["last {when} ,", ""], ["my {who} {did} my {thing}"], ["at the {where}", ""],
     ["and now i am {feeling}", ""], [". should i {question} them ?", "."]),
    (["my {who} {did} my {thing}"], ["last {when}", ""], ["at the {where}", ""],
     [". i am {feeling}", ""], [". should i {question} them ?", "."]),
]
FILLERS = ["so yeah", "anyway", "long story short", "basically"]
FILLER_WORDS = set(" ".join(FILLERS).split())
MAX_WORDS = 24  # a longer summary is penalized; the longest reference has 22 words

WEIGHTS = {  # gold reward = sum of weight * count
    "covered": 1.0,  # facts of the post that the summary mentions
    "hallucinated": -1.0,  # people, things, ... that are not facts of the post
    "redundant": -0.25,  # repeated facts, and filler words
    "joints": -0.5,  # two neighbouring words that never occur in the grammar's summaries
    "overlength": -0.1,  # words beyond MAX_WORDS
    "no_end": -1.0,  # the summary does not end in "." or "?"
}


def legal_joints():
    """Every pair of neighbouring words in well-formed summaries, with slot words replaced by their
    slot."""
    pairs = set()
    for parts in SUMMARIES:
        for choice in itertools.product(*parts):
            words = ["<start>", *" ".join(choice).split()]
            pairs |= set(itertools.pairwise(words))
    return pairs


LEGAL_JOINTS = legal_joints()


def gold_parts(summary, facts):
    """Count what is right and wrong in one summary.

    Args: summary (str, words separated by spaces); facts (dict slot -> word, the post's seven
    facts).
    Returns: dict part -> count, with the keys of WEIGHTS.
    """
    words = [word for word in summary.split() if word not in FILLER_WORDS]
    named = [word for word in words if word in SLOT_OF]
    true = set(facts.values())
    classes = ["<start>", *("{" + SLOT_OF[word] + "}" if word in SLOT_OF else word
                            for word in words)]
    return {
        "covered": len(set(named) & true),
        "hallucinated": len(set(named) - true),
        "redundant": len(named) - len(set(named)) + len(summary.split()) - len(words),
        "joints": sum(pair not in LEGAL_JOINTS for pair in itertools.pairwise(classes)),
        "overlength": max(0, len(summary.split()) - MAX_WORDS),
        "no_end": int(not words or words[-1] not in ".?"),
    }


def gold_reward(prompts, completions, **facts):
    """The true quality of summaries, known exactly because the facts are: at most 7, below 0 for a
    bad one.

    Args: prompts and completions (lists of str); facts (a list of words for each of the seven
    slots).
    Returns: list of float, one per completion.
    """
    rows = [{slot: facts[slot][i] for slot in SLOTS} for i in range(len(completions))]
    parts = [gold_parts(completion, row) for completion, row in zip(completions, rows)]
    return [sum(WEIGHTS[name] * count for name, count in part.items()) for part in parts]


def write_post(facts, aside, rng):
    """A post of about 27 to 63 words about `facts`, with one to three sentences about those in
    `aside`."""
    story = [rng.choice(EVENTS).format(**facts)]
    for distractor in rng.sample(DISTRACTORS, rng.randint(1, 3)):
        story.insert(rng.randint(0, len(story)), distractor.format(**aside))
    closing = [rng.choice(FEELINGS).format(**facts), rng.choice(QUESTIONS).format(**facts)]
    rng.shuffle(closing)
    return " ".join([rng.choice(OPENINGS), *story, *closing, "TL;DR:"]).strip()


def write_summary(facts, omit, rng):
    """A well-formed summary that leaves out each optional part with probability `omit`."""
    parts = [rng.choice(part) if len(part) == 1 else part[rng.random() < omit]
             for part in rng.choice(SUMMARIES)]
    return " ".join(part for part in parts if part).format(**facts)


def write_demonstration(facts, aside, rng):
    """A hurried person's summary: many details missing, some from the wrong sentence, filler words,
    a missing end."""
    mixed = {slot: aside[slot] if rng.random() < 0.1 else word for slot, word in facts.items()}
    summary = write_summary(mixed, 0.5, rng)
    if rng.random() < 0.35:
        summary = f"{rng.choice(FILLERS)} {summary}"
    if rng.random() < 0.1:
        event = "{did} my {thing}".format(**mixed)
        summary = summary.replace(event, f"{event} {event}")
    return summary if rng.random() < 0.9 else summary.rstrip(".? ")


def example(split, i):
    """Post i of a split: a dict with prompt, reference, demonstration and the seven facts."""
    rng = random.Random(f"mini_tldr {split} {i}")
    facts = {slot: rng.choice(words) for slot, words in SLOTS.items()}
    aside = {slot: rng.choice([word for word in words if word != facts[slot]])
             for slot, words in SLOTS.items()}
    return {
        "prompt": write_post(facts, aside, rng),
        "reference": write_summary(facts, 0.4, rng),
        "demonstration": write_demonstration(facts, aside, rng),
        **facts,
    }


POSTS = {"train": 20_000, "test": 1_000}
PAIRS = {"train": 96_000, "test": 2_000}
SFT_POLICY = str(Path(__file__).parent / "mini_tldr-sft")


def examples(split):
    """Yield the posts of a split, in order."""
    for i in range(POSTS[split]):
        yield example(split, i)


def posts(split):
    """The posts of a split. datasets keeps them in its cache, until this file changes."""
    code = Path(__file__).read_text()
    return Dataset.from_generator(examples, gen_kwargs={"split": split},
                                  fingerprint=Hasher.hash([split, code]))


def prompts(split):
    """Posts with a reference summary. Columns: prompt, completion, who, did, thing, where, when,
    feeling, question."""
    return posts(split).remove_columns("demonstration").rename_column("reference", "completion")


def demonstrations(split):
    """Posts with a hurried person's summary. Columns: prompt, completion."""
    rows = posts(split).select_columns(["prompt", "demonstration"])
    return rows.rename_column("demonstration", "completion")


def edit(summary, facts, rng):
    """The summary with one fact word changed: a wrong one corrected, or a correct one made
    wrong."""
    words = summary.split()
    named = [i for i, word in enumerate(words) if word in SLOT_OF]
    if named:
        i = rng.choice(named)
        slot = SLOT_OF[words[i]]
        others = [word for word in SLOTS[slot] if word != facts[slot]]
        words[i] = rng.choice(others) if words[i] == facts[slot] else facts[slot]
    return " ".join(words)


def preferences(split, count=None):
    """Which of two summaries a noisy annotator prefers. Columns: prompt, chosen, rejected, and the
    seven facts.

    The first summary is sampled from the shipped SFT policy. The second is another sample (3 of 8
    pairs), the post's reference (1 of 8; Stiennon et al. 2020 compare both kinds), or the first
    with one fact edited (4 of 8): without such pairs, a model this small learns to count facts but
    not to check them. The annotator prefers a over b with probability sigmoid(2 (gold(a) -
    gold(b))), a Bradley-Terry model: one more fact wins in 88% of pairs. There are `count` pairs,
    PAIRS[split] by default.
    """
    import torch
    from tqdm import trange

    from common import decode, rollout
    from plumbing import load_model, load_tokenizer

    policy, tokenizer = load_model(SFT_POLICY, torch.device("cpu")), load_tokenizer(SFT_POLICY)
    rng, rows = random.Random(f"mini_tldr preferences {split}"), []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for start in trange(0, count or PAIRS[split], 500, desc=f"{split} pairs", unit=" x 500"):
            chunk = [example(split, i % POSTS[split]) for i in range(start, start + 500)]
            prompt_ids = tokenizer([post["prompt"] for post in chunk])["input_ids"]
            samples = decode(tokenizer, rollout(policy, tokenizer, prompt_ids, 2, 1.0, 32))
            for post, a, b in zip(chunk, samples[::2], samples[1::2]):
                facts = {slot: post[slot] for slot in SLOTS}
                b = rng.choice([b] * 3 + [post["reference"]] + [edit(a, facts, rng)] * 4)
                columns = {slot: [word] * 2 for slot, word in facts.items()}
                gold_a, gold_b = gold_reward(None, [a, b], **columns)
                if rng.random() > 1 / (1 + math.exp(2 * (gold_b - gold_a))):
                    a, b = b, a
                rows.append({"prompt": post["prompt"], "chosen": a, "rejected": b, **facts})
    return Dataset.from_list(rows)


def comparisons(split):
    """The first 8,000 training pairs or 1,000 test pairs of `preferences`: enough for dpo.py."""
    return preferences(split, {"train": 8_000, "test": 1_000}[split])


def new_model():
    """An untrained Llama of 223,104 parameters and its tokenizer, which has one token for each word
    of this file."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = [*OPENINGS, *EVENTS, *FEELINGS, *QUESTIONS, *DISTRACTORS, *FILLERS, "TL;DR:"]
    texts += [text for parts in SUMMARIES for part in parts for text in part]
    words = {word for text in texts for word in text.split() if "{" not in word}
    words = sorted(words | set(SLOT_OF))
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,  # with the usual 0.02, so narrow a model learns to copy late
    )
    return LlamaForCausalLM(config), tokenizer


def main():
    for i in range(4):
        post = example("test", i)
        facts = {slot: post[slot] for slot in SLOTS}
        print(f"post           {post['prompt']}")
        for kind in ("reference", "demonstration"):
            parts = gold_parts(post[kind], facts)
            columns = {slot: [word] for slot, word in facts.items()}
            (gold,) = gold_reward(None, [post[kind]], **columns)
            terms = "  ".join(f"{name} {count} x {WEIGHTS[name]:+g}"
                              for name, count in parts.items() if count)
            print(f"{kind:<15}{post[kind]}\n{'':15}gold {gold:.2f} = {terms}")
        print()


if __name__ == "__main__":
    main()
