"""config.json -> the key-value part of a GGUF file, in the keys of llama.cpp."""

from __future__ import annotations

from typing import Any

from edge_moe.converters.gguf_families import GGUF_FAMILIES
from edge_moe.converters.gguf_family import GgufSource
from edge_moe.converters.gguf_keys import norm_epsilon
from edge_moe.converters.gguf_tokenizer import GgufVocabulary
from edge_moe.errors import TargetError
from edge_moe.formats import split_form
from edge_moe.plan import Plan

_QUANTIZATION_VERSION = 2
# llama.h's llama_ftype: a label for people, taken from the form that most experts have
FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q8_0": 7,
    "q2_k": 10,
    "q3_k": 12,
    "q4_k": 15,
    "q5_k": 17,
    "q6_k": 18,
    "bf16": 32,
    "tq1_0": 36,
    "tq2_0": 37,
    "q2_0": 41,
}


def check_source(source: GgufSource) -> None:
    """Refuse what llama.cpp's graph of this architecture does not compute.

    Raises:
        TargetError: names the key of config.json and its value.
    """
    spec = source.spec
    for check in GGUF_FAMILIES[spec.model_type].checks:
        missing = check(source)
        if missing is not None:
            raise TargetError(
                f"target gguf: llama.cpp's {spec.family.gguf_arch} has no {missing}: "
                "use --target native"
            )


def add_metadata(writer: Any, plan: Plan, source: GgufSource) -> None:
    """Model keys; the architecture's own prefix is added by `writer` (a gguf.GGUFWriter)."""
    spec = source.spec
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_layers)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_head_count(spec.num_attention_heads)
    writer.add_layer_norm_rms_eps(norm_epsilon(source))
    writer.add_expert_count(source.num_kept)
    writer.add_expert_used_count(spec.top_k)
    writer.add_expert_feed_forward_length(spec.expert_width)
    for add_keys in GGUF_FAMILIES[spec.model_type].keys:
        add_keys(writer, source)
    writer.add_file_type(_file_type(plan))
    writer.add_quantization_version(_QUANTIZATION_VERSION)


def add_vocabulary(writer: Any, vocabulary: GgufVocabulary) -> None:
    """Tokenizer keys."""
    writer.add_tokenizer_model(vocabulary.kind)
    if vocabulary.pre_tokenizer is not None:
        writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.token_types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    else:
        # llama.cpp insists on the key and gguf writes no empty array: an empty merge merges nothing
        writer.add_token_merges(vocabulary.merges or [""])
    if vocabulary.prefixes_space is not None:
        writer.add_add_space_prefix(vocabulary.prefixes_space)
    for kind, token_id in vocabulary.special_ids.items():
        getattr(writer, f"add_{kind}_token_id")(token_id)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _file_type(plan: Plan) -> int:
    forms = [split_form(row[plan.kept(row)[0]])[1] for row in plan.forms]
    return FILE_TYPES[max(sorted(set(forms)), key=forms.count)]
