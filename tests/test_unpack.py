"""The torch unpackers equal numpy's bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from edge_moe.errors import FormError
from edge_moe.formats import FORM_NAMES, get_form
from edge_moe.formats.base import FloatArray

torch = pytest.importorskip("torch")

from edge_moe.runtime.kernels import unpack  # noqa: E402

PACKED_FORMS = FORM_NAMES[1:]


def _bits(values: FloatArray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)


@pytest.mark.parametrize("name", PACKED_FORMS)
@pytest.mark.parametrize(("rows", "width"), [(1, 256), (5, 512), (64, 768)])
def test_equals_numpy_on_packed_weights(name: str, rows: int, width: int) -> None:
    weights = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)
    weights[0, :256] = 0
    form = get_form(name)
    packed = form.pack(weights)
    found = unpack(name, torch.from_numpy(packed), width)
    assert found.dtype == torch.float32 and found.shape == (rows, width)
    assert np.array_equal(_bits(found.numpy()), _bits(form.unpack(packed, width)))


@pytest.mark.parametrize("name", PACKED_FORMS)
def test_equals_numpy_on_random_bytes(name: str) -> None:
    form = get_form(name)
    packed = np.random.default_rng(1).integers(0, 256, (16, form.row_bytes(512)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = form.unpack(packed, 512)
    found = unpack(name, torch.from_numpy(packed), 512).numpy()
    is_number = ~np.isnan(expected)  # NaN payloads may differ
    assert np.array_equal(np.isnan(found), ~is_number)
    assert np.array_equal(_bits(found[is_number]), _bits(expected[is_number]))


@pytest.mark.parametrize("name", PACKED_FORMS)
def test_single_blocks_and_odd_offsets(name: str) -> None:
    form = get_form(name)
    width = form.block_size if form.block_size > 1 else 32
    weights = np.random.default_rng(2).standard_normal((1, width)).astype(np.float32)
    packed = form.pack(weights)
    record = torch.zeros(packed.size + 3, dtype=torch.uint8)
    record[3:] = torch.from_numpy(packed[0])
    found = unpack(name, record[3:].view(1, -1), width)
    assert np.array_equal(found.numpy(), form.unpack(packed, width))


@pytest.mark.parametrize("name", PACKED_FORMS)
def test_leaves_the_packed_bytes_alone(name: str) -> None:
    form = get_form(name)
    packed = torch.from_numpy(form.pack(np.ones((2, 256), dtype=np.float32)))
    before = packed.clone()
    unpack(name, packed, 256)
    assert torch.equal(packed, before)


def test_refuses_rows_of_another_length() -> None:
    with pytest.raises(FormError, match="tq1_0 takes 54 bytes, found 55"):
        unpack("tq1_0", torch.zeros(1, 55, dtype=torch.uint8), 256)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PACKED_FORMS)
def test_equals_numpy_on_a_gpu(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    form = get_form(name)
    weights = np.random.default_rng(3).standard_normal((64, 768)).astype(np.float32)
    packed = form.pack(weights)
    found = unpack(name, torch.from_numpy(packed).cuda(), 768)
    assert np.array_equal(_bits(found.cpu().numpy()), _bits(form.unpack(packed, 768)))
