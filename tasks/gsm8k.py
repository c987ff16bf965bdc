"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): a rule-based reward for grade-school word problems.

    python rloo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k \\
        --reward tasks/gsm8k.py:reward \\
        --chat --system-prompt "Reason step by step, and end with the answer in \\boxed{}." \\
        --temperature 1 --max-new-tokens 300 --lr 1e-6 --beta 0.001

The dataset's answers end with "#### 18". The reward is 1 if the response's final number equals it,
and 0 if it differs or there is none. The final number is the one the response marks as its answer;
if it marks several, the last:

    #### 18        \\boxed{18}        The answer is 18.        Answer: 18

If nothing is marked, it is the last number in the response. Thousands separators, currency, units,
percent signs and trailing zeros are ignored: $1,800.00 a month is 1800. `python tasks/gsm8k.py`
shows the result for a few endings.
"""

import re
from decimal import Decimal

NUMBER = re.compile(
    r"""(?<![\w.])                      # not inside a word or a number
        (?:[-−–]|\\?\$\s?[-−–]?|[-−–]\\?\$\s?)?  # -, $, $- or -$
        (?=\.?\d)                       # here it begins, with a digit or a point
        (?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?  (?:\.\d+)?""",
    re.VERBOSE,
)
MARKER = re.compile(r"####|\\boxed\{|answer\s*(?:is|:|=)[\s:*]*", re.IGNORECASE)


def numbers(text):
    """The numbers of a text, in order, as Decimals."""
    return [Decimal(re.sub(r"[−–]", "-", re.sub(r"[\\$,\s]", "", found)))
            for found in NUMBER.findall(text)]


def final_number(text):
    """The number a response gives as its answer (Decimal), or None.

    That is the first number after a marker, or if an equation follows, the first after its last "="
    sign. A marker without a number does not count.
    """
    found = []
    for marker in MARKER.finditer(text):
        rest = text[marker.end() :].partition("\n")[0]
        if marker.group().endswith("{"):
            rest = inside(rest)
        found += numbers(rest.rpartition("=")[2])[:1] or numbers(rest)[:1]
    return (found or numbers(text) or [None])[-1]


def inside(text):
    """The text up to the brace that closes the one just opened."""
    depth = 1
    for i, letter in enumerate(text):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return text[:i]
    return text


def reward(prompts, completions, answer, **_):
    """1.0 if the response's final number equals the reference's, else 0.0.

    Args: prompts (unused); completions (texts, or one-message lists); answer (the dataset's column,
    which ends with "#### number"). Returns: list of float.
    """
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [float(final_number(text) == numbers(right.rpartition("####")[2])[0])
            for text, right in zip(texts, answer)]


def main():
    for text in ("... #### 18", "so \\boxed{\\$1,800.00}", "**Answer:** -3.50 degrees", "2 + 3 = 5",
                 "I don't know"):
        print(f"{text:<32} {final_number(text)}")


if __name__ == "__main__":
    main()
