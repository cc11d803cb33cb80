"""Stage 1: supervised fine-tuning. LLaMA learns to answer as the demonstrations do.

    python sft.py                                             # the demo: a tiny LLaMA from scratch on the built-in data
    python sft.py --model path/to/llama --data my.json --eval_data my_eval.json
    torchrun --nproc_per_node=8 sft.py --model ...            # the same on 8 GPUs, which share one model

Loss: the next-token cross entropy on the tokens of the completion and its end-of-sequence token, none on the prompt

    L(theta) = - 1/N  sum over all completion tokens  log pi_theta(y_t | x, y_<t)          (InstructGPT, section 3.5)

Writes runs/sft: the model as a Hugging Face directory, metrics.csv and curves.png.
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import (Metrics, RANK, Signals, WORLD, add_lora, autocast, clip_gradients, collate, common_options, draw_curves, dry_run,
                   encode_records, keep_export, largest, length_batches, load_llama, load_tokenizer, lora_options, my_parts, open_run,
                   place, positive, read_records, restore, save_checkpoint, save_state, settings, start_processes, stop, total,
                   trainable)

DEMO = dict(data="data/actor_training_data.json", eval_data="data/actor_training_data_eval.json", epochs=6, batch_size=32,
            micro_batch_size=32, lr=1e-3, weight_decay=0.1, max_length=256)
# A LLaMA that has read the internet needs a fiftieth of that learning rate: Alpaca's settings (Taori et al. 2023)
DEFAULT = dict(epochs=3, batch_size=128, micro_batch_size=8, lr=2e-5, weight_decay=0.0, max_length=512)


def parse(argv):
    parser = argparse.ArgumentParser(description="Stage 1: supervised fine-tuning.")
    group = parser.add_argument_group("what goes in and out")
    group.add_argument("--model", help="LLaMA to start from: a Hugging Face or Meta directory, a hub name, a .gguf file; none: the demo's")
    group.add_argument("--tokenizer", help="where its tokenizer is (default: with the model; the demo's: data/tokenizer)")
    group.add_argument("--data", help="demonstrations: user_input, completion")
    group.add_argument("--eval_data", help="held-out demonstrations, evaluated after each epoch")
    group.add_argument("--out", default="runs/sft", help="run directory")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive, help="passes over the demonstrations")
    group.add_argument("--batch_size", type=positive, help="demonstrations an optimizer step")
    group.add_argument("--micro_batch_size", type=positive, help="demonstrations a forward pass: bounds the memory, changes nothing else")
    group.add_argument("--lr", type=float, help="peak learning rate of AdamW")
    group.add_argument("--weight_decay", type=float, help="of AdamW")
    group.add_argument("--max_length", type=positive, help="tokens a demonstration; a longer one loses the beginning of its prompt")
    lora_options(parser)
    common_options(parser)
    args = parser.parse_args(argv)
    if args.model and not args.data and not args.dry_run:
        parser.error("--model needs --data: the built-in data is for the demo")
    return settings(args, DEFAULT if args.model else DEMO, "sft.py")


def lr_factor(step, steps):
    """Learning rate at optimizer step `step` of `steps`, as a share of the peak: linear warm-up over the first 3 % of the
    steps, then half a cosine down to 0 (Loshchilov and Hutter 2017, eq. 5)."""
    warmup = math.ceil(0.03 * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def completion_losses(model, input_ids, is_completion):
    """-log pi(token) of every completion token (N,), float32, row after row, from `collate`'s two (B, L).

    The hidden state at position t predicts token t + 1. Only those that predict a completion token go through the
    vocabulary projection, the largest matrix of a small LLaMA.
    """
    hidden = model.model(input_ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][is_completion[:, 1:]]).float()
    return F.cross_entropy(logits, input_ids[:, 1:][is_completion[:, 1:]], reduction="none")


def evaluate(model, examples, args, pad_token_id):
    """Mean loss a token over all completion tokens. (A mean of the batches' means would count short batches double.)"""
    loss, tokens = 0.0, 0
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]) + len(examples[i][1]))
    with torch.no_grad(), autocast(args):
        for part, counts in my_parts(order, args.micro_batch_size):
            prompts, completions, _ = zip(*(examples[i] for i in part))
            losses = completion_losses(model, *collate(prompts, completions, pad_token_id, args.device))
            loss, tokens = loss + counts * losses.sum().item(), tokens + counts * len(losses)
    return total(loss) / total(tokens)


def main(argv=None):
    args = parse(argv)
    if args.dry_run:
        dry_run("sft", args.model, args)
    start_processes(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.tokenizer or args.model or "data/tokenizer")
    llama = add_lora(load_llama(args.model, tokenizer), args.lora_rank, args.lora_alpha, args.lora_targets, args.base_dtype)
    model = place(llama, args)
    max_length = min(args.max_length, model.config.max_position_embeddings)
    train = encode_records(read_records(args.data, "user_input", "completion"), tokenizer, max_length, args.data)
    held_out = args.eval_data and encode_records(read_records(args.eval_data, "user_input", "completion"), tokenizer, max_length,
                                                 args.eval_data)
    state = open_run(args.out, args)
    metrics = Metrics(args.out, ["step", "epoch", "loss", "eval_loss", "lr", "grad_norm", "tokens_per_s"], state)

    optimizer = torch.optim.AdamW(trainable(model), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=WORLD == 1)
    order = torch.Generator().manual_seed(args.seed)  # its own stream, so that nothing else changes the order of the data
    lengths = [len(prompt) + len(completion) for prompt, completion, _ in train]
    steps = args.epochs * -(-len(train) // args.batch_size)
    step, usual, spread = 0, None, None  # what a batch's loss has been so far: running mean and mean absolute deviation
    saved = dict(models={"model": model}, optimizers={"optimizer": optimizer}, generators={})
    if state:
        restore(state, args.out, **saved)
        step, usual, spread = state["step"], state["usual"], state["spread"]
    signals, position = Signals(), 0
    bar = tqdm(total=steps, initial=step, desc="sft", unit="step", dynamic_ncols=True, disable=RANK > 0)
    for epoch in range(1, args.epochs + 1):
        for batch in length_batches(lengths, args.batch_size, order):
            position += 1
            if position <= step:  # done before the interruption; the order is drawn again, and is the same
                continue
            started = time.perf_counter()
            lr = args.lr * lr_factor(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # Every target token weighs the same, in whichever micro-batch it stands: divide by the tokens of the whole
            # batch. (Dividing each micro-batch by its own tokens makes those of short micro-batches weigh more.)
            tokens = sum(len(train[i][1]) for i in batch)
            loss, worst = 0.0, (-math.inf, None)
            for part, counts in my_parts(batch, args.micro_batch_size):
                prompts, completions, numbers = zip(*(train[i] for i in part))
                with autocast(args):
                    losses = completion_losses(model, *collate(prompts, completions, tokenizer.pad_token_id, args.device))
                (counts * losses.sum() / tokens).backward()
                loss += counts * losses.detach().sum().item() / tokens
                per_record = [record.mean().item() for record in losses.detach().split([len(c) for c in completions])]
                worst = max(worst, *zip(per_record, numbers))
            loss, worst = total(loss), largest(worst)  # of all processes
            if not math.isfinite(loss):
                stop(f"{args.data}: the loss is {loss} at step {step + 1}, on records {sorted(train[i][2] for i in batch)}: "
                     "look at these, or lower --lr", code=1)
            # 20 steps to know what is usual, then anything far above it deserves a look: it is mostly the data
            if step >= 20 and loss > usual + 10 * spread:
                tqdm.write(f"warning: step {step + 1}: loss {loss:.2f} where {usual:.2f} is usual; the worst is record "
                           f"{worst[1]} of {args.data} ({worst[0]:.2f})")
            usual, spread = (loss, 0.1 * loss) if usual is None else (0.95 * usual + 0.05 * loss, 0.95 * spread + 0.05 * abs(loss - usual))
            grad_norm = clip_gradients(model, 1.0)
            if not math.isfinite(grad_norm):
                stop(f"{args.data}: the gradient is {grad_norm} at step {step + 1}, on records {sorted(train[i][2] for i in batch)}: "
                     "look at these, or lower --lr", code=1)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            speed = sum(lengths[i] for i in batch) / (time.perf_counter() - started)
            last_of_epoch = step % (steps // args.epochs) == 0
            eval_loss = evaluate(model, held_out, args, tokenizer.pad_token_id) if held_out and last_of_epoch else None
            metrics.log(step=step, epoch=epoch, loss=loss, eval_loss=eval_loss, lr=lr, grad_norm=grad_norm, tokens_per_s=speed)
            bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {speed:.0f} tokens/s", refresh=False)
            bar.update()
            if eval_loss is not None:
                tqdm.write(f"epoch {epoch}: held-out loss {eval_loss:.4f} per token, perplexity {math.exp(eval_loss):.2f}")
            signals.agree()
            if step % args.save_every == 0 or step == steps or signals.caught:
                save_state(args.out, args, metrics, **saved, step=step, usual=usual, spread=spread)
                if args.keep:
                    keep_export(model, tokenizer, args.out, step, args.keep)
            if signals.caught:
                signals.leave(args.out)
    bar.close()
    signals.restore()
    save_checkpoint(model, tokenizer, args.out)
    draw_curves(args.out, [("cross entropy (nats per token)", {"train": "loss", "held out": "eval_loss"}), ("learning rate", {"lr": "lr"}),
                           ("gradient norm", {"gradient norm": "grad_norm"}), ("tokens a second", {"tokens/s": "tokens_per_s"})])
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
