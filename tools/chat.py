"""Chat with a checkpoint in the terminal, or compare the answers of several.

    python -m tools.chat runs/ppo                       # a chat, the answers streamed
    python -m tools.chat runs/ppo --prompt "What is 2 plus 3?"
    echo "What is 2 plus 3?" | python -m tools.chat runs/ppo
    python -m tools.chat runs/sft runs/ppo --reward runs/rm --prompt "What is 2 plus 3?"
    python -m tools.chat runs/sft runs/ppo --reward runs/rm --out answers.md \\
        --prompts data/rlhf_training_data_eval.json     # a table

A checkpoint is whatever --model of the stages takes. Answers are greedy unless --temperature is
given. The win rate is the share of prompts on which a checkpoint scores above the first one, ties
counting half.
"""

import argparse
import contextlib
import math
import sys

import torch
from tqdm import tqdm

from lib.checkpoints import read_config
from lib.data import half_character, left_pad, read_records
from lib.dialogue import cut_left, encode_completion, encode_prompt
from lib.errors import clean_exit, explain, stop
from lib.rewards import tokens_for
from lib.settings import DEVICE, any_whole, positive, usable_device
from model import decode, generate, load_llama, load_scalar_head, load_tokenizer
from tools.quantize import need_bitsandbytes, quantize, weight_bytes
from tools.tables import write_table
from tools.texts import text_of, text_pieces


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="python -m tools.chat", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="checkpoint", help="several are compared")
    group = parser.add_argument_group("the questions")
    group.add_argument("--prompt", help="answer this, and end (default: the terminal is a chat; "
                       "what is piped in is one prompt)")
    group.add_argument("--prompts", metavar="FILE", help="answer every record's user_input, in a "
                       "table")
    group.add_argument("--out", help="write the table of --prompts to this .md or .csv file "
                       "(default: print it)")
    group.add_argument("--reward", metavar="CHECKPOINT", help="a reward model, which scores the "
                       "answers")
    group = parser.add_argument_group("the answers")
    group.add_argument("--temperature", type=float, default=0.0, help="of the sampling; 0: always "
                       "the likeliest token (default 0)")
    group.add_argument("--top_p", type=float, default=1.0, help="sample from the smallest set of "
                       "tokens with this probability (default 1)")
    group.add_argument("--max_new_tokens", type=positive, help="tokens per answer at most (default "
                       "half of the context, at most 512)")
    group.add_argument("--batch_size", type=positive, default=16, help="prompts of --prompts "
                       "answered at once (default 16)")
    group.add_argument("--seed", type=any_whole, default=0, help="of the sampling (default 0)")
    group = parser.add_argument_group("where it runs")
    group.add_argument("--tokenizer", help="where the checkpoints' tokenizer is, if not with them")
    group.add_argument("--quantize", choices=["8bit", "4bit"], help="the linear maps of the "
                       "layers; needs bitsandbytes")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the "
                       "weights that are not quantized (default float32)")
    group.add_argument("--device", type=usable_device, default=DEVICE, help="where to compute "
                       f"(default {DEVICE})")
    args = parser.parse_args(argv)
    if not 0 <= args.temperature < math.inf:
        stop("--temperature must be a number from 0")
    if not 0 < args.top_p <= 1:
        stop("--top_p must be above 0 and at most 1")
    if args.prompt is not None and args.prompts:
        stop("--prompt or --prompts, not both")
    if args.out and not (args.prompts and args.out.endswith((".md", ".csv"))):
        stop("--out is for the table of --prompts, and ends with .md or .csv")
    return args


# ------------------------------------------------------------------------------------------------
# One checkpoint

def load(path, args):
    """The tokenizer, the model, and how many tokens an answer and a prompt may have. Standard
    output is for answers: notices about the checkpoint go to standard error."""
    if args.quantize:
        need_bitsandbytes()
    with contextlib.redirect_stdout(sys.stderr):
        tokenizer = load_tokenizer(args.tokenizer or path, path)
        llama = load_llama(path, tokenizer, getattr(torch, args.dtype))
    context = llama.config.max_position_embeddings
    limit = args.max_new_tokens or min(512, context // 2)
    if limit >= context:
        stop(f"--max_new_tokens {limit}: the context of {path} is {context} tokens, and the prompt "
             "needs some of them")
    if args.quantize:
        before, after = weight_bytes(llama), quantize(llama, args.quantize, args.device)
        print(f"{path}: weights {before / 1e6:.1f} MB in {args.dtype}, {after / 1e6:.1f} MB in "
              f"{args.quantize}", file=sys.stderr)
    return tokenizer, llama.to(args.device), limit, context - limit


def sampling(args):
    """The options of `decode` and `generate`."""
    return dict(temperature=args.temperature, top_p=args.top_p,
                generator=torch.Generator(args.device).manual_seed(args.seed))


def new_tokens(steps, ends):
    """From what `decode` yields of one row: its tokens as they come, up to the first of `ends`."""
    shown = 0
    for _, tokens, _ in steps:
        for token in tokens[0, shown:].tolist():
            yield token
            if token in ends:
                return
        shown = tokens.shape[1]


def stream(tokenizer, llama, prompt, limit, args, how):
    """Print the answer to `prompt` (tokens) while it is written -> its text, and whether Ctrl-C
    stopped it."""
    text, stopped = "", False
    steps = decode(llama, *left_pad([prompt], tokenizer.pad_token_id, args.device), limit,
                   tokenizer.end_ids, **how)
    try:
        for piece in text_pieces(tokenizer, new_tokens(steps, tokenizer.end_ids)):
            piece = piece if text else piece.lstrip()
            text += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        stopped = True
    print("" if text or stopped else "(empty)", flush=True)
    return text.strip(), stopped


def chat(args):
    """A dialogue in the terminal. When it outgrows the context, its oldest turns are forgotten."""
    tokenizer, llama, limit, room = load(args.models[0], args)
    how, history, told = sampling(args), [], False
    print(f"{args.models[0]}: /reset starts over, Ctrl-C stops an answer, Ctrl-D ends")
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print()
            continue
        if said == "/reset":
            history = []
        if said in ("", "/reset"):
            continue
        if wrong := half_character(said):
            print(f"(your message {wrong}: is the terminal set to UTF-8?)")
            continue
        said = {"role": "user", "content": said}
        if (length := len(encode_whole(tokenizer, [said]))) > room:
            print(f"(your message has {length} tokens, and {room} fit: it is dropped)")
            continue
        history.append(said)
        while len(prompt := encode_whole(tokenizer, history)) > room:
            history = history[2:]
            if not told:
                print("(the conversation outgrows the context: its oldest turns are forgotten "
                      "from now on)")
                told = True
        answer, _ = stream(tokenizer, llama, prompt, limit, args, how)
        history.append({"role": "assistant", "content": answer})


# ------------------------------------------------------------------------------------------------
# Several checkpoints

def encode_whole(tokenizer, user_input, room=math.inf, where="this conversation"):
    """The tokens of a prompt, which here is not cut."""
    with explain(where):
        tokens = encode_prompt(tokenizer, user_input)
    if len(tokens) > room:
        stop(f"{where}: {len(tokens)} tokens, where {room} fit beside an answer: shorten it, or "
             "lower --max_new_tokens")
    return tokens


def answer_all(path, prompts, args):
    """A checkpoint's answers to all prompts -> [(text, whether it ended before the limit)]."""
    tokenizer, llama, limit, room = load(path, args)
    tokens = [encode_whole(tokenizer, prompt, room,
                           f"{args.prompts}: record {number}" if args.prompts else "the prompt")
              for number, prompt in enumerate(prompts, 1)]
    how, answers = sampling(args), [None] * len(prompts)
    # similar lengths together: little padding
    order = sorted(range(len(prompts)), key=lambda i: len(tokens[i]))
    for start in tqdm(range(0, len(order), args.batch_size), desc=path, unit="batch",
                      disable=not args.prompts):
        rows = order[start:start + args.batch_size]
        padded = left_pad([tokens[i] for i in rows], tokenizer.pad_token_id, args.device)
        out = generate(llama, *padded, limit, tokenizer.end_ids, **how)
        for i, written, mask in zip(rows, out.tokens, out.mask):
            written = written[mask.bool()].tolist()
            answers[i] = text_of(tokenizer, written).strip(), written[-1] in tokenizer.end_ids
    return answers


@torch.no_grad()
def score_all(prompts, answers, args):
    """The reward model's scores of the answers, [[score of prompt 1, ...] per checkpoint].

    The texts are put into the reward model's own tokens and chat format, whatever those of the
    checkpoint are. An answer that was cut has no token that ends it, and is scored at its last one.
    """
    with contextlib.redirect_stdout(sys.stderr):
        config, tokenizer = read_config(args.reward), load_tokenizer(args.reward)
        reward_model = load_scalar_head(args.reward, getattr(torch, args.dtype)).to(args.device)

    def score(user_input, text, ended):
        with explain(f"{args.reward}: {str(user_input)[:80]!r}"):
            if ended:
                tokens = tokens_for(tokenizer, config, user_input, text)
            else:
                prompt, answer = encode_completion(tokenizer, user_input, text)
                tokens = prompt + answer[:-1]
        tokens = cut_left(tokenizer, user_input, tokens,
                          reward_model.config.max_position_embeddings)
        return reward_model(torch.tensor([tokens], device=args.device))[0, -1].item()

    return [[score(prompt, *answer) for prompt, answer in zip(prompts, column)]
            for column in answers]


def compare(prompts, args):
    """The same prompts through every checkpoint, one loaded after the other."""
    answers = [answer_all(path, prompts, args) for path in args.models]
    scores = score_all(prompts, answers, args) if args.reward else []
    if args.prompts:
        return write_table(args.out, args.models, prompts, answers, scores)
    for n, (path, [(text, _)]) in enumerate(zip(args.models, answers)):
        score = f", score {scores[n][0]:.3f}" if scores else ""
        print(f"{path}{score}\n{text or '(empty)'}\n")


@clean_exit
def main(argv=None):
    args = parse_args(argv)
    if args.prompts:
        return compare([record["user_input"] for record in
                        read_records(args.prompts, "user_input")], args)
    if args.prompt is None and sys.stdin is None:
        stop("standard input is closed: give a --prompt or --prompts")
    if args.prompt is None and not sys.stdin.isatty():
        with explain("standard input: not UTF-8"):
            args.prompt = sys.stdin.buffer.read().decode("utf-8-sig")
    if args.prompt is None and (len(args.models) > 1 or args.reward):
        stop("several checkpoints, or --reward, need a --prompt or --prompts to compare the "
             "answers to")
    if args.prompt is None:
        return chat(args)
    prompt = args.prompt.strip()
    if wrong := half_character(prompt) or (None if prompt else "is empty"):
        stop(f"the prompt {wrong}")
    if len(args.models) > 1 or args.reward:
        return compare([prompt], args)
    tokenizer, llama, limit, room = load(args.models[0], args)
    prompt = encode_whole(tokenizer, prompt, room, "the prompt")
    if stream(tokenizer, llama, prompt, limit, args, sampling(args))[1]:
        raise SystemExit(130)


if __name__ == "__main__":
    main()
