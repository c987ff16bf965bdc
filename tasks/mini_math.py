"""mini math: pencil-and-paper addition, rewarded by a rule: the answer is right (1) or wrong (0).

Each problem adds two two-digit numbers. Every digit is a token, and the answer is written units
first:

    4 7 + 3 8 =        5 8         47 + 38 is 85
    9 6 + 1 5 =        1 1 1       96 + 15 is 111

Units first means that a carry is known before the digit that needs it, so each answer digit is one
small sum. Tens first also works, but a model this small learns it less reliably: in a trial with
SFT seeds 1, 2 and 3 (RL seed 1), RLOO ends with 0.82, 0.97 and 0.96 of the answers right; with
units first, 0.98, 0.97 and 0.99.

The demonstrations forget to carry two times in three, which gives 5 7 and 1 0 above. So the SFT
policy knows how to carry but seldom does: about half of its samples are right, and greedy decoding
solves only the problems without a carry (a quarter). RL with nothing but the rule teaches it to
carry. These names go on the command line:

    prompts(split)          for RL and evaluation: prompt, completion (the right answer), answer
    demonstrations(split)   for sft.py: prompt, completion (a forgetful person's answer)
    comparisons(split)      for dpo.py: prompt, chosen (the right answer), rejected (a wrong one)
    accuracy(...)           the reward; `gold_reward` is the same
    new_model()             for sft.py: an untrained model and its tokenizer

The first command trained the policy in tasks/mini_math-sft, and the others start from it (k is 4;
beta 0.001 is the REINFORCE++ post's setting for rule-based rewards):

    python sft.py --model tasks/mini_math.py:new_model \\
        --dataset tasks/mini_math.py:demonstrations \\
        --num-updates 800 --batch-size 128 --lr 4e-3 --output runs/math-sft
    python rloo.py --model tasks/mini_math-sft --dataset tasks/mini_math.py:prompts \\
        --reward tasks/mini_math.py:accuracy --beta 0.001 --temperature 1 --max-new-tokens 5 \\
        --num-updates 150 --prompts-per-step 16 --lr 1e-3
    python dpo.py --model tasks/mini_math-sft --dataset tasks/mini_math.py:comparisons \\
        --eval-dataset tasks/mini_math.py:prompts --reward tasks/mini_math.py:accuracy \\
        --temperature 1 --max-new-tokens 5 --beta 2

Splits are "train" and "test" and never change; a + b is always in the same split as b + a. `python
tasks/mini_math.py` prints a few problems with the right answer, a demonstration and its reward.
"""

import random

from datasets import Dataset

FORGET = 2 / 3  # how often a demonstration forgets to carry
PEOPLE = 10  # demonstrations per problem
SPLITS = {"train": slice(500, None), "test": slice(500)}  # of the 4,095 pairs from 10 to 99


def problems(split):
    """The split's (a, b), with both orders of every pair: 7,109 for training and 991 for
    testing."""
    rng = random.Random("mini_math")
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    rng.shuffle(pairs)
    rows = [row for a, b in pairs[SPLITS[split]] for row in sorted({(a, b), (b, a)})]
    rng.shuffle(rows)
    return rows


def ask(a, b):
    """47, 38 -> "4 7 + 3 8 ="."""
    return " ".join(f"{a}+{b}=")


def write(answer):
    """85 -> "5 8": digits from the units up."""
    return " ".join(reversed(str(answer)))


def forget_to_carry(a, b):
    """47, 38 -> "5 7": each column is added on its own, and only its last digit is kept."""
    return f"{(a % 10 + b % 10) % 10} {(a // 10 + b // 10) % 10}"


def prompts(split):
    """Problems with the right answer. Columns: prompt, completion, answer."""
    return Dataset.from_list([{"prompt": ask(a, b), "completion": write(a + b), "answer": a + b}
                              for a, b in problems(split)])


def demonstrations(split):
    """Every problem of the split, in the order of `prompts`, repeated PEOPLE times. Columns:
    prompt, completion."""
    rng = random.Random(f"mini_math {split}")
    answer = lambda a, b: forget_to_carry(a, b) if rng.random() < FORGET else write(a + b)
    return Dataset.from_list([{"prompt": ask(a, b), "completion": answer(a, b)}
                              for _ in range(PEOPLE) for a, b in problems(split)])


def comparisons(split):
    """Each problem with a right and a wrong answer. Columns: prompt, chosen, rejected, answer.

    The wrong answer forgets the carry, or carries when there is none. (With only the first kind,
    DPO learns to carry always: the accuracy falls to 0.14.)
    """
    rows = []
    for a, b in problems(split):
        right, wrong = write(a + b), forget_to_carry(a, b)
        wrong = wrong if wrong != right else write(a + b + 10)
        rows.append({"prompt": ask(a, b), "chosen": right, "rejected": wrong, "answer": a + b})
    return Dataset.from_list(rows)


def accuracy(prompts, completions, answer, **_):
    """1.0 if the completion is exactly the digits of the sum, else 0.0.

    Args: prompts (unused) and completions (lists of str); answer (list of int, the sums).
    Returns: list of float, one per completion.
    """
    return [float(completion.split() == write(right).split())
            for completion, right in zip(completions, answer)]


gold_reward = accuracy


def new_model():
    """An untrained Llama of 107,776 parameters and its tokenizer, which has one token for each
    digit and sign."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *"0123456789+="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,  # the usual 0.02 is too small for this width (see mini_tldr.py)
    )
    return LlamaForCausalLM(config), tokenizer


def main():
    for row, shown in zip(prompts("test").select(range(8)), demonstrations("test")):
        reward = accuracy(None, [shown["completion"]], answer=[row["answer"]])[0]
        print(f"{row['prompt']}   right {row['completion']:<8} demonstration "
              f"{shown['completion']:<8} reward {reward}")


if __name__ == "__main__":
    main()
