"""Stage 2: the reward model. LLaMA with a scalar head learns which completion people prefer.

    python train_rm.py                           # the demo: on runs/sft and the built-in data
    python train_rm.py --model path/to/sft --data scored.json --eval_data scored_eval.json
    python train_rm.py --loss regression         # learn the scores themselves
    torchrun --nproc_per_node=8 train_rm.py ...  # on 8 GPUs, which share one model

It starts from the SFT model, whose language-modelling head gives way to a linear map from the last
hidden state to one number, read at the last token of the completion. From the scores of the K
completions of a prompt it learns either

    ranking     L = - mean over pairs (better, worse)  log sigmoid(r(better) - r(worse))
    regression  L = mean of (r - score)^2

(InstructGPT, eq. 1; ChatLLaMA); the loss of a batch is the mean over its prompts. At the end the
scores are normalized to mean 0 (Stiennon et al. 2020; InstructGPT, C.2) and standard deviation 1
(Ziegler et al. 2019, on samples) on the demonstrations. The mean that `ScalarHead` subtracts is
`score_mean` in config.json; transformers does not subtract it.

Writes runs/rm: a Hugging Face directory (LlamaForSequenceClassification), metrics.csv, curves.png.
"""

import os
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib.data import collate, encode_records, length_batches, on, read_records, text_lengths
from lib.distributed import (RANK, WORLD, clip_gradients, gather_rows, micro_batches, release,
                             start_processes, to_device, total)
from lib.errors import clean_exit, stop
from lib.health import RankingWatch, check_finite
from lib.lora import add_lora, trainable
from lib.memory import micro_batch
from lib.run import Run
from lib.scored import read_scored, with_pairs
from lib.settings import parse, whole
from lib.training import autocast, set_lr
from model import ScalarHead, last_token, load_llama, load_tokenizer, save_checkpoint

# The demo's values, and those of a pretrained LLaMA: InstructGPT (C.2) trains its 6B model for one
# epoch, since more overfit, with 64 prompts per batch and 9e-6.
SETTINGS = [
    # name                demo      real    what it is
    "input and output",
    ("model",             "runs/sft", None, "the SFT model to start from, or any LLaMA"),
    ("tokenizer",         None,     None,   "where its tokenizer is, if not with the model"),
    ("resize_embedding",  False,    False,  "add rows for tokens that the model's embedding lacks"),
    ("data",              "data/reward_training_data.json", None, "scored completions"),
    ("eval_data",         "data/reward_training_data_eval.json", None, "held-out completions"),
    ("demonstrations",    "data/actor_training_data.json", None,
     "on which the scores get mean 0 and standard deviation 1"),
    ("out",               "runs/rm", "runs/rm", "run directory"),
    "training",
    ("loss",              "ranking", "ranking", "what to learn", ["ranking", "regression"]),
    ("epochs",            3,        1,      "passes over the prompts"),
    ("batch_size",        4,        64,     "prompts per optimizer step, with all completions"),
    ("micro_batch_size",  4,        0,      "prompts per forward pass, more if their texts are "
                                            "short: only bounds the memory. 0: 2 on a CPU, on a "
                                            "GPU as many as fit", whole),
    ("lr",                5e-4,     9e-6,   "peak of AdamW's learning rate; warm-up, then a cosine "
                                            "to a tenth"),
    ("max_length",        256,      512,    "tokens per text; a longer one loses the beginning of "
                                            "its prompt"),
    ("eval_every",        250,      50,     "optimizer steps between evaluations"),
]

# The columns of metrics.csv, and the panels and labels of curves.png
METRICS = [
    # column           what it is                                           panel, label
    ("step",           "optimizer steps, counted from 1"),
    ("epoch",          "passes over the data, counted from 1"),
    ("loss",           "--loss, of the batch", "loss", "train"),
    ("accuracy",       "share of the pairs in the right order", "pair accuracy", "train"),
    ("eval_accuracy",  "of held-out pairs", "pair accuracy", "held out"),
    ("eval_margin",    "mean of better - worse", "margin (better - worse)", "held out"),
    ("eval_error",     "root mean squared, of --loss regression"),
    ("lr",             "learning rate"),
    ("grad_norm",      "length before it is clipped to 1", "gradient norm", "gradient norm"),
    ("tokens_per_s",   "of prompts and completions"),
]


# ------------------------------------------------------------------------------------------------
# The maths

def pairs(labels):
    """The indices (better, worse) of all pairs with different `labels` (K,), each (number of
    pairs,). Labels are kept on the CPU, so that counting pairs need not wait for a GPU."""
    return (labels[:, None] > labels[None, :]).nonzero(as_tuple=True)


def ranking_loss(scores, labels):
    """InstructGPT eq. 1 for the K completions of one prompt: the mean over all pairs with different
    labels of

        -log sigmoid(s_better - s_worse)

    `scores` (K,) of the model, `labels` (K,) of people -> a scalar, nats; 0 without such a pair.
    Each completion goes through the model once, and occurs in up to K - 1 pairs.
    """
    better, worse = (on(scores.device, rows) for rows in pairs(labels))
    return -F.logsigmoid(scores[better] - scores[worse]).sum() / max(1, len(better))


def regression_loss(scores, labels):
    """The mean over completions of (s - label)^2. `scores`, `labels` (K,) -> a scalar."""
    return (scores - on(scores.device, labels.float())).square().mean()


def pair_statistics(scores, labels):
    """(accuracy, margin, label gap) of every pair with different labels, each (number of pairs,).

    accuracy: 1 if the model prefers the one with the higher label, 0.5 at equal scores; margin:
    s_better - s_worse.
    """
    better, worse = pairs(labels)
    margin = scores[on(scores.device, better)] - scores[on(scores.device, worse)]
    return (margin.sign() + 1) / 2, margin, labels[better] - labels[worse]


def normalize_(reward_model, scores):
    """Make the model give (r - mean) / deviation, with mean and standard deviation of its raw
    `scores` (n,) on the demonstrations -> mean, deviation. The weights of the head are divided by
    the deviation; the mean, divided too, is `config.score_mean`, since Hugging Face's
    classification head has no bias."""
    mean, deviation = scores.mean().item(), scores.std(unbiased=False).item()
    if not deviation > 0:
        stop(f"the demonstrations all have the score {mean}, so their standard deviation cannot be "
             "made 1: the reward model has learned nothing", code=1)
    release(reward_model)  # what FSDP has gathered
    with torch.no_grad():
        reward_model.score.weight /= deviation
    reward_model.config.score_mean = (reward_model.config.score_mean + mean) / deviation
    return mean, deviation


# ------------------------------------------------------------------------------------------------
# Reading, scoring, learning

PASSES = 4  # in which the texts of a micro-batch are read


def score_texts(reward_model, examples, args, pad_token_id):
    """The model's scores (n,) of [(prompt, completion, ...)]."""
    def read(rows):
        input_ids, places = collate([examples[i] for i in rows], pad_token_id, args.device)
        return [last_token(reward_model(input_ids), places)]

    # micro_batch_size counts prompts, taken as 4 texts each
    parts = micro_batches(range(len(examples)), text_lengths(examples), 4 * args.micro_batch_size)
    parts = tqdm(parts, "scoring", leave=False, disable=RANK > 0)  # it can take minutes
    with torch.no_grad(), autocast(args):
        return gather_rows(read, parts, len(examples))[0]


def compare(scores, groups, labels):
    """`pair_statistics` of the pairs in all groups, each a list of indices into `scores` and
    `labels` (n,)."""
    found = [pair_statistics(scores[group], labels[group]) for group in with_pairs(groups, labels)]
    return map(torch.cat, zip(*found))


def evaluate(reward_model, examples, groups, labels, args, pad_token_id):
    """Held-out pair accuracy, mean margin, root mean squared error, and the accuracy by label gap:
    [(upper end of the gap, accuracy, number of pairs)]."""
    scores = score_texts(reward_model, examples, args, pad_token_id).cpu()
    accuracy, margin, gap = compare(scores, groups, labels)
    edges = torch.linspace(0, 1, 5, dtype=gap.dtype)[1:] * (gap.max() if len(gap) else 1)
    bins = torch.bucketize(gap, edges)
    by_gap = [(edges[b].item(), accuracy[bins == b].mean().item(), int((bins == b).sum()))
              for b in range(4) if (bins == b).any()]
    error = (scores - labels).square().mean().sqrt().item()
    return accuracy.mean().item(), margin.mean().item(), error, by_gap


def scores_of(reward_model, texts, args, pad_token_id):
    """The model's scores (n,) of texts, in several passes, the shortest texts first. Completions of
    one prompt differ in length: in a single pass a third of all tokens or more would be padding."""
    lengths, n = text_lengths(texts), len(texts)
    order = sorted(range(n), key=lambda i: lengths[i])
    scores = torch.zeros(n, device=args.device)
    for k in range(PASSES):
        rows = order[k * n // PASSES:(k + 1) * n // PASSES]
        if not rows and WORLD > 1:
            rows = order[:1]  # of many processes each makes as many passes
        if rows:
            input_ids, places = collate([texts[i] for i in rows], pad_token_id, args.device)
            with autocast(args):
                scores[on(args.device, rows)] = last_token(reward_model(input_ids), places)
    return scores


def backward(reward_model, parts, prompts, examples, labels, args, pad_token_id):
    """Add the gradient of --loss on a batch. `parts`: its micro-batches [(part, weight)], in which
    a prompt is the list of the indices of its completions; `prompts`: how many the batch has -> the
    loss, and the scores of all `examples` (n,), 0 for those outside the batch. Both stay on the
    device: asking a GPU for a number waits until it is done."""
    loss_function = ranking_loss if args.loss == "ranking" else regression_loss
    loss, all_scores = 0.0, torch.zeros(len(labels), device=args.device)
    for part, weight in parts:
        rows, sizes = sum(part, []), [len(group) for group in part]
        scores = scores_of(reward_model, [examples[i] for i in rows], args, pad_token_id)
        by_prompt = list(zip(scores.split(sizes), labels[rows].split(sizes)))
        # the mean over the prompts of the batch: each weighs the same, however many completions
        micro_loss = sum(loss_function(s, t) for s, t in by_prompt) * weight / prompts
        micro_loss.backward()
        loss += micro_loss.detach()
        all_scores[on(args.device, rows)] += weight * scores.detach()
    return loss, all_scores


# ------------------------------------------------------------------------------------------------
# The run

@clean_exit
def main(argv=None):
    args, _ = parse("train_rm.py", __doc__, SETTINGS, argv, real_if=["model"])
    if not (args.data and args.demonstrations):
        stop("--model needs --data and --demonstrations: the built-in ones are for the demo")
    if args.model == "runs/sft" and not os.path.isdir("runs/sft"):
        stop("runs/sft: missing; run python sft.py first, or name a --model")
    start_processes(args)
    torch.manual_seed(args.seed)
    run = Run(args, "reward model", SETTINGS, METRICS)
    tokenizer = load_tokenizer(args.tokenizer or args.model, args.model)
    reward_model = ScalarHead(load_llama(args.model, tokenizer, resize=args.resize_embedding).model)
    reward_model = to_device(add_lora(reward_model, args), args)
    max_length = min(args.max_length, reward_model.config.max_position_embeddings)

    given = tokenizer, max_length, args.loss == "ranking"
    examples, groups, labels = read_scored(args.data, *given)
    held_out = read_scored(args.eval_data, *given) if args.eval_data else None
    demonstrations = encode_records(read_records(args.demonstrations, "user_input", "completion"),
                                    tokenizer, max_length, args.demonstrations)
    if all(text[:2] == demonstrations[0][:2] for text in demonstrations):
        stop(f"{args.demonstrations}: all demonstrations are the same; at least two different ones "
             "are needed to scale the scores")
    optimizer = torch.optim.AdamW(trainable(reward_model), lr=args.lr, betas=(0.9, 0.95),
                                  weight_decay=0.01, fused=True)
    tokens = text_lengths(examples)
    lengths = [sum(tokens[i] for i in group) for group in groups]
    order = torch.Generator().manual_seed(args.seed)
    batches = [batch for _ in range(args.epochs)
               for batch in length_batches(lengths, args.batch_size, order)]
    steps, steps_per_epoch = len(batches), len(batches) // args.epochs
    trained = {"reward_model": (reward_model, optimizer)}
    args.micro_batch_size = micro_batch("rm", trained, args, run.state, max(map(len, groups)))
    kept = run.begin(steps, trained, {}, dict(watch={}))
    watch = RankingWatch(args.data, **kept["watch"])

    for step, batch in list(enumerate(batches, 1))[run.step:]:
        started = time.perf_counter()
        lr = set_lr(optimizer, args.lr, step - 1, steps, floor=0.1)
        parts = [([groups[g] for g in part], weight)
                 for part, weight in micro_batches(batch, lengths, args.micro_batch_size)]
        loss, scores = backward(reward_model, parts, len(batch), examples, labels, args,
                                tokenizer.pad_token_id)
        grad_norm = clip_gradients(reward_model, 1.0)
        found = torch.cat([torch.stack([loss, grad_norm]), scores]).cpu()  # the only wait
        loss, grad_norm = found[:2].tolist()
        loss, scores = total(loss), total(found[2:])  # of all processes
        accuracy, *_ = compare(scores, [groups[g] for g in batch], labels)
        records = [examples[i][2] for g in batch for i in groups[g]]
        check_finite(step, loss, grad_norm, args.data, records)
        watch.see(loss, records)
        optimizer.step()
        optimizer.zero_grad()

        row = dict(step=step, epoch=(step - 1) // steps_per_epoch + 1, loss=loss, lr=lr,
                   accuracy=accuracy.mean().item() if len(accuracy) else None, grad_norm=grad_norm,
                   tokens_per_s=sum(lengths[g] for g in batch) / (time.perf_counter() - started))
        if held_out and (step % args.eval_every == 0 or step == steps):
            row["eval_accuracy"], row["eval_margin"], error, _ = evaluate(
                reward_model, *held_out, args, tokenizer.pad_token_id)
            if args.loss == "regression":  # a ranking model's scores have no scale to compare
                row["eval_error"] = error
            tqdm.write(f"step {step}: held out: " + ", ".join(
                f"{name.removeprefix('eval_')} {row[name]:.3f}" for name in row if "eval" in name))
        if step % steps_per_epoch == 0 and args.loss == "ranking":
            watch.end_epoch(row["epoch"])
        run.log(**row)
        kept["watch"] = watch.state()
        run.end_step(f"loss {loss:.3f}, lr {lr:.1e}, {row['tokens_per_s']:.0f} tokens/s",
                     lambda folder: save_checkpoint(reward_model, tokenizer, folder))

    mean, deviation = normalize_(reward_model, score_texts(
        reward_model, demonstrations, args, tokenizer.pad_token_id))
    print(f"normalized: on the demonstrations, mean {mean:.3f} and standard deviation "
          f"{deviation:.3f} became 0 and 1")
    if held_out:
        accuracy, margin, _, by_gap = evaluate(reward_model, *held_out, args,
                                               tokenizer.pad_token_id)
        print(f"held-out pair accuracy {accuracy:.3f}, mean margin of the normalized scores "
              f"{margin:.2f}; by label gap:")
        for upto, gap_accuracy, number in by_gap:
            print(f"  up to {upto:.2f}: accuracy {gap_accuracy:.3f} of {number} pairs")
    save_checkpoint(reward_model, tokenizer, args.out)
    run.finish()


if __name__ == "__main__":
    main()
