from __future__ import annotations

import pytest

from lora_diffusion.compose.interference import overlaps
from lora_diffusion.compose.linear import Term
from tests.compose.adapters import CONV, QUERY, TEXT, dense, loha, lora

BOTH = {"unet": 1.0, "text_encoder": 1.0}


def test_cosines_are_those_of_the_dense_changes() -> None:
    first, second = Term("a", lora(0), {"unet": 0.8, "text_encoder": 1.0}), Term("b", lora(1), BOTH)
    unet, text = overlaps([first, second])
    one, other = dense(first.state), dense(second.state)
    products = {key: float((one[key] * other[key]).sum()) for key in one}
    norms = {key: float(one[key].norm() * other[key].norm()) for key in one}
    sizes = [sum(float(changes[key].norm()) ** 2 for key in (QUERY, CONV)) ** 0.5 for changes in (one, other)]
    assert (unet.first, unet.second, unet.part) == ("a", "b", "unet")
    assert unet.cosine == pytest.approx((products[QUERY] + products[CONV]) / (sizes[0] * sizes[1]), abs=1e-7)
    assert text.cosine == pytest.approx(products[TEXT] / norms[TEXT], abs=1e-7)
    assert [meeting.key for meeting in unet.most] == sorted((QUERY, CONV), key=lambda key: -abs(products[key]))
    for meeting in unet.most:
        assert meeting.cosine == pytest.approx(products[meeting.key] / norms[meeting.key], abs=1e-7)
    assert sum(meeting.share for meeting in unet.most) == pytest.approx(1)


def test_an_adapter_agrees_with_itself_and_disagrees_with_its_opposite() -> None:
    state = lora(0)
    for weight, cosine in ((0.3, 1.0), (-2.0, -1.0), (0.0, 0.0)):
        weights = {"unet": weight, "text_encoder": weight}
        for overlap in overlaps([Term("a", state, BOTH), Term("b", state, weights)], num_modules=1):
            assert overlap.cosine == pytest.approx(cosine)
            assert len(overlap.most) == (1 if weight else 0)


def test_every_pair_in_the_parts_that_both_have() -> None:
    terms = [Term("a", lora(0), BOTH), Term("b", lora(1, keys=(TEXT,)), BOTH), Term("c", lora(2, keys=(QUERY,)), BOTH)]
    found_pairs = [(overlap.first, overlap.second, overlap.part) for overlap in overlaps(terms)]
    assert found_pairs == [("a", "b", "text_encoder"), ("a", "c", "unet")]
    assert overlaps([terms[0], Term("h", loha(0), BOTH)])[0].most == ()
