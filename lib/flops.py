"""The arithmetic of a step, from the model's configuration. A product of (a, b) and (b, c) takes
2 a b c floating-point operations (FLOP); all else is small beside the products.

In the formulas: widths d of the hidden state, I of the MLP, Q of all query heads together, K of all
key heads; V words.
"""

from lib.memory import widths


def forward_flops(config, texts, projected):
    """FLOP of a forward pass over `texts`, their lengths in tokens, of which `projected` tokens go
    through the vocabulary projection: 2 per weight and token; and 4 Q per layer, token, and token
    that it may look at, itself included (QK^T and AV)."""
    d, i, q, k, v = widths(config)
    weights = 2 * d * q + 2 * d * k + 3 * d * i
    pairs = sum(length * (length + 1) // 2 for length in texts)
    layers = config.num_hidden_layers * (2 * weights * sum(texts) + 4 * q * pairs)
    return layers + 2 * d * v * projected


def training_flops(config, texts, projected, args):
    """FLOP of forward and backward pass. The latter computes the gradients of inputs and weights,
    with LoRA those of inputs only (the adapters' own are left out: below 1 %); checkpointing adds
    a forward pass."""
    passes = (2 if args.lora_rank else 3) + args.gradient_checkpointing
    return passes * forward_flops(config, texts, projected)


def generation_flops(config, texts):
    """FLOP of sampling. `texts`: (tokens of the prompt, of the response). With the cache every
    token but the last goes through the layers once, and every response token costs a projection."""
    return forward_flops(config, [prompt + response - 1 for prompt, response in texts],
                         sum(response for _, response in texts))


def update_flops(config, texts, args):
    """FLOP of a PPO update without the PTX term; `texts` as in `generation_flops`."""
    lengths = [prompt + response for prompt, response in texts]
    projected = sum(response for _, response in texts)
    # the reference; and the actor, unless its log probabilities come from the sampling
    asked = 1 if args.dtype == args.base_dtype == "float32" and not args.tf32 else 2
    experience = asked * forward_flops(config, lengths, projected)
    experience += 2 * forward_flops(config, lengths, 0)  # critic and reward model
    training = (training_flops(config, lengths, projected, args)
                + training_flops(config, lengths, 0, args))
    return generation_flops(config, texts) + experience + args.ppo_epochs * training
