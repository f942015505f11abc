"""Rewrites the tokenizer inside a GGUF file as the text of a tokenizer.json.

Owns the vocabulary only, and follows `model/src/load/gguf_tokenizer.rs`, so that a server reads the same
vocabulary from the file and from the folder made of it. Knows no tensors.
"""

from .refusal import Refusal
from .tokenizer import QWEN2

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
SPACE_MARK = "\u2581"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
# Splitting rules by `tokenizer.ggml.pre`, applied one after the other.
SPLITS = (
    {"gpt-2": [GPT2], "qwen2": [QWEN2]}
    | {"default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"]}
    | dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), [r"\p{N}", GPT2])
    | dict.fromkeys(LLAMA3_NAMES, [LLAMA3])
)


def end_ids(fields: dict) -> list[int]:
    """Ids that end a completion, the first one first."""
    named = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(number for number in named if number is not None))


def vocabulary(fields: dict) -> tuple[list[str], list[int]]:
    """Tokens and their kinds in id order, without the padding at the end; named ids count as control."""
    tokens = fields.get("tokenizer.ggml.tokens")
    if not tokens:
        raise Refusal("the GGUF file holds no tokenizer (no key tokenizer.ggml.tokens)")
    kinds = list(fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens))
    for number in [*end_ids(fields), fields.get("tokenizer.ggml.bos_token_id")]:
        if number is not None and kinds[number] in (NORMAL, UNUSED):
            kinds[number] = CONTROL
    used = max((number + 1 for number, kind in enumerate(kinds) if kind != UNUSED), default=0)
    return list(tokens[:used]), kinds[:used]


def bpe(tokens: list[str], merges: list[tuple[str, str]], unknown: str | None, ignore_merges: bool) -> dict:
    """The `model` part."""
    return {
        "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": unknown is not None, "byte_fallback": unknown is not None,
        "ignore_merges": ignore_merges, "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": merges,
    }


def byte_level(fields: dict, tokens: list[str]) -> dict:
    """Parts of a byte-level BPE tokenizer, `tokenizer.ggml.model = gpt2`."""
    rules = fields.get("tokenizer.ggml.pre", "default")
    if rules not in SPLITS:
        raise Refusal(f"tokenizer.ggml.pre = {rules!r} is not known; {', '.join(SPLITS)} are")
    steps: list[dict] = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in SPLITS[rules]
    ]
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": bpe(tokens, merges, None, rules in LLAMA3_NAMES),
        "adds_bos": rules in LLAMA3_NAMES,
    }


def merges_by_score(tokens: list[str], kinds: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best piece first: merges that do what scores do."""
    id_of = {token: number for number, token in enumerate(tokens)}
    ways = []
    for token, kind, score in zip(tokens, kinds, scores, strict=False):
        for at in range(1, len(token)) if kind == NORMAL else ():
            left, right = token[:at], token[at:]
            if left in id_of and right in id_of:
                ways.append((-score, id_of[left], id_of[right], left, right))
    return [(left, right) for _, _, _, left, right in sorted(ways)]


def sentence_piece(fields: dict, tokens: list[str], kinds: list[int]) -> dict:
    """Parts of a SentencePiece BPE tokenizer, `tokenizer.ggml.model = llama`."""
    if UNKNOWN not in kinds or "tokenizer.ggml.scores" not in fields:
        raise Refusal("the GGUF file's SentencePiece vocabulary has no unknown token or no scores")
    if fields.get("tokenizer.ggml.remove_extra_whitespaces") or fields.get("tokenizer.ggml.precompiled_charsmap"):
        raise Refusal("tokenizer.ggml.remove_extra_whitespaces and precompiled_charsmap are not supported")
    adds_space = fields.get("tokenizer.ggml.add_space_prefix", True)
    prepend = [{"type": "Prepend", "prepend": SPACE_MARK}] if adds_space else []
    merges = merges_by_score(tokens, kinds, fields["tokenizer.ggml.scores"])
    return {
        "normalizer": {"type": "Sequence", "normalizers": [
            *prepend, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
        ]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": bpe(tokens, merges, tokens[kinds.index(UNKNOWN)], False),
        "adds_bos": True,
    }


def template(fields: dict, tokens: list[str], adds_bos: bool) -> dict | None:
    """The part that adds begin- and end-of-text tokens, where the file asks for them."""
    bos, eos = fields.get("tokenizer.ggml.bos_token_id"), fields.get("tokenizer.ggml.eos_token_id")
    before = [bos] if fields.get("tokenizer.ggml.add_bos_token", adds_bos) and bos is not None else []
    after = [eos] if fields.get("tokenizer.ggml.add_eos_token", False) and eos is not None else []
    if not before and not after:
        return None
    special = {tokens[n]: {"id": tokens[n], "ids": [n], "tokens": [tokens[n]]} for n in before + after}

    def around(*sequences: str) -> list[dict]:
        middle = [{"Sequence": {"id": name, "type_id": 0}} for name in sequences]
        first, last = ([{"SpecialToken": {"id": tokens[n], "type_id": 0}} for n in part] for part in (before, after))
        return first + middle + last

    return {
        "type": "TemplateProcessing", "single": around("A"), "pair": around("A", "B"), "special_tokens": special,
    }


def tokenizer_json(fields: dict) -> dict:
    """The whole tokenizer.json of a GGUF file's metadata `fields`."""
    tokens, kinds = vocabulary(fields)
    model = fields.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise Refusal(f"tokenizer.ggml.model = {model!r} is not known; gpt2 and llama are")
    parts = byte_level(fields, tokens) if model == "gpt2" else sentence_piece(fields, tokens, kinds)
    adds_bos = parts.pop("adds_bos")
    added = [
        {"id": number, "content": token, "special": kind != USER_DEFINED, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False}
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "post_processor": template(fields, tokens, adds_bos)} | parts
