"""Tokenizers of the families' own kinds, trained on a few lines: llama.cpp gives the same ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tiny_checkpoint
from hand_plan import hand_plan, uniform_forms
from llama_worker import ask_llama

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.converters.export_gguf import export_gguf
from edge_moe.converters.gguf_splitting import KNOWN_NAMES, is_reached_by_merges
from edge_moe.converters.gguf_tokenizer import read_vocabulary
from edge_moe.errors import TargetError

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

CORPUS = [
    "Hello world, hello words! Hello World's weather, I'll go.\n",
    "x = foo(bar[12345])  # don't\n\n\ndef f(x):\n    return x + 1\n",
    "Grüße, naïve café, 漢字 кириллица 🙂\n\n",
] * 3
TEXTS = [
    "Hello world",
    " leading and  double   spaces\n\n\nnew lines\t tab ",
    "x = foo(bar[12345], 'it''s')  # don't I'LL",
    "CamelCase HTTPServer $price/unit 7*8=56.",
    "naïve café — 漢字 и кириллица 🙂 \r\n end",
    "",
    "<|end|>Question: 7*8?\nAnswer:",
]
W = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
T = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
S = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
REGEXES = {
    "qwen2": [rf"{W}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{T}"],
    "smaug-bpe": [rf"{W}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{T}"],
    "qwen35": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
        rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{T}"
    ],
    "gpt-4o": [
        f"{CASES[0]}{S}|{CASES[1]}{S}|" + rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{T}"
    ],
    "tekken": [f"{CASES[0]}|{CASES[1]}|" + rf"\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{T}"],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?"
        "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with room for 640 tokens."""
    folder = tmp_path_factory.mktemp("model")
    return make_tiny_checkpoint(folder, "qwen2_moe", dtype="float32", vocab_size=640)


def ids_of_llama(
    model: Path, tokenizer: Any, work: Path, bos: bool = False
) -> tuple[list[list[int]], dict[str, str]]:
    """llama.cpp's ids of `TEXTS`, and the metadata of the file."""
    from transformers import PreTrainedTokenizerFast

    folder = work / "source"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    names = {"eos_token": "<|end|>"} | ({"bos_token": "<bos>"} if bos else {})
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(folder)
    checkpoint = Checkpoint(folder)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8, "q8_0"), "gguf")
    path = export_gguf(plan, checkpoint, work / "model.gguf")
    answer = ask_llama(path, work, [5, 6], TEXTS)
    return answer.tokens, answer.metadata


def byte_level(name: str, **options: Any) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(**options))
    if name == "refact":
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    else:
        steps = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in REGEXES[name]]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        *((name, {}, name) for name in [*REGEXES, "refact"] if name != "tekken"),
        ("tekken", {"ignore_merges": True}, "tekken"),
        ("smaug-bpe", {"ignore_merges": True}, "llama-bpe"),
        ("gpt-4o", {"ignore_merges": True}, "gpt-4o"),
    ],
)
def test_byte_level_tokenizers(
    name: str, options: dict[str, Any], expected: str, model: Path, tmp_path: Path
) -> None:
    assert expected in KNOWN_NAMES
    tokenizer = byte_level(name, **options)
    found, metadata = ids_of_llama(model, tokenizer, tmp_path)
    assert metadata["tokenizer.ggml.pre"] == expected
    assert found == [tokenizer.encode(text).ids for text in TEXTS]


def sentencepiece(*, legacy: bool) -> Any:
    """BPE as converted from SentencePiece: its merges are all the pairs that give a token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    text = "\u2581" + "\u2581".join(" ".join(CORPUS).split(" "))
    vocabulary = ["<unk>", "<s>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [
        "He",
        "Hel",
        "ll",
        "Hell",
        "llo",
        "Hello",
        "lo",
        "wo",
        "wor",
        "world",
        "\u2581wo",
        "\u2581H",
    ]
    words += ["\u2581Hello", "\u2581wor", "\u2581world", "\u2581\u2581", "re", "th", "\u2581the"]
    vocabulary += words + sorted(set(text) - set("кириллица\n"))
    ids = {token: index for index, token in enumerate(vocabulary)}
    merges = [
        (word[:cut], word[cut:])
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in ids and word[cut:] in ids
    ]
    bpe = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    replace = normalizers.Replace(" ", "\u2581")
    if legacy:
        steps = [normalizers.Prepend("\u2581"), replace]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.add_special_tokens(["<unk>", "<s>", "<|end|>"])
    return tokenizer


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_tokenizers(legacy: bool, model: Path, tmp_path: Path) -> None:
    tokenizer = sentencepiece(legacy=legacy)
    found, metadata = ids_of_llama(model, tokenizer, tmp_path)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] == str(legacy).lower()
    assert found == [tokenizer.encode(text).ids for text in TEXTS]


def spaces_as_letters() -> Any:
    """Gemma's kind: spaces become U+2581, bytes are the last resort."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<pad>", "<|end|>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    lines = [line for text in CORPUS[:2] for line in text.split("\n")]
    trained.train_from_iterator(lines, trainer)
    state = json.loads(trained.to_str())
    state["model"] |= {"byte_fallback": True, "fuse_unk": True}
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 4]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


def test_tokenizers_that_merge_spaces(model: Path, tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = spaces_as_letters()
    with pytest.raises(TargetError, match="starts every text with a BOS token"):
        ids_of_llama(model, tokenizer, tmp_path / "without")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    found, metadata = ids_of_llama(model, tokenizer, tmp_path, bos=True)
    assert metadata["tokenizer.ggml.model"] == "gemma4"
    assert found == [tokenizer.encode(text).ids for text in TEXTS]


def test_merges_that_do_not_reach_a_token() -> None:
    assert is_reached_by_merges(["a", "b", "ab", "abc"], ["a b", "ab c"])
    assert not is_reached_by_merges(["a", "b", "ab", "abc"], ["a b", "b c"])


def _change(state: dict[str, Any], change: str) -> None:
    model = state["model"]
    if change == "missing":
        model["merges"].remove(["He", "l"])
    elif change == "apart":
        model["merges"].append(model["merges"].pop(model["merges"].index(["He", "ll"])))
    elif change == "first":
        state["normalizer"] = None
        metaspace = {"type": "Metaspace", "replacement": "\u2581", "split": False}
        state["pre_tokenizer"] = metaspace | {"prepend_scheme": "first"}
    else:
        model["ignore_merges"] = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "does not merge to 'Hel'"),
        ("apart", "merges of .* to 'Hell' lie apart"),
        ("first", "prepend_scheme first"),
        ("whole", "ignore_merges=True beside byte_fallback"),
    ],
)
def test_refuses_what_no_sentencepiece_model_does(
    change: str, message: str, tmp_path: Path
) -> None:
    state = json.loads(sentencepiece(legacy=True).to_str())
    _change(state, change)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TargetError, match=message):
        read_vocabulary(tmp_path, 640)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("tokenizer.json", "model", [1]),
        ("tokenizer.json", "pre_tokenizer", [1]),
        ("tokenizer.json", "added_tokens", 5),
        ("tokenizer.json", "added_tokens", [{"id": 1}]),
        ("tokenizer.json", "added_tokens", [{"id": 1, "content": 5}]),
        ("tokenizer.json", "vocab", {"a": "b"}),
        ("tokenizer.json", "merges", [1, 2]),
        ("tokenizer_config.json", "chat_template", [1, 2]),
        ("chat_template.jinja", "", b"\xff\xfe"),
    ],
)
def test_a_damaged_tokenizer_is_refused_by_name(
    name: str, key: str, value: Any, model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model, tmp_path / "source")
    path = folder / name
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        content = json.loads(path.read_text())
        place = content["model"] if key in ("vocab", "merges") else content
        place[key] = value
        path.write_text(json.dumps(content))
    checkpoint = Checkpoint(folder)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 8), "gguf")
    with pytest.raises(TargetError, match="no tokenizer's|supports BPE|cannot express"):
        build(plan, tmp_path / "out", model=folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
