"""What an unhealthy run looks like, reported in one line, with its likely cause and the option to
change."""

import json
import math

from tqdm import tqdm

from lib.distributed import WORLD
from lib.errors import stop


def check_finite(step, loss, grad_norm, path, records):
    """End the run of sft.py or train_rm.py before a step that is not finite is taken. `records`:
    the numbers of those in the batch."""
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        stop(f"{path}: the loss is {loss}, the gradient {grad_norm} at step {step}, on records "
             f"{sorted(records)}: look at these, or lower --lr", code=1)


def must_be_finite(value, name, folder):
    """End a run of ppo.py at a value that is not finite, the last good checkpoint left as it is."""
    if not math.isfinite(value):
        stop(f"{name} is {value}; what is saved in {folder} stays. Lower --lr or "
             "--critic_lr, or look at the score and the KL in metrics.csv", code=1)


class LossWatch:
    """Names the record behind a loss far above the usual one: mostly the data is wrong.

    `usual` and `spread`: running mean and mean absolute deviation of the batches' losses, kept over
    a --resume by `state`.
    """

    def __init__(self, path, usual=None, spread=None):
        self.path, self.usual, self.spread = path, usual, spread

    def state(self):
        return dict(usual=self.usual, spread=self.spread)

    def see(self, step, loss, worst):
        """`worst`: (loss per token, number) of the batch's worst record. The first 20 steps teach
        what is usual."""
        if step > 20 and loss > self.usual + 10 * self.spread:
            tqdm.write(f"warning: step {step}: loss {loss:.2f} where {self.usual:.2f} is usual; "
                       f"the worst is record {worst[1]} of {self.path} ({worst[0]:.2f})")
        if self.usual is None:
            self.usual, self.spread = loss, 0.1 * loss
        else:
            distance = abs(loss - self.usual)
            self.usual = 0.95 * self.usual + 0.05 * loss
            self.spread = 0.95 * self.spread + 0.05 * distance


def warn_of_labels(path, records, examples):
    """Report texts with different scores in one comparison: no model can learn both."""
    seen, twice = {}, []
    for *_, number in examples:
        record = records[number - 1]
        text = json.dumps([record.get(name) for name in ("user_input", "completion",
                                                         "comparison")])
        first = seen.setdefault(text, number)
        if records[first - 1]["score"] != record["score"]:
            twice.append(f"{first} and {number}")
    if twice:
        print(f"warning: {path}: {len(twice)} texts occur again with another score, as in records "
              f"{', '.join(twice[:3])}")


class RankingWatch:
    """Says after an epoch of ranking that the model cannot tell better from worse: its loss is
    still log 2, that of equal scores. Kept over a --resume by `state`."""

    def __init__(self, path, losses=0.0, steps=0, worst=(0.0, [])):
        self.path, self.losses, self.steps, self.worst = path, losses, steps, worst

    def state(self):
        return dict(losses=self.losses, steps=self.steps, worst=self.worst)

    def see(self, loss, records):
        self.losses, self.steps = self.losses + loss, self.steps + 1
        self.worst = max(self.worst, (loss, records), key=lambda pair: pair[0])

    def end_epoch(self, epoch):
        if (mean := self.losses / self.steps) > 0.98 * math.log(2):
            tqdm.write(f"warning: epoch {epoch}: the mean loss is {mean:.3f}, and log 2 = 0.693 is "
                       "that of equal scores: nothing is learned yet. Raise --lr, or check whether "
                       f"the scores of {self.path} say what is better: the loss was largest "
                       f"({self.worst[0]:.2f}) on the records "
                       f"{', '.join(map(str, self.worst[1][:8]))}")
        self.losses, self.steps, self.worst = 0.0, 0, (0.0, [])


# When a PPO run counts as unhealthy. In brackets the worst of the demo, which is healthy; other
# healthy runs may lie between the two.
KL_ERRORS = 5.0      # standard errors below 0 over 10 updates: under 1 run in 50 by chance
KL_A_TOKEN = 0.5     # nats [0.31]: a token, on average, 1.6 times as likely as for the SFT model
KL_A_RESPONSE = 5.0  # nats [2.9]: short responses, such as the demo's, may move further per token
CLIPPED = 0.3        # [0.05] only ratios that went too far where the advantage wants them count,
                     # about half of those out of range
ENTROPY_LEFT = 0.2   # share of the first entropy [0.8]: a better policy is surer, but not 5 times
CRITIC_YOUNG = 20    # updates (or half of a shorter run) in which a critic may be worse than a mean
ENDED = 0.5          # share of the responses [1.0]
GOLD_LOST = 0.05     # share of the best gold score; twice in a row, for once may be bad luck


def no_eos_score(row):
    """What the responses that were cut got in place of the reward model's score, in the mean; None
    if that is unknown: none was cut or none ended, or they got its score."""
    if not 0 < row["ended"] < 1:
        return None
    score = (row["score"] - row["ended"] * row["score_ended"]) / (1 - row["ended"])
    return score if abs(score - row["score_cut"]) > 0.01 else None


def unhealthy(rows, first, updates):
    """What looks wrong in a PPO run of so many `updates` -> {short name: likely cause, and the
    option to change}.

    `rows`: those of metrics.csv so far, dicts, the newest last; `first`: the SFT model's
    evaluation, {} if there is none.
    """
    row, wrong = rows[-1], {}

    def recent(name, n=10):  # mean of the last n updates, which says more than one
        values = [r[name] for r in rows[-n:]]
        return sum(values) / len(values)

    # 0: batches of 1, or no move yet
    kl_error = math.sqrt(sum(r["kl_error"] ** 2 for r in rows[-10:])) / len(rows[-10:])
    if kl_error and recent("kl") < -KL_ERRORS * kl_error - 1e-3:  # 1e-3: rounding
        wrong["negative KL"] = (
            f"the KL is {recent('kl'):.3f} +- {kl_error:.3f}, which no true KL is: the log "
            "probabilities are not those of the distribution that was sampled from; look at "
            "--temperature, and at what you changed in generation")
    if row["kl"] > max(KL_A_RESPONSE, KL_A_TOKEN * row["response_length"]):
        wrong["KL running away"] = (
            f"the KL is {row['kl']:.1f} nats per response: the policy leaves the SFT model behind; "
            "raise --kl_coef or lower --lr")
    if row.get("clip_fraction", 0) > CLIPPED:  # a fork may not clip
        wrong["clipping"] = (
            f"{row['clip_fraction']:.0%} of the tokens are clipped, so most ratios left the clip "
            "range: the steps are too large; lower --lr or --ppo_epochs")
    if row["entropy"] < ENTROPY_LEFT * rows[0]["entropy"]:
        wrong["entropy"] = (
            f"the entropy fell from {rows[0]['entropy']:.3f} to {row['entropy']:.3f} nats per "
            "token: the policy hardly explores any more; raise --kl_coef or --entropy_coef, or "
            "lower --lr")
    is_young = len(rows) <= min(CRITIC_YOUNG, updates / 2)
    # (a fork without a critic has no explained variance)
    if not is_young and "explained_variance" in row and recent("explained_variance") < 0:
        wrong["critic"] = (
            f"after {len(rows)} updates the critic explains less than the mean return would "
            f"(explained variance {recent('explained_variance'):.2f}): raise --critic_lr, or "
            "--batch_size")
    if len(rows) >= 5 and recent("ended", 5) < ENDED:
        wrong["cut responses"] = (
            f"{1 - recent('ended', 5):.0%} of the responses are cut at the limit: raise "
            "--max_new_tokens, or train the SFT model longer, until it ends its answers")
    both = [(no_eos_score(r), r["score_ended"]) for r in rows[-3:]]
    if len(both) == 3 and all(cut is not None and cut > ended for cut, ended in both):
        cut, ended = both[-1]
        wrong["cut responses win"] = (
            f"responses that ended score {ended:.2f}, those that were cut get {cut:.2f}: the "
            "policy learns not to end; lower --no_eos_score (the default suits reward models of "
            "train_rm.py)")
    judged = [r for r in [first, *rows] if "eval_gold" in r]
    if judged and judged[-1] is row:
        best = max(judged, key=lambda r: r["eval_gold"])
        enough = best["eval_gold"] - GOLD_LOST * max(1.0, abs(best["eval_gold"]))
        if all(r["eval_score"] > best["eval_score"] and r["eval_gold"] < enough
               for r in judged[-2:]):
            wrong["over-optimization"] = (
                "the reward model's score rises while the gold score falls, from "
                f"{best['eval_gold']:.2f} to {row['eval_gold']:.2f} (Gao et al. 2023): raise "
                "--kl_coef, stop here, or train the reward model on more data")
    return wrong


def warn(kept, updates):
    """Print each of these warnings once in a run, also over a --resume: those that were printed are
    in kept["warned"]."""
    for name, text in unhealthy(kept["history"], kept["first"], updates).items():
        if name not in kept["warned"]:
            kept["warned"][name] = f"update {len(kept['history'])}: {text}"
            tqdm.write(f"warning: {kept['warned'][name]}")


def attempt(update, evaluate, *given):
    """The samples and scores of `evaluate(*given)`, or none if a judge fails there: an evaluation
    teaches nothing, so the training goes on. (Not with many processes, which would wait for each
    other.)"""
    try:
        return evaluate(*given)
    except SystemExit:  # which has said why
        if WORLD > 1:
            raise
        tqdm.write(f"warning: update {update} is not evaluated; the training goes on")
        return [], {}


def show(update, kept, records, completions):
    """Print an evaluation beside that of the SFT model, and three of its answers."""
    if not kept["last"]:
        return  # no prompts are held out, or a judge failed
    tqdm.write(f"update {update}: " + ", ".join(
        f"{name.replace('eval_', 'held-out ')} {value:.3f} (SFT {kept['first'][name]:.3f})"
        for name, value in kept["last"].items()))
    for record, before, now in zip(records, kept["first_texts"], completions):
        asked = record["user_input"]
        asked = asked if isinstance(asked, str) else asked[-1]["content"]
        tqdm.write(f"    prompt  {asked[:100]!r}\n    SFT     {before[:100]!r}\n"
                   f"    now     {now[:100]!r}")


def in_short(row):
    """An update in the progress bar."""
    return (f"score {row['score']:.2f}, KL {row['kl']:.2f}, length {row['response_length']:.0f}, "
            f"{row['tokens_per_s']:.0f} tokens/s")


def summary(kept):
    """Print the result of a PPO run."""
    for name, value in kept["last"].items():
        print(f"{name.replace('eval_', 'held-out ')}: SFT {kept['first'][name]:.3f} -> PPO "
              f"{value:.3f}")
    print(f"KL to the SFT policy: {kept['history'][-1]['kl']:.2f} nats per response")
