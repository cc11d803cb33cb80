"""The memory of a training step, predicted from the model's configuration: for tools.budget, and
for the micro-batch that a GPU has room for.

In the formulas: n layers; widths d of the hidden state, I of the MLP, Q of all query heads
together, K of all key heads; H query heads; V words.
"""

import argparse

import torch

from lib.distributed import WORLD, largest

PIECE = 512  # tokens whose logits are in memory at one time
LAPTOP = dict(sft=4, rm=2, ppo=4)  # rows of a micro-batch on a CPU


def widths(config):
    """d, I, Q, K, V."""
    return (config.hidden_size, config.intermediate_size,
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim, config.vocab_size)


def layer_bytes(config, args):
    """What autograd keeps of a token in a layer, in bytes.

    Of two norms the input, the normalized input (for the gradient of the norm's weight) and a
    number: 4 d + 2. The inputs of the matrices: one for q, k and v, one for gate and up, 2 d; o's
    is the output of attention. That is kept with q, k and v: 2 Q + 2 K, and a number per head. gate
    and up: 2 I; down's input is computed again. Each takes 4 bytes; in bf16 what enters or leaves a
    matrix 2. A matrix whose input must be cast keeps that by itself: 5 d + Q. (GPUs keep less: the
    norms are fused, attention is in bf16.)
    """
    d, i, q, k, _ = widths(config)
    cast, base = args.dtype == "bfloat16", args.base_dtype == "bfloat16"
    norms = 4 * ((2 if args.lora_rank else 4) * d + 2)
    attention = 4 * (2 * q + 2 * k + config.num_attention_heads)
    mlp = 2 * i * (2 if cast or base else 4)
    shared, own = 4 * 2 * d, (2 if cast else 4) * (5 * d + q)
    return norms + (own if cast or base else shared) + attention + mlp


def activation_bytes(config, rows, length, projected, copies, args):
    """Bytes at the peak of forward and backward pass over `rows` texts, `projected` tokens of which
    get logits: the activations of all layers (with checkpointing the input of each, and all of
    one), 3 d after them; the weights that autocast casts to bf16; and the larger of

    - `copies` of the logits (projected, V) in float32,
    - gradients that wait to be added: 3 I per token, and those of one (d, I) matrix and of the
      embedding.
    """
    (d, i, q, k, v), n, tokens = widths(config), config.num_hidden_layers, rows * length
    layer, words, cast = layer_bytes(config, args), v * (projected > 0), args.dtype == "bfloat16"
    kept = tokens * (n * 4 * d + layer if args.gradient_checkpointing else n * layer)
    if cast and args.base_dtype == "float32":
        kept += 2 * d * words
        if args.processes == 1:  # many gather their layers in bf16
            kept += 2 * n * (2 * d * q + 2 * d * k + 2 * d * i)
    gradients = 4 * 3 * i * tokens + (0 if args.lora_rank else 4 * d * (i + words))
    return kept + tokens * 12 * d + max(projected * v * (4 * copies + 2 * cast), gradients)


def step_bytes(stage, config, rows, args, texts=4):
    """Bytes at the peak of forward and backward pass over a micro-batch of `rows` of a stage,
    "sft", "rm" or "ppo"; a prompt of the reward model has `texts` completions."""
    context = config.max_position_embeddings
    if stage == "ppo":
        response = args.max_new_tokens
        length = min(args.max_prompt_length, context - response) + response
        # logits, a piece at a time, and their log softmax, and for the entropy four more
        needed = activation_bytes(config, rows, length, min(PIECE, rows * response), 6, args)
        ptx = activation_bytes(config, rows, length, min(max(PIECE, length), rows * length), 4,
                               args)
        return max(needed, ptx) if args.ptx_coef else needed
    length = min(args.max_length, context)
    if stage == "rm":
        return activation_bytes(config, texts * rows, length, 0, 3, args)
    return activation_bytes(config, rows, length, min(PIECE, rows * length), 3, args)


def micro_batch(stage, trained, args, state, texts=4):
    """--micro_batch_size, where 0 means automatic. On a CPU: few rows (LAPTOP). On a GPU: the whole
    (mini-)batch, halved until it fits what is free beside gradients and optimizer, with a margin of
    20 %. A run that is resumed, `state`, keeps its size. `trained`: {name: (model on its device,
    optimizer)}; `texts`: completions of a prompt at most."""
    if args.micro_batch_size:
        return args.micro_batch_size
    if state:
        return state["settings"]["micro_batch_size"]
    if torch.device(args.device).type != "cuda":
        return LAPTOP.get(stage, 2)  # a stage of a fork: 2
    models = [model for model, _ in trained.values()]
    learns = [sum((p.to_local() if hasattr(p, "to_local") else p).nbytes
                  for p in model.parameters() if p.requires_grad) for model in models]
    torch.cuda.empty_cache()
    # Adam's two moments, and the gradients of one model at a time
    free = torch.cuda.mem_get_info(args.device)[0] - 2 * sum(learns) - max(learns)
    rows = -(-(args.minibatch_size if stage == "ppo" else args.batch_size) // WORLD)
    sized = argparse.Namespace(**vars(args), processes=WORLD)
    while rows > 1 and step_bytes(stage, models[0].config, rows, sized, texts) > 0.8 * free:
        rows = -(-rows // 2)
    rows = -largest(-rows)  # all processes take the same
    print(f"--micro_batch_size {rows}: {free / 2**30:.1f} GiB are free for a forward and backward "
          "pass")
    return rows


def rollout_bytes(config, rows, prompt, response, args):
    """Bytes of sampling: the cache, 2 n K numbers per token; and beside it what reading the prompts
    takes, or the copy of three quarters of the cache when a quarter of the rows has ended."""
    d, i, _, k, _ = widths(config)
    size = 2 if "bfloat16" in (args.dtype, args.base_dtype) else 4
    cache = size * 2 * config.num_hidden_layers * k * rows * (prompt + response)
    return cache + max(4 * rows * prompt * (3 * i + 2 * d + prompt), 0.75 * cache)
