"""What scores the responses of ppo.py in place of a reward model on the policy's tokens:

    python ppo.py --sft runs/sft --reward my_reward.py --prompts prompts.json
    python ppo.py --sft runs/sft --rm path/to/any/reward/model --prompts prompts.json

my_reward.py is a Python file with `score(user_input, completion)`, which gives a number, or
`scores(user_inputs, completions)`, which gives a list of them: for verifiable rewards, checks of
the format, a judge behind HTTP. What else the function names are fields of the prompt's record, as
in `score(user_input, completion, answer)`. A reward model may have a tokenizer and a chat template
of its own, and be of any architecture that transformers has, with one label: the texts go through
these.
"""

import inspect
import math
import numbers
import os
import runpy
import sys
import time
import traceback

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from lib.checkpoints import quiet
from lib.data import collate, encode_completion
from lib.distributed import RANK
from lib.errors import explain, first_line, stop
from lib.tokenizer import load_tokenizer


# ------------------------------------------------------------------------------------------------
# A function of the user's

class Judge:
    """The function of a Python file, `score` of one text or `scores` of many:

        judge(records, completions, ended) -> their scores, finite floats

    `records`: those of the prompts; `ended`: whether each response ended, or was cut. A parameter
    named `ended` gets that. Every other one beside user_input and completion is a field of the
    record, which may lack it if the parameter has a default. `**record` gets all fields that are
    left. `scores` gets a list of each. The first two parameters may have other names.
    """

    def __init__(self, option, path):
        """Ends the program with one line if there is no such function."""
        self.path, pair = path, ["user_input", "completion"]
        with explain(f"{option} {path}: not a Python file with a function score(user_input, "
                     "completion), or scores(user_inputs, completions)"):
            found = runpy.run_path(path)
            self.batched = callable(found.get("scores"))
            self.function = found["scores" if self.batched else "score"]
            if not callable(self.function):
                raise TypeError("score is not a function")
        if self.batched:
            pair = ["user_inputs", "completions"]
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):  # some of those written in C do not say
            parameters = inspect.signature(lambda *given: 0).parameters.values()
        kinds = {kind: [p for p in parameters if p.kind == kind] for kind in
                 (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)}
        any_number, self.takes_all = map(bool, kinds.values())
        named = {p.name: p for p in parameters if p not in sum(kinds.values(), [])}
        in_order = [p.name for p in named.values() if p.kind != inspect.Parameter.KEYWORD_ONLY]
        # the names of the parameters that get user_input and completion: these, wherever they
        # stand, or whatever stands first and second
        self.pair = [name if name in named else
                     in_order[i] if i < len(in_order) and in_order[i] not in pair else None
                     for i, name in enumerate(pair)]
        self.by_place = any_number and not in_order or self.pair == in_order[:2]
        if not self.by_place and self.pair[1] is None:
            stop(f"{option} {path}: {'scores' if self.batched else 'score'} has no parameter "
                 f"{pair[1]}")
        self.wants_ended = "ended" in named and "ended" not in self.pair
        self.fields = {name: p.default is p.empty for name, p in named.items()
                       if name not in (*self.pair, "ended")}  # whether it must be there

    def check(self, path, records):
        """Ends the program with one line if these records lack a field, or if it is not clear what
        a parameter is."""
        for number, record in enumerate(records, 1):
            where = f"{path}: record {number}"
            for field in (name for name, needed in self.fields.items() if needed):
                if field not in record:
                    stop(f"{where}: field '{field}' is missing, a parameter of {self.path}")
            for name, what in zip(self.pair, ("user_input", "completion")):
                if name in record and name != what:
                    stop(f"{where}: has a field '{name}', but in {self.path} the parameter of that "
                         f"name gets the {what}: rename one of them")
            if self.wants_ended and "ended" in record:
                stop(f"{where}: has a field 'ended', but in {self.path} the parameter of that name "
                     "says whether the response ended: rename the field")

    def ask(self, records, completions, ended):
        """What the function gives for these texts, a list; raises what it raises."""
        there = dict.fromkeys(name for record in records for name in record)
        names = [name for name in self.fields if name in there]
        if self.takes_all:
            names += [name for name in there if name not in (*names, *self.pair)]
        by_name = {name: [record.get(name) for record in records] for name in names}
        if self.wants_ended:
            by_name["ended"] = list(ended)
        texts = [[record["user_input"] for record in records], list(completions)]
        if not self.by_place:
            by_name |= {name: text for name, text in zip(self.pair, texts) if name}
            texts = []
        if self.batched:
            scores = self.function(*texts, **by_name)
            if isinstance(scores, (str, dict)) or not hasattr(scores, "__len__"):
                raise TypeError(f"scores gave {described(scores)}, not a list of numbers")
            if len(scores) != len(records):
                raise ValueError(f"{len(scores)} scores for {len(records)} texts")
            return list(scores)
        return [self.function(*(text[i] for text in texts),
                              **{name: values[i] for name, values in by_name.items()})
                for i in range(len(records))]

    def __call__(self, records, completions, ended):
        scores, texts = [], list(zip(records, completions, ended))
        for group in [texts] if self.batched else [[text] for text in texts]:
            asked = group[0][0]["user_input"]
            try:
                for (record, *_), score in zip(group, self.ask(*zip(*group))):
                    asked = record["user_input"]
                    scores.append(number(score))
            except Exception as error:
                lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                         if os.path.realpath(frame.filename) == os.path.realpath(self.path)]
                where = f"line {lines[-1]}: {type(error).__name__}: " if lines else ""
                stop(f"{self.path}: {where}{first_line(error)}, on a response to "
                     f"{str(asked)[:100]!r}; --resume continues from the last saved state", code=1)
        return scores


def described(value):
    """A value that is no score, in a few words."""
    if value is None or isinstance(value, (str, float)):
        return repr(value)[:100]
    return f"{repr(value)[:100]} ({type(value).__name__})"


def number(score):
    """A score as a float; one of numpy or torch is a number, too. Raises ValueError for anything
    else."""
    if getattr(score, "ndim", None) == 0:
        score = score.item()
    if not isinstance(score, numbers.Real) or not abs(score) <= sys.float_info.max:
        raise ValueError(f"the score is {described(score)}, which is not a finite number")
    return float(score)


# ------------------------------------------------------------------------------------------------
# What PPO asks

def judges(args, records, eval_records):
    """The functions --reward and --gold, None where there is none. Ends the program with one line
    if these records do not fit one of them."""
    found = [path and Judge(option, path)
             for option, path in (("--reward", args.reward), ("--gold", args.gold))]
    reward, gold = (judge or None for judge in found)
    if reward:
        reward.check(args.prompts, records)
    for judge in filter(None, (reward, gold)):
        judge.check(args.eval_prompts, eval_records)
    for number, record in enumerate(eval_records if gold else [], 1):
        with explain(f"{args.eval_prompts}: record {number}: {args.gold} cannot judge it",
                     "; without a judge: --gold ''"):
            gold.ask([record], [""], [True])
    return reward, gold


def of_texts(args, tokenizer, judge, load_scalar_head, last_token):
    """What --reward (`judge`) or --rm names, if it scores texts; None for a LLaMA on the policy's
    tokens. The critic cannot begin as what scores texts, and a line says so. The last two are
    functions of model.py, which lib does not import."""
    if judge:
        reward = TextReward(judge.path, tokenizer, judge)
    elif not (reward := other_model(args, tokenizer, load_scalar_head, last_token)):
        return None
    if vars(args).get("critic") == "rm":  # a fork may have no critic
        print(f"{reward.name} scores texts: the critic begins as the SFT model, with a new head")
    return reward


def other_model(args, tokenizer, load_scalar_head, last_token):
    """The reward model --rm, if its tokens are not the policy's."""
    with explain(f"{args.rm}: no reward model can be loaded from it"):
        is_llama = AutoConfig.from_pretrained(args.rm).model_type == "llama"
    if is_llama and load_tokenizer(args.rm).get_vocab() == tokenizer.get_vocab():
        return None
    return from_model(args.rm, tokenizer, args, load_scalar_head, last_token)


class TextReward:
    """Scores texts by `function(records, completions, ended)`. Responses come as tokens of the
    policy, whose `tokenizer` this is; `asked` says for which record a prompt stands: {id of the
    list of its tokens: record}. (Two records may have the same tokens, and other answers.)"""

    def __init__(self, name, tokenizer, function):
        self.name, self.tokenizer, self.function = name, tokenizer, function
        self.asked, self.seconds, self.began = {}, 0.0, time.perf_counter()

    def remember(self, prompts, records):
        self.asked |= {id(prompt): record for prompt, record in zip(prompts, records)}

    def scores(self, texts, ended):
        """[(prompt, response)] in tokens, and whether each ended -> their scores, a list. Of many
        processes rank 0 asks, and the others give zeros."""
        if RANK > 0:
            return [0.0] * len(texts)
        started = time.perf_counter()
        completions = [self.tokenizer.decode(response, skip_special_tokens=True).strip()
                       for _, response in texts]
        scores = self.function([self.asked[id(prompt)] for prompt, _ in texts], completions, ended)
        self.seconds += time.perf_counter() - started
        return scores


def share(reward):
    """Its share of the time so far, for the progress bar, if it is a `TextReward` and that is
    noticeable."""
    if not isinstance(reward, TextReward):
        return ""
    share = reward.seconds / (time.perf_counter() - reward.began)
    return f", reward {share:.0%} of the time" if share > 0.05 else ""


def from_model(path, tokenizer, args, load_scalar_head, last_token):
    """The reward of a model whose tokens are not the policy's: LLaMA as our own `ScalarHead`, any
    other as transformers has it."""
    with explain(f"{path}: no reward model can be loaded from it"):
        config = AutoConfig.from_pretrained(path)
    if config.model_type == "llama":
        theirs, model = load_tokenizer(path), load_scalar_head(path).to(args.device)
        longest = config.max_position_embeddings

        def score(asked, completions):
            examples = [encode_completion(theirs, *pair) for pair in zip(asked, completions)]
            examples = [(prompt[max(0, len(prompt) + len(completion) - longest):], completion)
                        for prompt, completion in examples]
            input_ids, places = collate(examples, theirs.pad_token_id, args.device)
            return last_token(model(input_ids), places)
    else:
        with explain(f"{path}: no reward model can be loaded from it"), quiet():
            theirs = AutoTokenizer.from_pretrained(path)
            model = AutoModelForSequenceClassification.from_pretrained(path).to(
                args.device).eval()
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
            return model(**batch.to(args.device)).logits[:, 0].float()

    model.requires_grad_(False)

    @torch.no_grad()
    def function(records, completions, ended):
        scores, asked = [], [record["user_input"] for record in records]
        for start in range(0, len(asked), args.micro_batch_size):
            part = slice(start, start + args.micro_batch_size)
            scores += score(asked[part], completions[part]).tolist()
        return scores

    return TextReward(path, tokenizer, function)


class RunningDeviation:
    """Divides scores by the standard deviation of all that came so far (Welford 1962), for
    --normalize_reward; leaves them alone if it is not `wanted`. `state` is what --resume
    needs."""

    def __init__(self, wanted=True, number=0, mean=0.0, squares=0.0):
        self.wanted, self.number, self.mean, self.squares = wanted, number, mean, squares

    def state(self):
        return dict(number=self.number, mean=self.mean, squares=self.squares)

    def __call__(self, scores):
        """`scores` (B,) -> (B,), divided by the deviation of all so far, these included; unchanged
        while that is 0."""
        for score in scores.tolist() if self.wanted else []:
            self.number += 1
            distance = score - self.mean
            self.mean += distance / self.number
            self.squares += distance * (score - self.mean)
        deviation = math.sqrt(self.squares / max(1, self.number))
        return scores / deviation if deviation > 0 else scores
