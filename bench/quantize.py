"""What quantization does to a checkpoint: its bytes, and how far the log probabilities of its own greedy answers move.

    pip install bitsandbytes accelerate
    python bench/quantize.py runs/ppo

For every token y_t of the answers, d_t = log pi_quantized(y_t | x, y_<t) - log pi(y_t | x, y_<t), in nats. Printed are the mean
of |d|, the mean of d (below 0: the answer became less likely) and the share of tokens that are still the likeliest.
The last column is arithmetic and no measurement: the measured bytes a weight, times the weights of LLaMA 2 7B.
"""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from model import collate, encode_prompt, generate, left_pad, load_llama, load_tokenizer, positive, quantize, weight_bytes  # noqa: E402

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

# LLaMA 2 7B: 32 layers of 4 projections of 4096 x 4096 and 3 of 4096 x 11008; an embedding and a head of 32,000 x 4096;
# 65 norms of 4096, which like these two stay in 16 bit
LINEAR_7B, REST_7B = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096 + 65 * 4096


@torch.no_grad()
def answer_logprobs(model, prompts, answers):
    """log pi of every answer token (N,), and whether it is the likeliest."""
    logprobs, likeliest = [], []
    for prompt, answer in zip(prompts, answers):
        input_ids, is_completion = collate([prompt], [answer], 0)
        logits = model(input_ids).logits[:, :-1][is_completion[:, 1:]].float()
        tokens = torch.tensor(answer)
        logprobs.append(logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
        likeliest.append(logits.argmax(-1) == tokens)
    return torch.cat(logprobs), torch.cat(likeliest)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Bytes and shift of the log probabilities in 8 and in 4 bits.")
    parser.add_argument("model", help="whatever --model of the stages takes")
    parser.add_argument("--max_new_tokens", type=positive, default=64, help="tokens an answer at most")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of what is not quantized")
    args = parser.parse_args(argv)
    tokenizer = load_tokenizer(args.model)
    full = load_llama(args.model, tokenizer, getattr(torch, args.dtype))
    prompts = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    out = generate(full, *left_pad(prompts, tokenizer.pad_token_id), args.max_new_tokens, tokenizer.eos_token_id, temperature=0)
    answers = [tokens[mask.bool()].tolist() for tokens, mask in zip(out.tokens, out.mask)]
    before, _ = answer_logprobs(full, prompts, answers)
    linear = [part for name, part in full.named_modules() if isinstance(part, nn.Linear) and name != "lm_head"]
    weights, full_bytes = sum(part.weight.numel() for part in linear), sum(part.weight.nbytes for part in linear)
    print(f"{len(PROMPTS)} prompts, {len(before)} answer tokens, mean log probability {before.mean():.4f} nats per token in {args.dtype}\n")
    print("| weights | bytes | bytes a weight, linear layers | mean of abs(d) | mean of d | still the likeliest | 7B, on paper |")
    print("| --- " * 7 + "|")
    in_16_bit = (LINEAR_7B + REST_7B) * 2 / 1e9
    print(f"| {args.dtype} | {weight_bytes(full):,} | {full_bytes / weights:.3f} | | | | {in_16_bit:.2f} GB in 16 bit |")
    for bits in ["8bit", "4bit"]:
        small = quantize(full, bits)
        a_weight = (full_bytes - (weight_bytes(full) - weight_bytes(small))) / weights
        after, likeliest = answer_logprobs(small, prompts, answers)
        d, same = after - before, likeliest.float().mean()
        print(f"| {bits} | {weight_bytes(small):,} | {a_weight:.3f} | {d.abs().mean():.4f} | {d.mean():+.4f} | {same:.3f} "
              f"| {(LINEAR_7B * a_weight + REST_7B * 2) / 1e9:.2f} GB |", flush=True)


if __name__ == "__main__":
    main()
