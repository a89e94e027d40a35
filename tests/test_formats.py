"""Storage forms: blocks by hand, ggml's two implementations, properties, reference errors."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_moe.errors import FormError
from edge_moe.formats import (
    FORM_NAMES,
    expert_bytes,
    expert_packed_bytes,
    form_fits,
    get_form,
    pack_expert,
    unpack_expert,
)
from edge_moe.formats.base import ByteArray, FloatArray

PACKED_FORMS = FORM_NAMES[1:]
BLOCK_FORMS = tuple(name for name in PACKED_FORMS if get_form(name).block_size > 1)
TERNARY_FORMS = ("tq1_0", "tq2_0")
GGML_FORMS = tuple(  # the package lacks type 42
    name for name in PACKED_FORMS if get_form(name).ggml_type is not None and name != "q2_0"
)
GGML_BLOCKS = tuple(name for name in BLOCK_FORMS if get_form(name).ggml_type is not None)
HALF_ONE, HALF_HALF, HALF_QUARTER = [0x00, 0x3C], [0x00, 0x38], [0x00, 0x34]


def _gaussian(rows: int, width: int, seed: int = 0) -> FloatArray:
    weights: FloatArray = np.random.default_rng(seed).standard_normal((rows, width), np.float32)
    return weights


def _relative_error(name: str, weights: FloatArray) -> float:
    form = get_form(name)
    difference = form.unpack(form.pack(weights), weights.shape[-1]) - weights
    return float(np.linalg.norm(difference) / np.linalg.norm(weights))


# ---------------------------------------------------------------------------- blocks by hand


def _unpacked(name: str, block: list[int]) -> FloatArray:
    form = get_form(name)
    weights: FloatArray = form.unpack(np.array([block], dtype=np.uint8), form.block_size)[0]
    return weights


def test_q4_0_block_by_hand() -> None:
    weights = _unpacked("q4_0", [*HALF_HALF, 0x0F, 0x98] + [0x88] * 14)
    assert weights[0] == (15 - 8) / 2  # low nibble of byte 0
    assert weights[16] == (0 - 8) / 2  # high nibble of byte 0
    assert weights[1] == 0 and weights[17] == 0.5
    assert not weights[2:16].any()


def test_q8_0_block_by_hand() -> None:
    weights = _unpacked("q8_0", [*HALF_HALF, 127, 128, 255] + [0] * 29)
    assert weights[:4].tolist() == [63.5, -64, -0.5, 0]


def test_q2_0_block_by_hand() -> None:
    weights = _unpacked("q2_0", [*HALF_HALF, 0b11_10_01_00] + [0b01_01_01_01] * 15)
    assert weights[:5].tolist() == [-0.5, 0, 0.5, 1, 0]


def test_tq2_0_block_by_hand() -> None:
    weights = _unpacked("tq2_0", [0b00_01_10_00] + [0x55] * 63 + HALF_ONE)
    assert weights[[0, 32, 64, 96]].tolist() == [-1, 1, 0, -1]
    assert np.count_nonzero(weights) == 3


def test_tq1_0_block_by_hand() -> None:
    def byte(*digits: int) -> int:
        number = sum(d * p for d, p in zip(digits, (81, 27, 9, 3, 1), strict=True))
        return (number * 256 + 242) // 243

    zero = byte(1, 1, 1, 1, 1)
    block = [byte(0, 1, 2, 2, 0)] + [zero] * 31 + [byte(2, 1, 1, 1, 0)] + [zero] * 15
    block += [byte(0, 2, 1, 1, 0)] + [byte(1, 1, 1, 1, 0)] * 3 + HALF_QUARTER
    weights = _unpacked("tq1_0", block)
    assert (weights[:160:32] * 4).tolist() == [-1, 0, 1, 1, -1]
    assert (weights[160:240:16] * 4).tolist() == [1, 0, 0, 0, -1]
    assert (weights[240::4] * 4).tolist() == [-1, 1, 0, 0]
    assert np.count_nonzero(weights) == 8


def test_q2_k_block_by_hand() -> None:
    scales = [3 | 2 << 4] + [1] * 15
    weights = _unpacked("q2_k", scales + [0b11_00_00_10] + [0] * 63 + HALF_HALF + HALF_ONE)
    assert weights[0] == 0.5 * 3 * 2 - 2  # code 2, scale 3, min 2
    assert weights[1] == -2
    assert weights[96] == 0.5 * 1 * 3  # the plane at bits 6 starts at weight 96
    assert not weights[16:96].any()


def test_q3_k_block_by_hand() -> None:
    # all scales 32 + 1: low nibbles 1, high bits 2
    scales = [0x11] * 8 + [0xAA] * 4
    block = [0b0000_0011] + [0xFF] * 31 + [0b00_00_00_11] + [0] * 63 + scales + HALF_HALF
    weights = _unpacked("q3_k", block)
    assert weights[0] == 0.5 * 3  # high bit set: 4 + 3 - 4
    assert weights[32] == 0  # high bit set, low bits 0
    assert weights[64] == 0.5 * -4  # high bit clear
    assert weights[1] == 0


def test_q4_k_block_by_hand() -> None:
    # scale 0 = 2, scale 4 = 16 + 3, min 0 = 1, min 4 = 32 + 5
    scales = [2 | 1 << 6, 0, 0, 0, 1 | 2 << 6, 0, 0, 0, 3 | 5 << 4, 0, 0, 0]
    nibbles = [0x0F] + [0] * 63 + [0x07] + [0] * 63
    weights = _unpacked("q4_k", HALF_HALF + HALF_ONE + scales + nibbles)
    assert weights[0] == 0.5 * 2 * 15 - 1
    assert weights[1] == -1
    assert weights[128] == 0.5 * 19 * 7 - 37
    assert not weights[32:128].any()


def test_q5_k_block_by_hand() -> None:
    scales = [2 | 1 << 6, 0, 0, 0, 1 | 2 << 6, 0, 0, 0, 3 | 5 << 4, 0, 0, 0]  # as for q4_k
    high = [0b0001_0001] + [0] * 31  # byte 0: weights 0 and 128
    nibbles = [0x0F] + [0] * 63 + [0x07] + [0] * 63
    weights = _unpacked("q5_k", HALF_HALF + HALF_ONE + scales + high + nibbles)
    assert weights[0] == 0.5 * 2 * 31 - 1
    assert weights[1] == -1
    assert weights[128] == 0.5 * 19 * 23 - 37
    assert not weights[32:128].any()


def test_q6_k_block_by_hand() -> None:
    low = [0x3F] + [0] * 127  # weight 0: 15, weight 64: 3
    high = [0b00_11_00_11] + [0b10_10_10_10] * 63  # weights 0 and 64: 48; 32 and 96: 0
    scales = [3, 0, 1, 0, 254] + [0] * 11  # the scale of weights 64..79 is -2
    weights = _unpacked("q6_k", low + high + scales + HALF_HALF)
    assert weights[0] == 0.5 * 3 * (63 - 32)
    assert weights[1] == 0  # code 32
    assert weights[32] == 0.5 * 1 * -32
    assert weights[64] == 0.5 * -2 * (51 - 32)
    assert np.count_nonzero(weights) == 3


# ---------------------------------------------------------------------------- frozen bytes


def _ramp(width: int) -> FloatArray:
    """Weights that every float computes alike: multiples of 1/64 in -1..1, in a fixed shuffle."""
    ramp = (np.arange(width, dtype=np.float32) * 37 % 129 - 64) / 64
    return ramp.reshape(1, width).astype(np.float32)


FROZEN = {
    "int2_b64": "e439794e9e93e7e439794e9ed3e7f4390020033f",
    "int2_b32": "e439794e9e93e7e40060073f",
    "int4_b64": "40e9720c952ec750ea720ca52fc750fa730ca53fc850fa830da53fd851fa831d00a0f23d",
    "int4_b32": "40e9720c952ec750ea720ca52fc750fa0020f33d",
    "tq1_0": (
        "0f2da2af128ce50f2da2af2f8ce50f2da2af2f8ce50f36a2af2f8ce50f36a2afcb4a61de24456ece"
        "4a61de249a6ece4ae40d8cf76339"
    ),
    "tq2_0": (
        "5094294290a50a5094294294a50a5094294294a50a50a4294294a50a50a429420a5094294290a50a"
        "5094294294a50a5094294294a50a50a4294294a50a50a4296339"
    ),
    "q2_0": "19b81bc686b1616c181bc686b1612c180bc6",
    "q2_k": (
        "ffbeffdead9ecebefecdbfefdf9edfbe94e93e4395fa4f94e93e4395fa4f94e93e4394e94e94e93e"
        "4394e94e94e93e434f90e53a53a5fa4f90e53a53a5fa4f90e93e4394ea4f94e93e4394ea4f94e93e"
        "bc28682c"
    ),
    "q3_k": (
        "9aa66ddbb664499aa66ddbb665599aa66ddbb6655992266ddbb6655992266ddb3852f96f852f9638"
        "52f96f852c963852f96f852c96f852f96f852c96f852f96f963852f96f852f963852f96f852c9638"
        "52f96f852c96f852f96f852c96f852f96676ffff1000aaaa0000ffffaca0"
    ),
    "q4_0": "0030a0e5397ec2075ca0e5397ec3175ca0e5",
    "q4_k": (
        "8517d923fffefffefffaf5f1ffae6f1e2075ca0f52a7fc2075ca0f52a7fc2085da0f53a8fd3085da"
        "0f53a8fd3085da0f75ca0f52a7fc2075da0f52a7fc2085da0f52a7fc3085da0f53a8fd3085da0f53"
        "fc2075ca0f52a7fc2075ca0f52a7fc2085da0f53a8fd3085da0f53a8fd3085da2075ca0f52a7fc20"
        "75da0f52a7fc2085da0f53a8fd3085da0f53a8fd3085da0f"
    ),
    "q5_k": (
        "8f131324fffefefefffaf5f1feae6f1e300cc771188ee3300cc771188ef3388ee7711ccff3388ee7"
        "711ccff3388ee77150fa940ea54fe950fa940ea55ff9510ba41eb650fa610ba51fb650fa610ba51f"
        "fa940ea54fe950fa940ea54ff9500aa41fb550fa610ba51fb650fa610ba51fb6e950fa940ea54fe9"
        "50fa950fa650fa510ba51fb650fa610ba51fb650fa610ba550fa940ea54fe950fa940ea54ff9510a"
        "a41eb650fa610ba51fb650fa610ba51f"
    ),
    "q6_k": (
        "af5d0b49f6a4f2af5d0b49f5a3e19e4c162ae9bdc08043172aeaadb17044071bdaaea27034080cda"
        "aea26135090dcb9f9dbfcbe7234551adbedae6324460acce2e60a2f5c8195c3f70b3f6d81a5c3f71"
        "53162ae9bdc08043172aeaadb17044071cdaaea27034080cda9ea26135090dcb519dbfcbe7234551"
        "adbedae6324460ac6316cdb0570afd6316cdb0570afd6316027f98c573acd9027f98c573acd9027f"
        "ce5025fe836439ce5025fe836439ce50d9027f98c573acd9027f98c573acd9027d8d90706b727480"
        "888d907091727380398c"
    ),
    "q8_0": "082081ca145da7f03a83cc165fa9f23c85ce1861abf43e87d01a63adf64089d21c65",
}


@pytest.mark.parametrize("name", BLOCK_FORMS)
def test_bytes_on_disk_do_not_change(name: str) -> None:
    form = get_form(name)
    packed = form.pack(_ramp(form.block_size))[0].tobytes()
    assert packed.hex() == FROZEN[name]


def test_float_forms_hold_little_endian_bits() -> None:
    weights = np.array([[1.0, -2.0]], dtype=np.float32)
    assert get_form("f32").pack(weights)[0].tolist() == [0, 0, 0x80, 0x3F, 0, 0, 0, 0xC0]
    assert get_form("f16").pack(weights)[0].tolist() == [0, 0x3C, 0, 0xC0]
    assert get_form("bf16").pack(weights)[0].tolist() == [0x80, 0x3F, 0x00, 0xC0]


def test_bf16_rounds_to_nearest_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], dtype=np.uint32)
    packed = get_form("bf16").pack(bits.view(np.float32)[None])
    assert packed.view("<u2")[0].tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80]


# ---------------------------------------------------------------------------- other implementations


@pytest.mark.parametrize("name", GGML_FORMS)
def test_unpack_equals_the_gguf_package_bit_for_bit(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    form = get_form(name)
    rng = np.random.default_rng(1)
    width = form.block_size * (3 if form.block_size > 1 else 64)
    noise = rng.integers(0, 256, (32, form.row_bytes(width)), dtype=np.uint8)
    for packed in (noise, form.pack(_gaussian(16, width))):
        with np.errstate(all="ignore"):  # random fp16 scales may be NaN
            expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(form.ggml_type))
            found = form.unpack(packed, width)
        assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_grouped_forms_pack_as_the_gguf_package_does(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    form = get_form(name)
    weights = _gaussian(64, 256) * np.float32(0.02)
    weights[3] = 0
    weights[4] = 0.5
    weights[5] *= 1e-6
    expected = gguf.quants.quantize(weights, gguf.GGMLQuantizationType(form.ggml_type))
    assert np.array_equal(form.pack(weights), expected)


@cache
def _ggml() -> ctypes.CDLL:
    """ggml's C library, as llama-cpp-python brings it."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python brings libggml")
    path = Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def _ggml_pack(name: str, weights: FloatArray) -> ByteArray:
    form = get_form(name)
    rows, width = weights.shape
    packed = np.empty((rows, form.row_bytes(width)), dtype=np.uint8)
    _ggml().ggml_quantize_chunk(
        form.ggml_type, weights.ctypes.data, packed.ctypes.data, 0, rows, width, None
    )
    return packed


@pytest.mark.parametrize("name", GGML_BLOCKS)
def test_no_worse_than_ggml_on_gaussian_weights(name: str) -> None:
    weights = _gaussian(64, 1024)
    form = get_form(name)
    difference = form.unpack(_ggml_pack(name, weights), 1024) - weights
    ggml_error = float(np.linalg.norm(difference) / np.linalg.norm(weights))
    assert _relative_error(name, weights) <= ggml_error * 1.0001


@pytest.mark.parametrize("name", [*TERNARY_FORMS, "q2_0"])
def test_ggml_reads_and_writes_the_same_ternary_bytes(name: str) -> None:
    form = get_form(name)
    rng = np.random.default_rng(2)
    scale = rng.uniform(0.01, 0.2, (8, 2, 1)).astype(np.float16).astype(np.float32)
    trits = rng.integers(-1, 2, (8, 2, 256)).astype(np.float32)
    weights = (trits * scale).reshape(8, 512)
    packed = form.pack(weights)
    assert np.array_equal(form.unpack(packed, 512), weights)
    if name in TERNARY_FORMS:  # the sign of d is not unique in q2_0
        assert np.array_equal(_ggml_pack(name, weights), packed)


# ---------------------------------------------------------------------------- reference errors


@pytest.mark.parametrize("name", TERNARY_FORMS)
def test_ternary_reaches_the_optimum_on_gaussian_weights(name: str) -> None:
    # Lloyd-Max for three levels; ggml's absmax rule gives 0.807 and absmean 0.512
    assert _relative_error(name, _gaussian(256, 1024)) == pytest.approx(0.434, abs=0.002)
    form = get_form(name)
    weights = form.unpack(form.pack(_gaussian(256, 1024)), 1024)
    assert np.mean(weights == 0) == pytest.approx(0.456, abs=0.005)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("q2_0", 0.351),
        ("q2_k", 0.264),
        ("q3_k", 0.1436),
        ("q4_k", 0.0706),
        ("q5_k", 0.0354),
        ("q6_k", 0.01707),
        ("q8_0", 0.00535),
    ],
)
def test_gaussian_errors(name: str, expected: float) -> None:
    assert _relative_error(name, _gaussian(128, 1024)) == pytest.approx(expected, rel=0.01)


def test_more_bits_lose_less() -> None:
    errors = [_relative_error(name, _gaussian(32, 512)) for name in PACKED_FORMS]
    by_name = dict(zip(PACKED_FORMS, errors, strict=True))
    ladder = ["tq1_0", "q2_0", "q2_k", "q3_k", "q4_0", "q4_k", "q5_k", "q6_k", "q8_0"]
    ladder += ["bf16", "f16", "f32"]
    assert sorted(ladder, key=lambda name: -by_name[name]) == ladder


def test_ternary_is_the_global_optimum_of_small_cases() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        block = np.zeros((1, 256), dtype=np.float32)
        block[0, :4] = rng.standard_normal(4)
        form = get_form("tq2_0")
        found = float(((form.unpack(form.pack(block), 256) - block) ** 2).sum())
        best = min(_ternary_error(block[0, :4], code) for code in range(81))
        assert found <= best * 1.001 + 1e-6


def _ternary_error(weights: FloatArray, code: int) -> float:
    trits = np.array([code // 3**i % 3 - 1 for i in range(4)], dtype=np.float32)
    scale = float(weights @ trits) / max(float(trits @ trits), 1.0)
    return float(((weights - scale * trits) ** 2).sum())


# ---------------------------------------------------------------------------- properties

block_seeds = st.integers(0, 2**32 - 1)


@st.composite
def _rows(draw: st.DrawFn) -> FloatArray:
    """[2, 512] weights of very different kinds and magnitudes."""
    rng = np.random.default_rng(draw(block_seeds))
    kind = draw(st.sampled_from(["normal", "uniform", "heavy", "sparse", "constant", "one sided"]))
    shape = (2, 512)
    kinds = {
        "normal": rng.standard_normal(shape),
        "uniform": rng.uniform(-1, 1, shape),
        "heavy": rng.standard_t(2, shape),
        "sparse": rng.standard_normal(shape) * (rng.random(shape) < 0.02),
        "constant": np.full(shape, rng.choice([-1.0, 1.0])),
        "one sided": rng.uniform(0.9, 1.0, shape) * rng.choice([-1.0, 1.0]),
    }
    weights: FloatArray = (kinds[kind] * 10.0 ** draw(st.integers(-12, 2))).astype(np.float32)
    return weights


@pytest.mark.parametrize("name", PACKED_FORMS)
@settings(max_examples=40, deadline=None)
@given(weights=_rows())
def test_packing_never_loses_more_than_everything(name: str, weights: FloatArray) -> None:
    form = get_form(name)
    packed = form.pack(weights)
    assert packed.dtype == np.uint8 and packed.shape == (2, form.row_bytes(512))
    unpacked = form.unpack(packed, 512)
    assert np.isfinite(unpacked).all()
    smallest_half = 6e-8  # scales below it are zero, or off by half of it
    bound = np.linalg.norm(weights) * 1.001 + smallest_half * 130 * 32
    assert np.linalg.norm(unpacked - weights) <= bound


@pytest.mark.parametrize("name", [*TERNARY_FORMS, "f16", "bf16", "f32"])
@settings(max_examples=40, deadline=None)
@given(weights=_rows())
def test_packing_what_was_unpacked_changes_nothing(name: str, weights: FloatArray) -> None:
    form = get_form(name)
    packed = form.pack(weights)
    assert np.array_equal(form.pack(form.unpack(packed, 512)), packed)


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
@settings(max_examples=40, deadline=None)
@given(weights=_rows())
def test_grouped_forms_are_within_a_step(name: str, weights: FloatArray) -> None:
    form = get_form(name)
    groups = weights.reshape(-1, 32)
    step = np.abs(groups).max(axis=1, keepdims=True) / (8 if name == "q4_0" else 127)
    difference = np.abs(form.unpack(form.pack(weights), 512).reshape(-1, 32) - groups)
    assert (difference <= step * 1.05 + 6e-8 * 130).all()


@pytest.mark.parametrize("name", PACKED_FORMS)
def test_zero_rows_stay_zero(name: str) -> None:
    form = get_form(name)
    weights = np.concatenate([np.zeros((1, 512), np.float32), _gaussian(1, 512)])
    unpacked = form.unpack(form.pack(weights), 512)
    assert not unpacked[0].any() and unpacked[1].any()


@pytest.mark.parametrize("name", PACKED_FORMS)
@pytest.mark.parametrize("value", [0.25, -0.25])
def test_equal_weights_are_kept(name: str, value: float) -> None:
    form = get_form(name)
    unpacked = form.unpack(form.pack(np.full((1, 256), value, np.float32)), 256)
    assert np.allclose(unpacked, value, rtol=2e-3)


@pytest.mark.parametrize("name", PACKED_FORMS)
def test_leading_axes_are_kept_and_rows_are_independent(name: str) -> None:
    form = get_form(name)
    weights = _gaussian(6, 256).reshape(2, 3, 256)
    packed = form.pack(weights)
    assert packed.shape == (2, 3, form.row_bytes(256))
    assert np.array_equal(packed[1, 2], form.pack(weights[1, 2]))
    assert form.unpack(packed, 256).shape == (2, 3, 256)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_moe.formats import blocks

    weights = _gaussian(8, 512)
    whole = {name: get_form(name).pack(weights) for name in BLOCK_FORMS}
    monkeypatch.setattr(blocks, "_CHUNK_WEIGHTS", 300)
    for name, packed in whole.items():
        assert np.array_equal(get_form(name).pack(weights), packed)


# ---------------------------------------------------------------------------- refusals and registry


@pytest.mark.parametrize("name", BLOCK_FORMS)
def test_refuses_rows_that_are_not_whole_blocks(name: str) -> None:
    form = get_form(name)
    with pytest.raises(FormError, match=rf"{name}.*{form.block_size}.*{form.block_size + 16}"):
        form.pack(np.zeros((1, form.block_size + 16), np.float32))


@pytest.mark.parametrize("name", PACKED_FORMS)
def test_refuses_packed_rows_of_another_length(name: str) -> None:
    with pytest.raises(FormError, match=f"{name}.*found 7"):
        get_form(name).unpack(np.zeros((1, 7), np.uint8), 256)


@pytest.mark.parametrize("name", PACKED_FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_refuses_weights_that_are_not_finite(name: str, value: float) -> None:
    weights = _gaussian(1, 256)
    weights[0, 17] = value
    with pytest.raises(FormError, match=name):
        get_form(name).pack(weights)


@pytest.mark.parametrize("name", [name for name in PACKED_FORMS if name not in ("bf16", "f32")])
def test_refuses_weights_far_beyond_fp16(name: str) -> None:
    with pytest.raises(FormError, match=f"{name} cannot hold a weight of magnitude 1e[+]30"):
        get_form(name).pack(np.full((1, 256), 1e30, np.float32))


@pytest.mark.parametrize("name", ["tq1_0", "tq2_0", "q2_0", "q4_0"])
def test_refuses_scales_beyond_fp16(name: str) -> None:
    with pytest.raises(FormError, match=f"{name} keeps fp16 scales"):
        get_form(name).pack(np.full((1, 256), 9.9e6, np.float32))


def test_widths_decide_what_fits() -> None:
    assert form_fits("q4_k", 2048, 768) and form_fits("q6_k", 2048, 768)
    assert not form_fits("q4_k", 2048, 1408)
    assert form_fits("q4_0", 2048, 1408)
    assert form_fits("drop", 3, 5)


def test_expert_bytes_are_the_sum_of_three_matrices() -> None:
    assert expert_packed_bytes("q4_0", 64, 96) == (96 * 36, 96 * 36, 64 * 54)
    assert expert_bytes("tq1_0", 256, 512) == 3 * 512 * 54
    assert expert_bytes("drop", 256, 512) == 0


@pytest.mark.parametrize("name", PACKED_FORMS)
def test_an_expert_round_trips_as_one_record(name: str) -> None:
    form = get_form(name)
    gate, up, down = _gaussian(512, 256), _gaussian(512, 256, 1), _gaussian(256, 512, 2)
    record = pack_expert(name, gate, up, down)
    assert record.shape == (expert_bytes(name, 256, 512),)
    unpacked = unpack_expert(name, record, 256, 512)
    for matrix, found in zip((gate, up, down), unpacked, strict=True):
        assert np.array_equal(found, form.unpack(form.pack(matrix), matrix.shape[1]))
    with pytest.raises(FormError, match="takes"):
        unpack_expert(name, record[:-1], 256, 512)


def test_unknown_forms_are_named() -> None:
    with pytest.raises(FormError, match="'q9_9' is unknown; known forms: drop, tq1_0"):
        get_form("q9_9")
