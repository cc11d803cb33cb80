"""The model: LLaMA written out once, loading and saving it, the scalar head, and generation.

    from model import load_llama, load_tokenizer, generate
    tokenizer = load_tokenizer("runs/ppo")
    llama = load_llama("runs/ppo", tokenizer)

    python model.py         # the self-test: generate against the model without a cache

One forward pass serves training and decoding. It gives hidden states `(B, L, d)`; whoever wants
logits or values projects the positions that it needs: `llama.lm_head(hidden[...])`. The parameters
carry Hugging Face's names. How checkpoints and tokenizers are stored is in lib/formats.py,
lib/checkpoints.py and lib/tokenizer.py, which a first reading can skip.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lib import checkpoints, kernels
from lib.data import left_pad
from lib.distributed import RANK, is_sharded, total, wait_for_all
from lib.graphs import can_be_captured, captured
from lib.lora import merged
from lib.memory import PIECE
from lib.tokenizer import load_tokenizer  # noqa: F401: re-exported

DEMO_MODEL = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                  rms_norm_eps=1e-5, initializer_range=0.06, tie_word_embeddings=True)


# ------------------------------------------------------------------------------------------------
# LLaMA (Touvron et al. 2023). B rows, L tokens each, hidden size d, heads of size h

def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021, eq. 34): the halves (a, b) of a head become (a cos - b sin,
    b cos + a sin). `x` (B, heads, L, h); `cos`, `sin` (B, 1, L, h), each angle in both halves, and
    `sin` with a minus in the first (`LlamaBackbone`)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)  # roll: (a, b) -> (b, a)


def recomputed(function, *inputs):
    """`function(*inputs)`; only the inputs are kept, and the backward pass computes it again."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Linear(nn.Linear):
    """`nn.Linear`, computed in the way that is fastest on a CPU."""

    def forward(self, x):
        return kernels.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): several query heads share a key and a value
    head."""

    def __init__(self, config):
        super().__init__()
        self.head_dim, d, bias = config.head_dim, config.hidden_size, config.attention_bias
        self.q_proj = Linear(d, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = Linear(d, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = Linear(d, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * self.head_dim, d, bias=bias)

    def forward(self, x, cos, sin, mask, past):
        """`x` (B, L, d) -> (B, L, d). `past`: the layer's part of a `Cache`, keys and values
        (B, kv heads, length, h), and the columns (L,) in which these tokens are written; None: no
        cache."""
        B, L, _ = x.shape
        q, k, v = (project(x).view(B, L, -1, self.head_dim).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:
            keys, values, columns = past
            keys.index_copy_(2, columns, k.to(keys.dtype))
            values.index_copy_(2, columns, v.to(values.dtype))
            k, v = keys[:, :, :mask.shape[-1]], values[:, :, :mask.shape[-1]]
        seen = kernels.attention(q, k, v, mask)  # softmax(q k / sqrt(h) + mask) v
        return self.o_proj(seen.transpose(1, 2).reshape(B, L, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        d, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(d, inner, bias=bias)
        self.up_proj = Linear(d, inner, bias=bias)
        self.down_proj = Linear(inner, d, bias=bias)
        self.activation = ACT2FN[config.hidden_act]

    def down(self, gate, up):
        return self.down_proj(self.activation(gate) * up)

    def forward(self, x):
        # saves a quarter of what a layer would keep, and is cheap to compute again
        return recomputed(self.down, self.gate_proj(x), self.up_proj(x))


class Block(nn.Module):
    """h <- h + attention(norm(h)),  h <- h + MLP(norm(h)); norm is RMSNorm (Zhang and Sennrich
    2019, eq. 4)."""

    recompute = False  # --gradient_checkpointing

    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def compute(self, hidden, *context):
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), *context)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def forward(self, hidden, *context):
        if self.recompute:
            return recomputed(self.compute, hidden, *context)
        return self.compute(hidden, *context)


class Cache:
    """Keys and values of the tokens that have been read, laid out once for `length` of them:
    growing them by concatenation would copy everything for every token. `tensor` (layers, 2, B, kv
    heads, length, h). `columns` (L,): where the next L tokens are written; a tensor, not a number,
    so that a step that advances it can be captured as a CUDA graph."""

    def __init__(self, config, batch, length, dtype, device):
        # zeros: columns not written yet are read too, under the mask, and 0 times nan would be nan
        self.tensor = torch.zeros(config.num_hidden_layers, 2, batch, config.num_key_value_heads,
                                  length, config.head_dim, dtype=dtype, device=device)
        self.columns = torch.arange(length, device=device)

    def part(self, rows, columns):
        """A view of the same memory for a slice of the rows. It begins at `columns.start`: there
        the next tokens are written, and nothing before it is attended to."""
        part = copy.copy(self)
        part.tensor = self.tensor[:, :, rows, :, columns.start:]
        part.columns = self.columns[:columns.stop - columns.start]
        return part


class LlamaBackbone(nn.Module):
    """Tokens in, hidden states out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        with torch.device("cpu"):  # computed, not loaded, so never on meta; float32 in any case
            self.rotary_emb = LlamaRotaryEmbedding(config)

    def forward(self, input_ids, positions=None, mask=None, cache=None):
        """`input_ids` (B, L) -> hidden states (B, L, d) after the last norm.

        `positions` (B, L): 0, 1, 2, ... if None. `mask` (B, 1, L, S): 0 where a token may look, a
        huge negative number where not; None: each at itself and what is before it. So padding on
        the right needs no mask. `cache`: a `Cache`, which gets these tokens; they look at the first
        S of its columns, and it needs a mask.
        """
        hidden = self.embed_tokens(input_ids)
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        cos, sin = (x[:, None] for x in self.rotary_emb(hidden, positions))
        sin = torch.cat((-sin[..., :sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2:]), dim=-1)
        pasts = [None] * len(self.layers)
        if cache is not None:
            pasts = [(keys, values, cache.columns) for keys, values in cache.tensor]
        for layer, past in zip(self.layers, pasts):
            hidden = layer(hidden, cos, sin, mask, past)
        return self.norm(hidden)


class Head(Linear):
    """Hidden states (..., d) to logits (..., V)."""

    def __init__(self, config):
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        # Some vocabularies are padded to a round number. The rows without a token would be sampled
        # now and then, and decode to nothing: so their logits are -inf. None: every row has a token
        self.register_buffer("unused", None, persistent=False)  # (V,)

    def forward(self, x):
        logits = super().forward(x)
        return logits if self.unused is None else logits.masked_fill_(self.unused, -math.inf)


class Llama(nn.Module):
    """The language model: hidden states, and `lm_head` to turn those that are wanted into logits
    (..., V)."""

    generation_config = None  # of the checkpoint, if it has one; exported with the model

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = LlamaBackbone(config)
        self.lm_head = Head(config)
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, *args, **options):
        return self.model(*args, **options)


class ScalarHead(nn.Module):
    """LLaMA with one number per token in place of a word distribution: v_t = w . h_t - mean,
    float32, `(B, L)`.

    As a reward model it is read at the last token of the completion (Stiennon et al. 2020, section
    3.4), as a critic at every token. Saved as a `LlamaForSequenceClassification`, whose head has no
    bias: `mean` is `score_mean` in config.json.
    """

    def __init__(self, backbone):
        super().__init__()
        self.model, self.config = backbone, backbone.config
        self.config.score_mean = getattr(self.config, "score_mean", 0.0)
        self.score = nn.Linear(self.config.hidden_size, 1, bias=False)
        # as lm-human-preferences
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(self.config.hidden_size + 1))
        self.register_buffer("before", None, persistent=False)  # with LoRA: what the head began as
        self.on = True  # False inside `adapters_off`

    def forward(self, input_ids):
        """`input_ids` (B, L), padded on the right -> values (B, L)."""
        hidden = self.model(input_ids)
        weight = self.score.weight if self.on or self.before is None else self.before
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 has 3 digits
            return F.linear(hidden.float(), weight.float()).squeeze(-1) - self.config.score_mean


def over_vocabulary(llama, states, tokens, function, piece=PIECE):
    """`function(logits, tokens)` for `states` (N, ..., d), `tokens` (N, ...) and the logits
    (N, ..., V), which are the largest tensors of a pass: so they are made for `piece` of the N at a
    time, and, if there are several pieces, again in the backward pass. The results are joined."""
    def compute(states, tokens):
        return function(llama.lm_head(states), tokens)

    if len(states) <= piece:
        return compute(states, tokens)
    pieces = zip(states.split(piece), tokens.split(piece))
    return torch.cat([recomputed(compute, *part) for part in pieces])


# ------------------------------------------------------------------------------------------------
# The shift between a state and its token

def states_of(hidden, places):
    """THE SHIFT: a token is chosen in the state one position before it. So the log probability and
    the value of a token are read from what the model says one column to its left. `hidden`
    (B, L, ...), `places` from `lib.data.collate` -> (N, ...), a row per completion token, in the
    order of `tokens_of`."""
    return hidden[places.row, places.column - 1]


def tokens_of(input_ids, places):
    """The N completion tokens themselves: `input_ids` (B, L) -> (N,), one text after the other."""
    return input_ids[places.row, places.column]


def last_token(values, places):
    """The entries of `values` (B, L) at the last completion token of each row, where the text is
    complete -> (B,)."""
    last = places.column.new_zeros(len(values)).scatter_reduce(0, places.row, places.column, "amax")
    return values[torch.arange(len(values), device=values.device), last]


# ------------------------------------------------------------------------------------------------
# Loading and saving

def load_llama(path, tokenizer, dtype=torch.float32, resize=False):
    """A `Llama` from a Hugging Face directory or hub name, Meta's directory, or a `.gguf` file;
    from None the demo's, tiny and random (DEMO_MODEL). Ends the program with one line if there is
    none, or if the tokenizer has more tokens than the embedding has rows; with `resize` the missing
    rows are added."""
    ids = set(tokenizer.get_vocab().values())
    if path is None:
        size = max(ids) + 1  # not len(tokenizer): some leave ids out
        llama = random_llama(LlamaConfig(vocab_size=size, **DEMO_MODEL))
    else:
        config, tensors, generation_config = checkpoints.read(path, dtype)
        checkpoints.match_embedding(path, config, tensors, tokenizer, resize)
        with torch.device("meta"):
            llama = Llama(config)
        llama.generation_config = generation_config
        checkpoints.fill(llama, tensors, path, dtype)
        llama.tie()
    unused = [row not in ids for row in range(llama.config.vocab_size)]
    if any(unused):
        llama.lm_head.unused = torch.tensor(unused)
    return llama.eval()


def random_llama(config):
    """A LLaMA that has learned nothing: Gaussian matrices, of standard deviation
    `config.initializer_range`."""
    llama = Llama(config)
    for parameter in llama.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=config.initializer_range)
    return llama


def load_scalar_head(path, dtype=torch.float32):
    """A `ScalarHead` from a saved reward model or critic, or any `LlamaForSequenceClassification`
    with one label."""
    config, tensors, _ = checkpoints.read(path, dtype, scalar=True)
    with torch.device("meta"):
        scalar = ScalarHead(LlamaBackbone(config))
    checkpoints.fill(scalar, tensors, path, dtype)
    return scalar.eval()


def save_checkpoint(model, tokenizer, folder):
    """Export a `Llama` or a `ScalarHead` with its tokenizer as a plain Hugging Face directory, in
    float32, LoRA merged. With many processes all take part, and rank 0 writes."""
    tensors = merged(model)
    if RANK == 0:
        checkpoints.write(folder, model.config, tensors, tokenizer,
                          getattr(model, "generation_config", None), isinstance(model, ScalarHead))
    wait_for_all()  # the next stage may load it


# ------------------------------------------------------------------------------------------------
# Generation

def sample(logits, temperature, top_k, top_p, uniform):
    """One token per row from softmax(logits / temperature), cut to the `top_k` likeliest (0: all)
    and to the smallest set with probability `top_p` (Holtzman et al. 2020) -> tokens (B,), log
    probabilities (B,) under that distribution. `uniform` (B, 1): random numbers in (0, 1].
    Temperature 0 takes the likeliest token, with probability 1."""
    if temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    if temperature != 1:
        logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        too_far = ordered.cumsum(-1) - ordered >= top_p  # the set was complete before this token
        logits = logits.masked_fill(too_far.scatter(-1, order, too_far), -math.inf)
    # The inverse of the cumulative distribution: the first entry that reaches the random number,
    # which is above 0, so that its probability is above 0 too. (torch.multinomial needs one for
    # each word.)
    probabilities = logits.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])
    tokens = tokens.clamp(max=logits.shape[-1] - 1)  # past it if all is nan; the loss then says so
    return tokens[:, 0], probabilities.gather(-1, tokens)[:, 0].log()


def similar(lengths):
    """Cut rows, sorted by length, into slices in which none is over twice as long as another."""
    cuts = [0]
    for i, length in enumerate(lengths):
        if length > 2 * lengths[cuts[-1]]:
            cuts.append(i)
    return [slice(*ends) for ends in zip(cuts, cuts[1:] + [len(lengths)])]


def decoding_copy(llama, dtype):
    """A plain `Llama` that computes the same in `dtype`: its adapters merged, its shards gathered.
    `ppo.answer` decodes with one in bf16 and with many processes."""
    with torch.device("meta"):
        plain = Llama(llama.config)
    plain.load_state_dict(merged(llama, dtype, everywhere=True), strict=False, assign=True)
    plain.tie()
    plain.lm_head.unused = llama.lm_head.unused
    plain.model.rotary_emb = llama.model.rotary_emb  # float32 in any case
    return plain.eval()


@torch.no_grad()
def decode(model, input_ids, attention_mask, max_new_tokens, eos_token_id, temperature=1.0, top_k=0,
           top_p=1.0, generator=None):
    """The next token of a text is `sample(lm_head(model(text))[-1])`, until one ends it (as in
    `self_test`): here with a cache, for a batch, and fast. Yields, after each token (on a GPU every
    16: to ask which rows have ended waits for it), rows of the batch (n,) and all that each has
    written: tokens and log probabilities (n, T so far). Rows that have ended are dropped many at a
    time, so what some wrote after their end is yielded too.

    `input_ids`, `attention_mask` (B, P): prompts padded on the left; `max_new_tokens` at least 1;
    `eos_token_id`: an id or a list of ids, with which a row ends, and which belongs to it. Row b
    draws its t-th token with the random number (b, t) of `generator`, whatever the other rows do.
    """
    (batch, length), device = input_ids.shape, input_ids.device
    dtype = model.lm_head.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    in_step = is_sharded(model)  # every pass needs all processes, also those whose rows have ended
    capture = can_be_captured(model)
    ends = torch.as_tensor(eos_token_id, device=device).view(-1)
    uniform = torch.ones(batch, max_new_tokens, device=device)
    if temperature:
        uniform -= torch.rand(batch, max_new_tokens, generator=generator, device=device)
    rows = attention_mask.sum(1).argsort(stable=True)  # by length; below, all is in this order
    input_ids, attention_mask, uniform = input_ids[rows], attention_mask[rows], uniform[rows]
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    blocked = -1e30  # -inf would give nan where all is blocked
    # a multiple of 16: on a GPU fused attention copies masks whose rows are not aligned
    room = -(-(length + max_new_tokens) // 16) * 16
    padding = torch.zeros(batch, 1, 1, length, dtype=dtype, device=device)
    padding[:, 0, 0].masked_fill_(attention_mask == 0, blocked)
    ahead = torch.full((length, length), blocked, dtype=dtype, device=device).triu(1)
    cache = Cache(model.config, batch, room, dtype, device)

    def next_logits(new, positions, mask, cache):
        # inference mode saves a tenth of a step on a CPU. Not with FSDP; nor under autocast, which
        # would cast each weight again for each token, since it caches no casts in that mode
        plain = device.type == "cpu" and not in_step and not torch.is_autocast_enabled("cpu")
        with torch.inference_mode(plain), torch.no_grad():
            return model.lm_head(model(new, positions, mask, cache)[:, -1]).float()

    # the prompts, those of similar length together, without the columns in which all are padded
    lengths, logits = attention_mask.sum(1).clamp(min=1).tolist(), []
    for part in [slice(0, batch)] if in_step else similar(lengths):
        seen = slice(length - lengths[part][-1], length)
        logits.append(next_logits(input_ids[part, seen], positions[part, seen],
                                  padding[part, ..., seen] + ahead[seen, seen],
                                  cache.part(part, seen)))
    first, first_logprobs = sample(torch.cat(logits), temperature, top_k, top_p, uniform[:, :1])

    # What a step reads and changes, in place: the row's last token, its position, the column of the
    # cache that it takes, its number n, and the mask over all columns.
    token, position = first[:, None], positions[:, -1:] + 1
    cache.columns, n = torch.tensor([length], device=device), torch.tensor([1], device=device)
    mask = F.pad(padding, (0, room - length), value=blocked)
    tokens = input_ids.new_zeros(batch, max_new_tokens)
    logprobs = torch.zeros(batch, max_new_tokens, device=device)
    tokens[:, 0], logprobs[:, 0] = first, first_logprobs
    ended = (token == ends).any(-1)

    def step(columns):
        mask.index_fill_(3, cache.columns, 0.0)
        logits = next_logits(token, position, mask[..., :columns], cache)
        drawn = sample(logits, temperature, top_k, top_p, uniform.index_select(1, n))
        token.copy_(drawn[0][:, None])
        tokens.index_copy_(1, n, token)
        logprobs.index_copy_(1, n, drawn[1][:, None])
        ended.logical_or_((token == ends).any(-1))
        for counter in (position, cache.columns, n):
            counter.add_(1)

    replay = None
    for done in range(1, max_new_tokens + 1):
        if device.type == "cpu" or done % 16 == 0 or done == max_new_tokens:
            yield rows, tokens[:, :done], logprobs[:, :done]
            left = (~ended).nonzero()[:, 0]  # the only wait for a GPU
            if (total(len(left)) if in_step else len(left)) == 0 or done == max_new_tokens:
                return
            # dropping ended rows copies the cache, and needs another capture
            if 0 < len(left) <= (0.5 if capture else 0.75) * len(rows):
                rows, token, position, mask, uniform, tokens, logprobs, ended = (
                    x[left]
                    for x in (rows, token, position, mask, uniform, tokens, logprobs, ended))
                cache.tensor = cache.tensor[:, :, left]
                replay = None
        if not capture:
            step(length + done)
        else:  # a graph has fixed shapes: all columns, those still empty behind the mask
            if replay is None:
                replay = captured(lambda: step(room),
                                  (token, position, cache.columns, n, mask, ended))
            replay()


@dataclass
class Generation:
    tokens: torch.Tensor    # (B, T) what was sampled; 0 after the end of a row
    logprobs: torch.Tensor  # (B, T) float32, under the distribution that it was sampled from
    mask: torch.Tensor      # (B, T) 1 on what was sampled, end-of-sequence included; 0 after it


def generate(model, input_ids, attention_mask, max_new_tokens, eos_token_id, temperature=1.0,
             top_k=0, top_p=1.0, generator=None):
    """Sample a response to each prompt -> `Generation`, T being the length of the longest response.

    `input_ids`, `attention_mask` (B, P): prompts padded on the left, each answered as if it stood
    alone. With temperature alone (no top_k, top_p), `logprobs` are what a training pass gives for
    the same tokens at that temperature, up to rounding.
    """
    tokens = input_ids.new_zeros(len(input_ids), max_new_tokens)
    logprobs = tokens.float()
    for rows, new, new_logprobs in decode(model, input_ids, attention_mask, max_new_tokens,
                                          eos_token_id, temperature, top_k, top_p, generator):
        tokens[rows, :new.shape[1]], logprobs[rows, :new.shape[1]] = new, new_logprobs
    ends = torch.isin(tokens, torch.as_tensor(eos_token_id, device=tokens.device)).long()
    mask = ends.cumsum(-1) - ends == 0  # no end stands before it
    mask[:, new.shape[1]:] = False
    longest = int(mask.sum(1).max())
    return Generation(*(x[:, :longest] for x in (
        tokens * mask, torch.where(mask, logprobs, 0.0), mask.float())))


def self_test():
    """`generate` against the naive way: for each token, the whole text through the model again, one
    text at a time."""
    torch.manual_seed(0)
    llama = random_llama(LlamaConfig(vocab_size=100, **DEMO_MODEL))
    prompts = [torch.randint(100, (n,)).tolist() for n in (1, 9, 4)]
    out = generate(llama, *left_pad(prompts, 0), 20, eos_token_id=[7, 8], temperature=0)
    for prompt, row, used in zip(prompts, out.tokens, out.mask):
        text = list(prompt)
        while len(text) < len(prompt) + 20 and not (len(text) > len(prompt) and text[-1] in (7, 8)):
            text.append(llama.lm_head(llama(torch.tensor([text]))[0, -1]).argmax().item())
        assert row[used.bool()].tolist() == text[len(prompt):], (prompt, row, text)
    print("generate gives, token for token, what the model without a cache does")


if __name__ == "__main__":
    self_test()
