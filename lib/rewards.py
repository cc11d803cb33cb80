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

import math
import time

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from lib.data import collate
from lib.dialogue import (as_messages, cut_left, encode_completion, encode_dialogue,
                          in_template)
from lib.distributed import RANK, from_rank_0
from lib.errors import explain, quiet, stop
from lib.judge import Judge
from lib.tokenizer import load_tokenizer


@torch.random.fork_rng(devices=[])  # these files may draw random numbers when they are loaded
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
    for number, record in enumerate(eval_records if gold and RANK == 0 else [], 1):
        with explain(f"{args.eval_prompts}: record {number}: {args.gold} cannot judge it",
                     "; without a judge: --gold ''"):
            gold.ask([record], [""], [True])
    return reward, gold


def reward_of_texts(args, tokenizer, judge, load_scalar_head, last_token):
    """What --reward (`judge`) or --rm names, if it scores texts; None for a LLaMA on the policy's
    tokens, read at the end of an answer. The critic cannot begin as what scores texts, and a line
    says so. The last two are functions of model.py, which lib does not import."""
    if judge:
        reward = TextReward(judge.path, tokenizer, judge)
    elif not (reward := from_model(args.rm, tokenizer, args, load_scalar_head, last_token)):
        return None
    if vars(args).get("critic") == "rm":  # a fork may have no critic
        print(f"{reward.name} scores texts: the critic begins as the SFT model, with a new head")
    return reward


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
        """[(prompt, response)] in tokens, and whether each ended -> their scores, a list."""
        started = time.perf_counter()
        completions = [self.tokenizer.decode(response, skip_special_tokens=True).strip()
                       for _, response in texts]
        records = [self.asked[id(prompt)] for prompt, _ in texts]
        scores = from_rank_0(lambda: self.function(records, completions, ended), len(texts))
        self.seconds += time.perf_counter() - started
        return scores


def share_of_time(reward):
    """Its share of the time so far, for the progress bar, if it is a `TextReward` and that is
    noticeable."""
    if not isinstance(reward, TextReward):
        return ""
    share = reward.seconds / (time.perf_counter() - reward.began)
    return f", reward {share:.0%} of the time" if share > 0.05 else ""


def tokens_for(tokenizer, config, user_input, completion):
    """The tokens of a LLaMA reward model up to the one at which it is read. One of train_rm.py,
    whose `config` has a score_mean, is read at the token that ends the answer. One from elsewhere
    is read as in transformers, where the whole template is filled in: at the last token that is not
    config.pad_token_id."""
    if hasattr(config, "score_mean"):
        prompt, answer = encode_completion(tokenizer, user_input, completion)
        return prompt + answer
    said = [*as_messages(user_input), {"role": "assistant", "content": completion}]
    tokens, *_ = encode_dialogue(tokenizer, said)
    while tokens[-1] == config.pad_token_id:
        tokens.pop()
    return tokens


def from_model(path, tokenizer, args, load_scalar_head, last_token):
    """The reward of a model whose tokens or chat template are not the policy's, or which is read
    elsewhere than at the end of an answer; else None. LLaMA as our own `ScalarHead`, any other as
    transformers has it."""
    with explain(f"{path}: no reward model can be loaded from it"):
        config = AutoConfig.from_pretrained(path)
    alone = False  # a text at a time
    if config.model_type == "llama":
        theirs = load_tokenizer(path)
        if (most := max(theirs.get_vocab().values())) >= config.vocab_size:
            stop(f"{path}: its tokenizer has the token {most}, where its embedding has "
                 f"{config.vocab_size} rows: train it with --resize_embedding")
        same = (theirs.get_vocab(), theirs.chat_template) == (tokenizer.get_vocab(),
                                                              tokenizer.chat_template)
        prompt, answer = encode_completion(theirs, "a", "b")
        if same and tokens_for(theirs, config, "a", "b") == prompt + answer:
            return None
        model = load_scalar_head(path).to(args.device)
        longest = config.max_position_embeddings

        def score(asked, completions):
            examples = []
            for said, written in zip(asked, completions):
                tokens = tokens_for(theirs, config, said, written)
                examples.append(([], cut_left(theirs, said, tokens, longest)))
            input_ids, places = collate(examples, theirs.pad_token_id, args.device)
            return last_token(model(input_ids), places)
    else:
        with explain(f"{path}: no reward model can be loaded from it"), quiet():
            theirs = AutoTokenizer.from_pretrained(path)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=torch.float32, output_loading_info=True)
            model = model.to(args.device).eval()
            if model.config.num_labels != 1:
                raise ValueError(f"it has {model.config.num_labels} labels, not one")
            if lost := sorted(info["missing_keys"]):
                raise ValueError(f"{len(lost)} of its tensors are missing, such as {lost[0]}")
        if unused := sorted(info["unexpected_keys"]):
            print(f"{path}: {len(unused)} of its tensors are not used, such as {unused[0]}")
        alone = theirs.pad_token is None
        if not alone:  # so that the model finds the last token
            model.config.pad_token_id = theirs.pad_token_id
        theirs.truncation_side = "left"  # a long text loses its beginning, and not what counts
        # a tokenizer without a length states a huge one
        longest = min(theirs.model_max_length, getattr(config, "max_position_embeddings", 10**9))

        def score(asked, completions):
            if theirs.chat_template:
                texts = [in_template(theirs, [*as_messages(said), {"role": "assistant",
                                                                   "content": completion}])
                         for said, completion in zip(asked, completions)]
                batch = theirs(texts, add_special_tokens=False, padding=not alone, truncation=True,
                               max_length=longest, return_tensors="pt")
            else:  # as encoders are trained: two segments, question and answer
                texts = ["\n\n".join(message["content"] for message in as_messages(said))
                         for said in asked]
                batch = theirs(texts, completions, padding=not alone, truncation=True,
                               max_length=longest, return_tensors="pt")
            return model(**batch.to(args.device)).logits[:, 0].float()

    model.requires_grad_(False)

    @torch.no_grad()
    def function(records, completions, ended):
        scores, asked = [], [record["user_input"] for record in records]
        together = 1 if alone else args.micro_batch_size
        for start in range(0, len(asked), together):
            part = slice(start, start + together)
            with explain(f"{path}: cannot score responses, the first to "
                         f"{str(asked[start])[:100]!r}", code=1):
                scores += score(asked[part], completions[part]).tolist()
        return scores

    return TextReward(path, tokenizer, function)


class RunningDeviation:
    """The standard deviation of all scores so far (Welford 1962), by which --normalize_reward
    divides; 1 if it is not `wanted`. `state` is what --resume needs."""

    def __init__(self, wanted=True, number=0, mean=0.0, squares=0.0):
        self.wanted, self.number, self.mean, self.squares = wanted, number, mean, squares

    def state(self):
        return dict(number=self.number, mean=self.mean, squares=self.squares)

    def __call__(self, scores):
        """The deviation of all so far, these (B,) included; 1 while it is 0."""
        for score in scores.tolist() if self.wanted else []:
            self.number += 1
            distance = score - self.mean
            self.mean += distance / self.number
            self.squares += distance * (score - self.mean)
        deviation = math.sqrt(self.squares / max(1, self.number))
        return deviation if deviation > 0 else 1.0
