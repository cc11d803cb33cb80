"""Stage 2: the reward model. LLaMA with a scalar head learns which completion people prefer.

    python train_rm.py                                        # the demo: on runs/sft and the built-in data
    python train_rm.py --model path/to/sft --data scored.json --eval_data scored_eval.json
    python train_rm.py --loss regression                      # learn the scores themselves
    torchrun --nproc_per_node=8 train_rm.py ...               # on 8 GPUs, which share one model

It starts from the SFT model, whose language-modelling head gives way to a linear map from the last hidden state to one
number, read at the last token of the completion. From the scores of the K completions of a prompt it learns either

    ranking     L = - mean over pairs (better, worse)  log sigmoid(r(better) - r(worse))     (InstructGPT, eq. 1)
    regression  L = mean  (r - score)^2                                                      (ChatLLaMA)

At the end the scores are shifted and scaled, in the weights of the head, so that the exported model alone gives scores with
mean 0 and deviation 1 on the demonstrations. (Ziegler et al. 2019 normalize so on samples of the policy; mean 0 on the
demonstrations is Stiennon et al. 2020 and InstructGPT, appendix C.2.)

Writes runs/rm: the model as a Hugging Face directory (LlamaForSequenceClassification), metrics.csv and curves.png.
"""

import argparse
import json
import math
import os
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import (Metrics, RANK, ScalarHead, Signals, WORLD, add_lora, autocast, clip_gradients, collate, common_options, draw_curves,
                   dry_run, encode_records, keep_export, length_batches, load_llama, load_tokenizer, lora_options, my_parts, open_run,
                   place, positive, read_records, restore, save_checkpoint, save_state, settings, start_processes, stop, total,
                   trainable)

DEMO = dict(model="runs/sft", data="data/reward_training_data.json", eval_data="data/reward_training_data_eval.json",
            demonstrations="data/actor_training_data.json", epochs=4, batch_size=4, micro_batch_size=4, lr=5e-4,
            max_length=256, eval_every=250)
# InstructGPT (appendix C.2) trains one epoch, since more overfit, with 64 prompts a batch and 9e-6 for its 6B model
DEFAULT = dict(epochs=1, batch_size=64, micro_batch_size=2, lr=9e-6, max_length=512, eval_every=50)


def parse(argv):
    parser = argparse.ArgumentParser(description="Stage 2: the reward model.")
    group = parser.add_argument_group("what goes in and out")
    group.add_argument("--model", help="the SFT model to start from, or any LLaMA (default: runs/sft)")
    group.add_argument("--tokenizer", help="where its tokenizer is (default: with the model)")
    group.add_argument("--data", help="scored completions: user_input, completion, score")
    group.add_argument("--eval_data", help="held-out scored completions")
    group.add_argument("--demonstrations", help="on which the scores get mean 0 and deviation 1: user_input, completion")
    group.add_argument("--out", default="runs/rm", help="run directory")
    group = parser.add_argument_group("training")
    group.add_argument("--loss", choices=["ranking", "regression"], default="ranking", help="what to learn from the scores")
    group.add_argument("--epochs", type=positive, help="passes over the prompts")
    group.add_argument("--batch_size", type=positive, help="prompts an optimizer step, each with all its completions")
    group.add_argument("--micro_batch_size", type=positive, help="prompts a forward pass: bounds the memory, changes nothing else")
    group.add_argument("--lr", type=float, help="peak learning rate of AdamW; falls to a tenth along a cosine")
    group.add_argument("--max_length", type=positive,
                       help="tokens per prompt with completion; a longer one loses the beginning of its prompt")
    group.add_argument("--eval_every", type=positive, help="optimizer steps between evaluations")
    lora_options(parser)
    common_options(parser)
    args = parser.parse_args(argv)
    if args.model and not (args.data and args.demonstrations) and not args.dry_run:
        parser.error("--model needs --data and --demonstrations: the built-in ones are for the demo")
    settings(args, DEFAULT if args.model else DEMO, "train_rm.py")
    if not os.path.isdir("runs/sft") and args.model == "runs/sft" and not args.dry_run:
        stop("runs/sft: missing; run python sft.py first, or name a --model")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The maths

def ranking_loss(scores, labels):
    """InstructGPT eq. 1 for the K completions of one prompt: the mean over all pairs with different labels of

        -log sigmoid(s_better - s_worse)

    `scores` (K,) of the model, `labels` (K,) of the human -> a scalar, in nats. Without such a pair it is 0.
    Each completion goes through the model once, and stands in up to K - 1 pairs.
    """
    better = labels[:, None] > labels[None, :]  # [i, j]: i is better than j
    if not better.any():
        return scores.sum() * 0.0
    return -F.logsigmoid(scores[:, None] - scores[None, :])[better].mean()


def regression_loss(scores, labels):
    """The mean over completions of (s - label)^2. `scores`, `labels` (K,) -> a scalar, in squared units of the labels."""
    return (scores - labels).square().mean()


def pair_statistics(scores, labels):
    """(accuracy, margin, label gap) of every pair with different labels, each (number of pairs,).

    accuracy: 1 if the model prefers the one with the higher label, 0.5 at equal scores; margin: s_better - s_worse.
    """
    i, j = (labels[:, None] > labels[None, :]).nonzero(as_tuple=True)
    margin = scores[i] - scores[j]
    return (margin.sign() + 1) / 2, margin, labels[i] - labels[j]


def constant_direction(hidden):
    """The direction v (d,) along which the hidden states (n, d) are as good as constant, v . h = 1:

        v = (H^T H / n + ridge I)^-1 mean(h)                                              (ridge regression of 1 on h)

    LlamaForSequenceClassification has no bias. Adding c v to its weights adds c to every score, as a bias would; float64.
    """
    hidden = hidden.double()
    gram = hidden.T @ hidden / len(hidden)
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge, hidden.mean(0))


# ---------------------------------------------------------------------------------------------------------------------
# Using the model

def last_token(hidden, is_completion):
    """Of `(B, L, ...)` what stands at the last completion token of each row: `(B, ...)`."""
    positions = torch.arange(is_completion.shape[1], device=hidden.device) * is_completion
    return hidden[torch.arange(len(hidden), device=hidden.device), positions.argmax(1)]


def score_examples(reward_model, examples, args, pad_token_id):
    """The model's scores of [(prompt, completion, ...)], and the hidden states (n, d) that the head reads."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]) + len(examples[i][1]))
    hidden = None  # (n, d); each process fills in its rows
    with torch.no_grad(), autocast(args):
        for rows, counts in my_parts(order, 4 * args.micro_batch_size):  # without gradients there is room for more
            input_ids, is_completion = collate([examples[i][0] for i in rows], [examples[i][1] for i in rows], pad_token_id, args.device)
            last = last_token(reward_model.model(input_ids, use_cache=False).last_hidden_state, is_completion)
            hidden = last.new_zeros(len(examples), last.shape[1]) if hidden is None else hidden
            hidden[rows] = counts * last
        hidden = total(hidden)
        return reward_model.read(hidden), hidden.float()


def group_by_prompt(records, examples):
    """[[index into `examples`, ...] of each prompt]: several records share a user_input."""
    groups = {}
    for i, (_, _, number) in enumerate(examples):
        groups.setdefault(json.dumps(records[number - 1]["user_input"], sort_keys=True), []).append(i)
    return list(groups.values())


def evaluate(reward_model, examples, groups, labels, args, pad_token_id):
    """Held-out statistics: pair accuracy, mean margin, root mean squared error, and the accuracy by label gap."""
    scores = score_examples(reward_model, examples, args, pad_token_id)[0].cpu()
    accuracy, margin, gap = (torch.cat(parts) for parts in zip(*(pair_statistics(scores[g], labels[g]) for g in groups)))
    edges = torch.linspace(0, 1, 5)[1:] * (gap.max() if len(gap) else 1)
    bins = torch.bucketize(gap, edges)
    by_gap = [(edges[b].item(), accuracy[bins == b].mean().item(), int((bins == b).sum())) for b in range(4) if (bins == b).any()]
    return accuracy.mean().item(), margin.mean().item(), (scores - labels).square().mean().sqrt().item(), by_gap


def main(argv=None):
    args = parse(argv)
    if args.dry_run:
        dry_run("rm", args.model, args)
    start_processes(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    reward_model = ScalarHead(load_llama(args.model, tokenizer).model)
    reward_model = place(add_lora(reward_model, args.lora_rank, args.lora_alpha, args.lora_targets, args.base_dtype), args)
    max_length = min(args.max_length, reward_model.config.max_position_embeddings)

    def read(path):
        records = read_records(path, "user_input", "completion", "score")
        examples = encode_records(records, tokenizer, max_length, path)
        groups = group_by_prompt(records, examples)
        labels = torch.tensor([float(records[number - 1]["score"]) for _, _, number in examples])
        useful = [g for g in groups if len(set(labels[g].tolist())) > 1]
        if not useful and (args.loss == "ranking" or path != args.data):
            stop(f"{path}: no prompt has two completions with different scores, so there is nothing to rank")
        if args.loss == "ranking" and len(useful) < len(groups):
            print(f"{path}: of {len(groups)} prompts, {len(groups) - len(useful)} left out: no two completions with different scores")
        return examples, useful if args.loss == "ranking" else groups, labels

    examples, groups, labels = read(args.data)
    held_out = read(args.eval_data) if args.eval_data else None
    demonstrations = encode_records(read_records(args.demonstrations, "user_input", "completion"), tokenizer, max_length,
                                    args.demonstrations)
    state = open_run(args.out, args)
    metrics = Metrics(args.out, ["step", "epoch", "loss", "accuracy", "eval_accuracy", "eval_margin", "eval_error", "lr", "grad_norm",
                                 "tokens_per_s"], state)

    optimizer = torch.optim.AdamW(trainable(reward_model), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=WORLD == 1)
    order = torch.Generator().manual_seed(args.seed)
    lengths = [sum(len(examples[i][0]) + len(examples[i][1]) for i in group) for group in groups]
    steps, step = args.epochs * -(-len(groups) // args.batch_size), 0
    loss_function = ranking_loss if args.loss == "ranking" else regression_loss
    saved = dict(models={"reward_model": reward_model}, optimizers={"optimizer": optimizer}, generators={})
    if state:
        restore(state, args.out, **saved)
        step = state["step"]
    signals, position = Signals(), 0
    bar = tqdm(total=steps, initial=step, desc="reward model", unit="step", dynamic_ncols=True, disable=RANK > 0)
    for epoch in range(1, args.epochs + 1):
        for batch in length_batches(lengths, args.batch_size, order):
            position += 1
            if position <= step:  # done before the interruption; the order is drawn again, and is the same
                continue
            started = time.perf_counter()
            lr = args.lr * min(1.0, (step + 1) / math.ceil(0.03 * steps)) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, correct = 0.0, torch.zeros(2)  # pairs that the model gets right, and all pairs
            for part, counts in my_parts(batch, args.micro_batch_size):
                parts = [groups[i] for i in part]
                rows = [i for part in parts for i in part]
                input_ids, is_completion = collate([examples[i][0] for i in rows], [examples[i][1] for i in rows],
                                                   tokenizer.pad_token_id, args.device)
                with autocast(args):
                    scores = last_token(reward_model(input_ids), is_completion)
                targets = labels[rows].to(scores.device)
                sizes = [len(part) for part in parts]
                # every prompt weighs the same, however many completions it has: the mean over the prompts of the batch
                micro_loss = sum(loss_function(s, t) for s, t in zip(scores.split(sizes), targets.split(sizes))) * counts / len(batch)
                micro_loss.backward()
                loss += micro_loss.item()
                for s, t in zip(scores.detach().split(sizes), targets.split(sizes)):
                    accuracy = pair_statistics(s, t)[0]
                    correct += counts * torch.tensor([accuracy.sum().item(), len(accuracy)])
            loss, correct = total(loss), total(correct)  # of all processes
            grad_norm = clip_gradients(reward_model, 1.0)
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                numbers = sorted(examples[i][2] for b in batch for i in groups[b])
                stop(f"{args.data}: the loss is {loss}, the gradient {grad_norm} at step {step + 1}, on records {numbers}: "
                     "look at these, or lower --lr", code=1)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            row = dict(step=step, epoch=epoch, loss=loss, accuracy=(correct[0] / correct[1]).item(), lr=lr, grad_norm=grad_norm,
                       tokens_per_s=sum(lengths[i] for i in batch) / (time.perf_counter() - started))
            if held_out and (step % args.eval_every == 0 or step == steps):
                row["eval_accuracy"], row["eval_margin"], row["eval_error"], by_gap = evaluate(
                    reward_model, *held_out, args, tokenizer.pad_token_id)
                tqdm.write(f"step {step}: held-out pair accuracy {row['eval_accuracy']:.3f}, margin {row['eval_margin']:.2f}"
                           + (f", error {row['eval_error']:.3f}" if args.loss == "regression" else ""))
            if args.loss == "ranking":
                row.pop("eval_error", None)  # a ranking model's scores have no scale to compare with the labels
            metrics.log(**row)
            bar.set_postfix_str(f"loss {loss:.3f}, accuracy {row['accuracy']:.2f}, lr {lr:.1e}, "
                                f"{row['tokens_per_s']:.0f} tokens/s", refresh=False)
            bar.update()
            signals.agree()
            if step % args.save_every == 0 or step == steps or signals.caught:
                save_state(args.out, args, metrics, **saved, step=step)
                if args.keep:
                    keep_export(reward_model, tokenizer, args.out, step, args.keep)
            if signals.caught:
                signals.leave(args.out)
    bar.close()
    signals.restore()

    # Normalize: r' = (r - mean) / deviation over the demonstrations, in the head's weights w: first w - mean v, where
    # v . h = 1 on everything that the model was trained to score, then the division.
    with torch.no_grad():
        scores, hidden = score_examples(reward_model, demonstrations, args, tokenizer.pad_token_id)
        v = constant_direction(torch.cat([hidden, score_examples(reward_model, examples, args, tokenizer.pad_token_id)[1]]))
        constant = hidden.double() @ v
        v = (v / constant.mean())
        weight = reward_model.score.weight
        mean, deviation = scores.double().mean(), (scores.double() - scores.double().mean() * (hidden.double() @ v)).std(unbiased=False)
        weight.copy_((weight.double() - mean * v) / deviation)
    scores = score_examples(reward_model, demonstrations, args, tokenizer.pad_token_id)[0]
    print(f"normalized: scores of the demonstrations had mean {mean:.3f} and deviation {deviation:.3f}, now {scores.mean():.3f} and "
          f"{scores.std(unbiased=False):.3f} (the shift is constant to {constant.std() / constant.mean() * mean.abs() / deviation:.1e})")
    if held_out:
        accuracy, margin, _, by_gap = evaluate(reward_model, *held_out, args, tokenizer.pad_token_id)
        print(f"held-out pair accuracy {accuracy:.3f}, mean margin of the normalized scores {margin:.2f}; "
              "by how far the labels of a pair lie apart:")
        for upto, gap_accuracy, pairs in by_gap:
            print(f"  up to {upto:.2f}: accuracy {gap_accuracy:.3f} of {pairs} pairs")
    save_checkpoint(reward_model, tokenizer, args.out)
    draw_curves(args.out, [(f"{args.loss} loss", {"train": "loss"}), ("pair accuracy", {"train": "accuracy", "held out": "eval_accuracy"}),
                           ("margin (chosen - rejected)", {"held out": "eval_margin"}), ("gradient norm", {"gradient norm": "grad_norm"})])
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
