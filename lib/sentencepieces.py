"""sentencepiece's models, which LLaMA 1 and 2 have, as tokenizers of Hugging Face's library."""

import re

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of its pieces


def is_markup(token, template):
    """Whether the chat template writes it to tell who speaks, as <|im_start|>. (A tag with an end,
    such as <think> and </think>, is part of what is said.)"""
    tag = re.fullmatch(r"</?(\w+)>", token)
    return (bool(re.fullmatch(r"[<\[].+[>\]]", token)) and token in str(template)
            and not (tag and f"</{tag[1]}>" in str(template)))


def read_sentencepiece(model, template=""):
    """The bytes of a sentencepiece model, such as LLaMA's `tokenizer.model`, as a `Tokenizer` that
    gives the same tokens.

    sentencepiece joins the two neighbours whose union has the highest score, of equal ones the
    leftmost. A `Tokenizer` joins those that stand first in a list of pairs, which is therefore in
    the order of the scores of their unions. (Not of their ids: LLaMA gives its pieces of several
    spaces low ids and the lowest score, so that they are joined last.) Among equal scores, the
    longest left parts come first: so a run of spaces is joined from the left.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    rules = proto.normalizer_spec
    if not proto.pieces or proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise ValueError("no BPE model of sentencepiece, as LLaMA's is")
    if rules.precompiled_charsmap or rules.remove_extra_whitespaces:
        raise ValueError("it normalizes texts, which LLaMA's does not")
    pieces, scores, kinds = zip(*((p.piece, p.score, p.type) for p in proto.pieces))
    normal = {piece: score for piece, score, kind in zip(pieces, scores, kinds) if kind == NORMAL}
    pairs = [(-score, -cut, piece[:cut], piece[cut:]) for piece, score in normal.items()
             for cut in range(1, len(piece)) if piece[:cut] in normal and piece[cut:] in normal]
    pairs.sort(key=lambda pair: pair[:2])
    control = [piece for piece, kind in zip(pieces, kinds) if kind in (CONTROL, UNKNOWN)
               or kind == USER_DEFINED and is_markup(piece, template)]
    whole = {piece for piece, kind in zip(pieces, kinds) if kind == USER_DEFINED} - set(control)
    backend = Tokenizer(models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[pair[2:] for pair in pairs],
        unk_token=next((p for p, kind in zip(pieces, kinds) if kind == UNKNOWN), None),
        fuse_unk=True, byte_fallback=BYTE in kinds, ignore_merges=bool(whole)))
    spaces = [normalizers.Prepend("▁")] if rules.add_dummy_prefix else []
    spaces.append(normalizers.Replace(" ", "▁"))
    backend.normalizer = normalizers.Sequence(spaces)
    if whole:
        # User-defined pieces are cut out first, the longest first, and `ignore_merges` takes them
        # as they are. What only looks like a control token is cut too, else it would be taken so.
        cuts = [re.escape(piece) for piece in sorted(whole, key=len, reverse=True)]
        cuts += [f"{re.escape(piece[0])}(?={re.escape(piece[1:])})" for piece in control]
        cuts += ["<(?=0x[0-9A-F]{2}>)"]
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(cuts)), "isolated")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * rules.add_dummy_prefix)
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False)
                                for piece in control])
    return backend


def sentencepiece_model(pieces, scores, kinds, add_prefix):
    """The bytes of a sentencepiece model, from what a `.gguf` file states of it."""
    proto = sentencepiece_model_pb2.ModelProto()
    for piece, score, kind in zip(pieces, scores, kinds):
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = BYTE in kinds
    rules = proto.normalizer_spec
    rules.add_dummy_prefix, rules.remove_extra_whitespaces = bool(add_prefix), False
    return proto.SerializeToString()
