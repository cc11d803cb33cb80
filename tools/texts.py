"""Tokens as text: while they come (tools.chat), and each by itself (tools.look)."""


def text_of(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def text_pieces(tokenizer, tokens):
    """From tokens as they come, texts that join to what all of them decode to, and never end inside
    a character: while the text ends with U+FFFD, which stands for bytes that make no character, the
    rest of one may still come."""
    seen, shown = [], ""
    for token in tokens:
        seen.append(token)
        text = text_of(tokenizer, seen)
        if len(text) > len(shown) and not text.endswith("\ufffd"):
            yield text[len(shown):]
            shown = text
    if rest := text_of(tokenizer, seen)[len(shown):]:
        yield rest  # cut in the middle of a character


def shown(tokenizer, token):
    """A token's name; ␣ is a space."""
    name, text = str(tokenizer.convert_ids_to_tokens(token)), tokenizer.decode([token])
    if name[:3] == "<0x" or "\u2581" in name or "\ufffd" in text or not text:
        return name.replace("\u2581", "␣")
    return text.replace(" ", "␣")


def pieces(tokenizer, tokens):
    """{text, raw} of each token. The texts join to that of all, but where a part of a character
    shows its name."""
    found, before = [], ""
    for n, token in enumerate(tokens, 1):
        text, raw = tokenizer.decode(tokens[:n]), shown(tokenizer, token)
        own = "" if text.endswith("\ufffd") else text[len(before):]
        found.append(dict(text=own or raw, raw=raw))
        before += own
    return found
