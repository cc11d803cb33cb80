"""What 8 and 4 bits do to a checkpoint: its bytes, and how far the log probabilities of its own
greedy answers move.

    pip install bitsandbytes
    python -m tools.quantize runs/ppo

For every token y_t of the answers to 20 prompts, d_t = log pi_quantized(y_t | x, y_<t) -
log pi(y_t | x, y_<t), in nats. Printed are the mean of |d|, the mean of d (below 0: the answer
became less likely) and the share of tokens that are still the likeliest. The last column is
arithmetic and no measurement: LLaMA 2 7B, its linear maps at the measured bytes per weight.

tools.chat quantizes with the same `quantize`. This script computes on a CPU.
"""

import argparse
import copy
import logging

import torch
import torch.nn.functional as F
from torch import nn

from lib.data import collate, left_pad
from lib.dialogue import encode_prompt
from lib.errors import clean_exit, explain, stop
from lib.settings import positive
from model import generate, load_llama, load_tokenizer, states_of, tokens_of

PROMPTS = """What is the capital of France?
Explain in two sentences why the sky is blue.
Write a short poem about a lighthouse.
How do I boil an egg?
List three uses for a paper clip.
Translate "good morning" into Spanish.
What is 17 plus 25?
Who wrote Romeo and Juliet?
Give me a name for a small bakery.
Summarize: The cat sat on the mat because it was warm there, and did not move all day.
Why do leaves change colour in autumn?
Write a polite email that declines an invitation.
What is the difference between a frog and a toad?
Suggest a book for a rainy weekend.
How does a bicycle stay upright?
Write a Python function that reverses a list.
What should I pack for a day at the beach?
Describe the taste of a lemon.
Is a tomato a fruit or a vegetable?
Tell me a joke about computers.""".split("\n")

# LLaMA 2 7B: 32 layers of 4 projections of 4096 x 4096 and 3 of 4096 x 11008; an embedding and a
# head of 32,000 x 4096 and 65 norms of 4096, which like these stay in 16 bit
LINEAR_7B, REST_7B = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096 + 65 * 4096


def need_bitsandbytes():
    """End the program with one line if it is missing: call this before a model is loaded."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at every product
    try:
        import bitsandbytes.nn  # noqa: F401
    except ImportError:
        stop("8 and 4 bits need a package: pip install bitsandbytes")


def quantize(llama, bits, device="cpu"):
    """Give the linear maps of a `Llama`'s layers 8-bit weights (LLM.int8, Dettmers et al. 2022) or
    4-bit ones (NF4 with double quantization, Dettmers et al. 2023), and move it to `device`, both
    in place -> bytes of its weights. The embedding, the head and the norms keep their type. Ends
    the program with one line if bitsandbytes is missing, or cannot do this on `device`."""
    need_bitsandbytes()
    from bitsandbytes.nn import Int8Params, Linear8bitLt, LinearNF4, Params4bit
    with explain(f"{bits}: this model cannot be quantized on {device}"):
        for layer in llama.model.layers:
            for name, linear in list(layer.named_modules()):
                if not isinstance(linear, nn.Linear):
                    continue
                shape, weight = (linear.in_features, linear.out_features), linear.weight.data
                if bits == "8bit":  # 6: its authors' threshold of what is an outlier
                    small = Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0,
                                         device="meta")
                    small.weight = Int8Params(weight, requires_grad=False)
                else:
                    small = LinearNF4(*shape, compute_dtype=weight.dtype, device="meta")
                    small.weight = Params4bit(weight, quant_type="nf4")
                small.bias = linear.bias
                layer.set_submodule(name, small.to(device))  # this quantizes
        llama.to(device).eval()
        # counted before the first pass, in which bitsandbytes reorders 4-bit weights on some CPUs:
        # state_dict puts them back, and rounds their scales each time
        size = weight_bytes(llama)
        with torch.no_grad():  # what cannot be done shows here
            llama(torch.zeros(1, 1, dtype=torch.long, device=device))
    return size


def weight_bytes(llama):
    """Bytes of a model's weights, tied ones counted once; of quantized ones with their scales."""
    tensors = [x for x in llama.state_dict().values() if isinstance(x, torch.Tensor)]
    return sum({x.data_ptr(): x.nbytes for x in tensors}.values())


@torch.no_grad()
def answer_logprobs(llama, texts):
    """`texts`: [(prompt, answer)] in tokens -> log pi of every answer token (N,), and whether it is
    the likeliest (N,)."""
    logprobs, likeliest = [], []
    for text in texts:
        input_ids, places = collate([text], 0)
        tokens = tokens_of(input_ids, places)
        logits = llama.lm_head(states_of(llama(input_ids), places)).float()
        logprobs.append(-F.cross_entropy(logits, tokens, reduction="none"))
        likeliest.append(logits.argmax(-1) == tokens)
    return torch.cat(logprobs), torch.cat(likeliest)


@clean_exit
def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.quantize", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="whatever --model of the stages takes")
    parser.add_argument("--tokenizer", help="where its tokenizer is, if not with the model")
    parser.add_argument("--max_new_tokens", type=positive, default=64,
                        help="tokens per answer at most (default 64)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="of what is not quantized (default float32)")
    args = parser.parse_args(argv)
    need_bitsandbytes()
    tokenizer = load_tokenizer(args.tokenizer or args.model, args.model)
    full = load_llama(args.model, tokenizer, getattr(torch, args.dtype))
    prompts = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    out = generate(full, *left_pad(prompts, tokenizer.pad_token_id), args.max_new_tokens,
                   tokenizer.end_ids, temperature=0)
    texts = [(prompt, tokens[mask.bool()].tolist())
             for prompt, tokens, mask in zip(prompts, out.tokens, out.mask)]
    before, _ = answer_logprobs(full, texts)
    linear = [part.weight for part in full.model.layers.modules() if isinstance(part, nn.Linear)]
    weights, full_bytes = sum(w.numel() for w in linear), sum(w.nbytes for w in linear)
    print(f"{len(PROMPTS)} prompts, {len(before)} answer tokens, mean log probability "
          f"{before.mean():.4f} nats per token in {args.dtype}\n")
    print("| weights | bytes | bytes per weight, linear maps | mean of abs(d) | mean of d "
          "| still the likeliest | 7B, on paper |\n" + "| --- " * 7 + "|")
    print(f"| {args.dtype} | {weight_bytes(full):,} | {full_bytes / weights:.3f} | | | "
          f"| {(LINEAR_7B + REST_7B) * 2 / 1e9:.2f} GB in 16 bit |")
    for bits in ("8bit", "4bit"):
        small = copy.deepcopy(full)
        size = quantize(small, bits)
        per_weight = (full_bytes - (weight_bytes(full) - size)) / weights
        after, likeliest = answer_logprobs(small, texts)
        d = after - before
        print(f"| {bits} | {size:,} | {per_weight:.3f} | {d.abs().mean():.4f} "
              f"| {d.mean():+.4f} | {likeliest.float().mean():.3f} "
              f"| {(LINEAR_7B * per_weight + REST_7B * 2) / 1e9:.2f} GB |", flush=True)


if __name__ == "__main__":
    main()
