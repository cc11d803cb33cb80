"""What scores the responses of ppo.py in place of a reward model on its own tokens:

    python ppo.py --sft runs/sft --reward my_reward.py --prompts prompts.json
    python ppo.py --sft runs/sft --rm path/to/any/reward/model --prompts prompts.json

my_reward.py is a Python file with `score(user_input, completion)`, which gives a number, or
`scores(user_inputs, completions)`, which gives a list of them: for verifiable rewards, checks of
the format, a judge behind HTTP. A reward model may have a tokenizer and a chat template of its own,
and be of any architecture that transformers has, with one label: the texts go through these.
"""

import math
import os
import runpy
import time
import traceback

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from lib.checkpoints import quiet
from lib.data import collate, encode_completion
from lib.distributed import RANK
from lib.errors import explain, first_line, stop
from model import last_token, load_scalar_head, load_tokenizer


def of_texts(args, tokenizer):
    """What --reward or --rm names, if it scores texts; None for a LLaMA on the policy's tokens. The
    critic cannot begin as what scores texts: that is said."""
    if args.reward:
        reward = from_file(args.reward, tokenizer)
    elif not (reward := other_model(args, tokenizer)):
        return None
    if args.critic == "rm":
        print(f"{reward.name} scores texts: the critic begins as the SFT model, with a new head")
    return reward


def other_model(args, tokenizer):
    """The reward model --rm, if its tokens are not the policy's."""
    with explain(f"{args.rm}: no reward model can be loaded from it"):
        is_llama = AutoConfig.from_pretrained(args.rm).model_type == "llama"
    if is_llama and load_tokenizer(args.rm).get_vocab() == tokenizer.get_vocab():
        return None
    return from_model(args.rm, tokenizer, args.device, args.micro_batch_size)


class TextReward:
    """Scores texts by `function(user_inputs, completions)`. Responses come as tokens of the policy,
    whose `tokenizer` this is; `asked` says what the user said: {tokens of a prompt: user_input}."""

    def __init__(self, name, tokenizer, function):
        self.name, self.tokenizer, self.function = name, tokenizer, function
        self.asked, self.seconds, self.began = {}, 0.0, time.perf_counter()

    def remember(self, prompts, records):
        self.asked |= {tuple(prompt): record["user_input"]
                       for prompt, record in zip(prompts, records)}

    def scores(self, texts):
        """[(prompt, response)] in tokens -> their scores, a list. Of many processes the first asks,
        and the others add zeros. Ends the program if a score is not a finite number."""
        if RANK > 0:
            return [0.0] * len(texts)
        started = time.perf_counter()
        asked = [self.asked[tuple(prompt)] for prompt, _ in texts]
        completions = [self.tokenizer.decode(response, skip_special_tokens=True).strip()
                       for _, response in texts]
        scores = list(self.function(asked, completions))
        if len(scores) != len(texts):
            stop(f"{self.name}: {len(scores)} scores for {len(texts)} texts", code=1)
        for user_input, score in zip(asked, scores):
            if not isinstance(score, (int, float)) or not math.isfinite(score):
                stop(f"{self.name}: the score of a response to {str(user_input)[:100]!r} is "
                     f"{score!r}, which is not a finite number; --resume continues from the last "
                     "saved state", code=1)
        self.seconds += time.perf_counter() - started
        return [float(score) for score in scores]


    def share(self):
        """Its share of the time so far, for the progress bar, where it is noticeable."""
        share = self.seconds / (time.perf_counter() - self.began)
        return f", reward {share:.0%} of the time" if share > 0.05 else ""


def from_file(path, tokenizer):
    """The reward of a Python file."""
    with explain(f"--reward {path}: not a Python file with score(user_input, completion) or "
                 "scores(user_inputs, completions)"):
        found = runpy.run_path(path)
        batched, single = found.get("scores"), found.get("score")
        if not callable(batched or single):
            raise TypeError("it has neither function")

    def call(function, user_input, *given):
        try:
            return function(*given)
        except Exception as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                     if os.path.realpath(frame.filename) == os.path.realpath(path)]
            stop(f"{path}: line {lines[-1] if lines else '?'}: {type(error).__name__}: "
                 f"{first_line(error)}, on a response to {str(user_input)[:100]!r}; --resume goes "
                 "on from the last saved state", code=1)

    def function(asked, completions):
        if batched:
            return call(batched, asked[0], asked, completions)
        return [call(single, user_input, user_input, completion)
                for user_input, completion in zip(asked, completions)]

    return TextReward(path, tokenizer, function)


def from_model(path, tokenizer, device, batch_size):
    """The reward of a model whose tokens are not the policy's: LLaMA as our own `ScalarHead`, any
    other as transformers has it."""
    with explain(f"{path}: no reward model can be loaded from it"):
        config = AutoConfig.from_pretrained(path)
    if config.model_type == "llama":
        theirs, model = load_tokenizer(path), load_scalar_head(path).to(device)
        longest = config.max_position_embeddings

        def score(asked, completions):
            examples = [encode_completion(theirs, *pair) for pair in zip(asked, completions)]
            examples = [(prompt[max(0, len(prompt) + len(completion) - longest):], completion)
                        for prompt, completion in examples]
            input_ids, places = collate(examples, theirs.pad_token_id, device)
            return last_token(model(input_ids), places)
    else:
        with explain(f"{path}: no reward model can be loaded from it"), quiet():
            theirs = AutoTokenizer.from_pretrained(path)
            model = AutoModelForSequenceClassification.from_pretrained(path).to(device).eval()
            if model.config.num_labels != 1:
                raise ValueError(f"it has {model.config.num_labels} labels, not one")
        # a tokenizer without a length states a huge one
        longest = min(theirs.model_max_length, getattr(config, "max_position_embeddings", 10**9))

        def score(asked, completions):
            if theirs.chat_template:
                texts = [theirs.apply_chat_template(
                    [*([{"role": "user", "content": said}] if isinstance(said, str) else said),
                     {"role": "assistant", "content": completion}], tokenize=False)
                    for said, completion in zip(asked, completions)]
                batch = theirs(texts, add_special_tokens=False, padding=True, truncation=True,
                               max_length=longest, return_tensors="pt")
            else:  # as encoders are trained: two segments, question and answer
                texts = [said if isinstance(said, str) else said[-1]["content"] for said in asked]
                batch = theirs(texts, completions, padding=True, truncation=True,
                               max_length=longest, return_tensors="pt")
            return model(**batch.to(device)).logits[:, 0].float()

    model.requires_grad_(False)

    @torch.no_grad()
    def function(asked, completions):
        scores = []
        for start in range(0, len(asked), batch_size):
            part = slice(start, start + batch_size)
            scores += score(asked[part], completions[part]).tolist()
        return scores

    return TextReward(path, tokenizer, function)


class RunningDeviation:
    """Divides scores by the standard deviation of all that came so far (Welford 1962), for
    --normalize_reward. `state` is what --resume needs."""

    def __init__(self, number=0, mean=0.0, squares=0.0):
        self.number, self.mean, self.squares = number, mean, squares

    def state(self):
        return dict(number=self.number, mean=self.mean, squares=self.squares)

    def __call__(self, scores):
        """`scores` (B,) -> (B,) over that deviation, in which they count; unchanged while it is
        0."""
        for score in scores.tolist():
            self.number += 1
            distance = score - self.mean
            self.mean += distance / self.number
            self.squares += distance * (score - self.mean)
        deviation = math.sqrt(self.squares / self.number)
        return scores / deviation if deviation > 0 else scores
