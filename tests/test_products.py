"""Float32 products by oneDNN: as exact as before, only where they are, and never left behind."""

import threading

import pytest
import torch

from patchsae.runs import products
from patchsae.runs.products import WORSE, fast_float32, onednn_is_exact

SETTING = torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def as_before():
    before = SETTING.fp32_precision
    yield
    assert SETTING.fp32_precision == before, "left behind"
    onednn_is_exact.cache_clear()


@pytest.mark.parametrize("shape", [(3, 197, 33, 190), (1, 3152, 128, 512), (1, 788, 768, 3072)])
def test_products_have_the_error_of_float32(shape):
    many, rows, inner, columns = shape
    a, b = torch.randn(many, rows, inner), torch.randn(many, inner, columns)
    exact = a.double() @ b.double()
    plain = ((a @ b).double() - exact).norm()
    with fast_float32():
        assert ((a @ b).double() - exact).norm() <= WORSE * plain


def test_the_last_block_that_ends_takes_the_setting_back(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_exact", lambda: True)
    before, inside, seen = SETTING.fp32_precision, threading.Event(), []

    def longer():
        with fast_float32():
            inside.wait()
            seen.append(SETTING.fp32_precision)

    with pytest.raises(ValueError), fast_float32():
        thread = threading.Thread(target=longer)
        thread.start()
        with fast_float32():
            pass
        assert SETTING.fp32_precision == "bf16"
        raise ValueError
    inside.set()
    thread.join()
    assert seen == ["bf16"] and SETTING.fp32_precision == before
    torch.get_float32_matmul_precision()  # refuses where settings are mixed


def test_an_older_torch_multiplies_as_it_did(monkeypatch):
    onednn_is_exact.cache_clear()
    monkeypatch.delattr(type(torch.backends.mkldnn), "matmul")
    with fast_float32():
        assert not onednn_is_exact()


def test_where_products_are_rounded_it_is_not_asked(monkeypatch):
    """A matrix unit as oneDNN would use it: bfloat16 wherever that is allowed."""
    real = torch.Tensor.__matmul__

    def rounding(a, b):
        low = SETTING.fp32_precision == "bf16" and a.dtype == torch.float32
        return real(a.bfloat16(), b.bfloat16()).float() if low else real(a, b)

    onednn_is_exact.cache_clear()
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert not onednn_is_exact()
    with fast_float32():
        assert SETTING.fp32_precision != "bf16"
