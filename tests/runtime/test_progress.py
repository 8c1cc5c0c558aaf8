from __future__ import annotations

import pytest

from lora_diffusion.runtime import progress


@pytest.mark.parametrize("patience_s", [0.0, 1000.0])
def test_all_items_pass_whether_or_not_a_bar_is_shown(monkeypatch, patience_s):
    monkeypatch.setattr(progress, "_PATIENCE_S", patience_s)
    assert list(progress.watch(iter(range(5)), 5, "Counting")) == [0, 1, 2, 3, 4]
