"""ROUGE-L against the dataset's completion column as a reward, or as the held-out one (Lin 2004,
section 3).

    python rloo.py --k 4 --reward tasks/rouge.py:rouge_l
    python rloo.py --k 4 --gold tasks/rouge.py:rouge_l
"""


def rouge_l(prompts, completions, completion, **columns):
    """F1 of the longest common subsequence of words of each completion and its reference text,
    between 0 and 1.

    Lower case, split at white space, no stemming; of a chat completion the last message counts. 0
    for an empty text.
    """
    scores = []
    for text, reference in zip(completions, completion):
        words = (text if isinstance(text, str) else text[-1]["content"]).lower().split()
        target = reference.lower().split()
        longest = [0] * (len(target) + 1)  # [j]: of the words so far and the target's first j
        for word in words:
            before = longest.copy()
            for j, other in enumerate(target, 1):
                longest[j] = before[j - 1] + 1 if word == other else max(before[j], longest[j - 1])
        scores.append(2 * longest[-1] / max(1, len(words) + len(target)))
    return scores
