"""Stage 1: supervised fine-tuning. LLaMA learns to answer as the demonstrations do.

    python sft.py                # the demo: a tiny LLaMA from scratch on the built-in data
    python sft.py --model path/to/llama --data my.json --eval_data my_eval.json
    torchrun --nproc_per_node=8 sft.py --model ...         # on 8 GPUs, which share one model

Loss: the next-token cross entropy of the completion and its end-of-sequence token, not of the
prompt

    L(theta) = - 1/N  sum over all completion tokens  log pi_theta(y_t | x, y_<t)

(InstructGPT, section 3.5). Texts are not packed: each is a row of its own, padded on the right.

Writes runs/sft: the model as a Hugging Face directory, metrics.csv and curves.png.
"""

import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib.data import collate, encode_records, length_batches, read_records, text_lengths
from lib.distributed import (clip_gradients, largest, micro_batches, start_processes, to_device,
                             total)
from lib.errors import clean_exit, stop
from lib.health import LossWatch, check_finite
from lib.lora import add_lora, trainable
from lib.memory import PIECE, micro_batch
from lib.run import Run
from lib.settings import parse, whole
from lib.training import autocast, set_lr
from model import load_llama, load_tokenizer, save_checkpoint, states_of, tokens_of

# The demo's values, and those of a pretrained LLaMA: Alpaca's (Taori et al. 2023). A
# pretrained model needs 1/50 of the learning rate of one from scratch.
SETTINGS = [
    # name                demo    real    what it is
    "input and output",
    ("model",             None,   None,   "LLaMA to start from: a Hugging Face or Meta directory, "
                                          "a hub name, a .gguf file; none: from scratch"),
    ("tokenizer",         "data/tokenizer", None, "where its tokenizer is, if not with the model"),
    ("resize_embedding",  False,  False,  "add rows for tokens that the model's embedding lacks"),
    ("data",              "data/actor_training_data.json", None, "demonstrations"),
    ("eval_data",         "data/actor_training_data_eval.json", None, "held-out demonstrations"),
    ("out",               "runs/sft", "runs/sft", "run directory"),
    "training",
    ("epochs",            6,      3,      "passes over the demonstrations"),
    ("batch_size",        32,     128,    "demonstrations per optimizer step"),
    ("micro_batch_size",  32,     0,      "demonstrations per forward pass, more if they are "
                                          "short: only bounds the memory. 0: 4 on a CPU, on a GPU "
                                          "as many as fit", whole),
    ("lr",                1e-3,   2e-5,   "peak of AdamW's learning rate; warm-up, then a cosine"),
    ("weight_decay",      0.1,    0.0,    "AdamW's weight decay"),
    ("max_length",        256,    512,    "tokens per demonstration; a longer one loses the "
                                          "beginning of its prompt"),
]

# The columns of metrics.csv, and the panels and labels of curves.png
METRICS = [
    # column         what it is                                           panel, label
    ("step",         "optimizer steps, counted from 1"),
    ("epoch",        "passes over the data, counted from 1"),
    ("loss",         "of the batch", "cross entropy (nats per token)", "train"),
    ("eval_loss",    "after each epoch", "cross entropy (nats per token)", "held out"),
    ("lr",           "learning rate", "learning rate", "lr"),
    ("grad_norm",    "length before it is clipped to 1", "gradient norm", "gradient norm"),
    ("tokens_per_s", "of prompts and completions", "tokens per second", "tokens/s"),
]


def completion_losses(model, input_ids, places, args, scale=None, piece=PIECE):
    """The loss -log pi(token) of each completion token -> (N,), float32, detached; and with a
    `scale` the backward pass of scale times their sum. Inputs are from `collate`. It computes

        logits = lm_head(the states in which completion tokens are chosen)              (N, V)
        losses = cross_entropy(logits, those tokens);  (scale * losses.sum()).backward()

    but a `piece` of the tokens at a time, forward and at once backward: the logits of all would be
    the largest tensors of the step. The gradient of the states then goes through the layers.
    """
    with autocast(args):
        states = states_of(model(input_ids), places)
    leaf, losses = states.detach().requires_grad_(), []  # leaf.grad: the sum over the pieces
    for part, tokens in zip(leaf.split(piece), tokens_of(input_ids, places).split(piece)):
        with autocast(args):
            logits = model.lm_head(part).float()
        loss = F.cross_entropy(logits, tokens, reduction="none")
        if scale is not None:
            (scale * loss.sum()).backward()
        losses.append(loss.detach())
    if scale is not None:
        states.backward(leaf.grad)
    return torch.cat(losses)


def evaluate(model, examples, args, pad_token_id):
    """Mean loss over all completion tokens, nats. `examples`: (prompt, completion, number of the
    record), the texts as lists of tokens."""
    loss, tokens = 0.0, 0
    lengths = text_lengths(examples)
    with torch.no_grad():
        for part, weight in micro_batches(range(len(lengths)), lengths, args.micro_batch_size):
            batch = collate([examples[i] for i in part], pad_token_id, args.device)
            losses = completion_losses(model, *batch, args)
            loss, tokens = loss + weight * losses.sum().item(), tokens + weight * len(losses)
    return total(loss) / total(tokens)


@clean_exit
def main(argv=None):
    args, _ = parse("sft.py", __doc__, SETTINGS, argv, real_if=["model"])
    if args.model and not args.data:
        stop("--model needs --data: the built-in data is for the demo")
    start_processes(args)
    torch.manual_seed(args.seed)
    run = Run(args, "sft", SETTINGS, METRICS)
    tokenizer = load_tokenizer(args.tokenizer or args.model, args.model)
    model = load_llama(args.model, tokenizer, resize=args.resize_embedding)
    model = to_device(add_lora(model, args), args)
    max_length = min(args.max_length, model.config.max_position_embeddings)

    def read(path):
        records = read_records(path, "user_input", "completion")
        return encode_records(records, tokenizer, max_length, path)

    train, held_out = read(args.data), read(args.eval_data) if args.eval_data else []
    optimizer = torch.optim.AdamW(trainable(model), lr=args.lr, betas=(0.9, 0.95),
                                  weight_decay=args.weight_decay, fused=True)
    lengths = text_lengths(train)
    order = torch.Generator().manual_seed(args.seed)  # its own, so nothing else changes the order
    batches = [batch for _ in range(args.epochs)
               for batch in length_batches(lengths, args.batch_size, order)]
    steps, steps_per_epoch = len(batches), len(batches) // args.epochs
    # what --resume puts back: these, and `kept`
    trained = {"model": (model, optimizer)}
    args.micro_batch_size = micro_batch("sft", trained, args, run.state)
    kept = run.begin(steps, trained, {}, dict(watch={}))
    watch = LossWatch(args.data, **kept["watch"])

    for step, batch in list(enumerate(batches, 1))[run.step:]:
        started = time.perf_counter()
        lr = set_lr(optimizer, args.lr, step - 1, steps)
        # Micro-batches (`part`) only bound the memory: every loss is divided by the tokens of the
        # whole batch. (Divided by those of its micro-batch, a token of a small one would weigh
        # more.) `weight` is 1, or 0 for a row that one of many processes repeats, having none left
        # (lib.distributed.my_parts).
        tokens = sum(len(train[i][1]) for i in batch)
        # loss and per_text, each record's loss per token, stay on the device until the step's end:
        # asking a GPU for a number waits until it is done
        loss, per_text, records = 0.0, [], []
        for part, weight in micro_batches(batch, lengths, args.micro_batch_size):
            examples = [train[i] for i in part]
            losses = completion_losses(
                model, *collate(examples, tokenizer.pad_token_id, args.device), args,
                scale=weight / tokens)
            loss += weight * losses.sum() / tokens
            texts = losses.split([len(completion) for _, completion, _ in examples])
            per_text += [text.mean() for text in texts]
            records += [number for _, _, number in examples]
        grad_norm = clip_gradients(model, 1.0)
        loss, grad_norm, *per_text = torch.stack([loss, grad_norm, *per_text]).tolist()
        # of all processes; worst: the loss and number of the worst record
        loss, worst = total(loss), largest(max(zip(per_text, records)))
        check_finite(step, loss, grad_norm, args.data, [train[i][2] for i in batch])
        watch.see(step, loss, worst)
        optimizer.step()
        optimizer.zero_grad()

        speed = sum(lengths[i] for i in batch) / (time.perf_counter() - started)
        eval_loss = None
        epoch = (step - 1) // steps_per_epoch + 1
        if held_out and step % steps_per_epoch == 0:
            eval_loss = evaluate(model, held_out, args, tokenizer.pad_token_id)
            tqdm.write(f"epoch {epoch}: held-out loss {eval_loss:.4f} per token, perplexity "
                       f"{torch.tensor(eval_loss).exp():.2f}")
        run.log(step=step, epoch=epoch, loss=loss, eval_loss=eval_loss, lr=lr, grad_norm=grad_norm,
                tokens_per_s=speed)
        kept["watch"] = watch.state()
        run.end_step(f"loss {loss:.3f}, lr {lr:.1e}, {speed:.0f} tokens/s",
                     lambda folder: save_checkpoint(model, tokenizer, folder))

    save_checkpoint(model, tokenizer, args.out)
    run.finish()


if __name__ == "__main__":
    main()
