"""The demo tokenizer: byte-level BPE with 4096 tokens and the pre-tokeniser of Qwen2.

Digits are single tokens, so a sum looks the same wherever it stands. Token 0 is <|endoftext|>.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from edge_moe.demo.corpus import DEFAULT_WORK, DOMAINS, SPLITS, read_documents

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
MODEL_MAX_LENGTH = 1024
TRAIN_CHARS = 2_500_000
ARITHMETIC_TRAIN_CHARS = 300_000
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ 'Question: ' + message.content + '\\nAnswer:' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content + '\\n\\n' }}"
    "{% else %}{{ message.content + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
)


def _training_texts(work: Path) -> Iterator[str]:
    for domain in DOMAINS:
        limit = ARITHMETIC_TRAIN_CHARS if domain == "arithmetic" else TRAIN_CHARS
        total = 0
        for text in read_documents(work, domain, "train"):
            if total >= limit:
                break
            total += len(text)
            yield text


def train_tokenizer(work: Path) -> Tokenizer:
    """Learns the merges from the training split of every domain."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(work), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which transformers loads as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL_MAX_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def tokens_path(work: Path, domain: str, split: str) -> Path:
    return work / "tokens" / f"{domain}.{split}.bin"


def encode_corpus(tokenizer: Tokenizer, work: Path) -> None:
    """Writes each split as one stream of uint16 tokens; END_OF_TEXT opens every document."""
    (work / "tokens").mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        for split in SPLITS:
            texts = read_documents(work, domain, split)
            ids: list[int] = []
            for encoding in tokenizer.encode_batch(texts):
                ids.append(0)
                ids.extend(encoding.ids)
            ids.append(0)
            np.array(ids, dtype=np.uint16).tofile(tokens_path(work, domain, split))
            chars = sum(map(len, texts)) / len(ids)
            print(f"{domain:<11}{split:<8}{len(ids):>9} tokens {chars:5.2f} characters/token")


def read_tokens(work: Path, domain: str, split: str) -> NDArray[np.uint16]:
    return np.fromfile(tokens_path(work, domain, split), dtype=np.uint16)


def fingerprint(work: Path, domain: str, split: str) -> str:
    """First 16 hex digits of the SHA-256 of a token stream."""
    return hashlib.sha256(tokens_path(work, domain, split).read_bytes()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo tokenizer, encode the corpus.")
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="cache folder")
    work: Path = parser.parse_args().work
    tokenizer = train_tokenizer(work)
    save_tokenizer(tokenizer, work / "tokenizer")
    encode_corpus(tokenizer, work)


if __name__ == "__main__":
    main()
