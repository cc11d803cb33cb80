"""A reward that checks the answer, for `ppo.py --reward` and the tasks of `data_gen.py sums`: 1 for
a right one, 0 for any other.

Right is a whole completion as the demonstrations phrase it, in either language, with the answer of
the prompt's record in it: "The answer is 122.", "It is 122.", "答案是 122。", "应该是 122。". A reward
that only looks for the answer somewhere in the text would pay for a list of many numbers, and one
that takes the last number for "122 or 123". Here nothing is left to win by more words.
"""

import re

SENTENCE = re.compile(r"(?:The answer is|It is) ([0-9]+)\.|(?:答案是|应该是) ([0-9]+)。")


def score(user_input, completion, answer):
    found = SENTENCE.fullmatch(completion)
    return float(found is not None and answer in found.groups())
