"""Values against annotations: wrong ones are refused, what cannot be judged never is."""

from __future__ import annotations

import pytest

from runner.annotations import mismatch
from runner.check import ConfigMistakes, check
from tests.composing import composed


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        ("int", 3),
        ("float", 3),
        ("float", 1e-3),
        ("bool", False),
        ("int | None", None),
        ("Optional[int]", None),
        ("Union[int, str]", "auto"),
        ("Literal['a', 'b'] | None", "b"),
        (["int", "None | None"][0] + " | None", None),
        ("torch.Tensor", "anything"),
        ("Sequence[float]", "anything"),
        ("_PRECISION_INPUT", "bf16"),
        ("int", [1, 2]),
        ("'int | None'", None),
    ],
)
def test_fits(annotation, value):
    assert mismatch(annotation, value) is None


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        ("int", "abc", "int"),
        ("int", 2.5, "int"),
        ("int", True, "int"),
        ("bool", 1, "bool"),
        ("float", None, "float"),
        ("Optional[int]", "abc", "int or None"),
        ("Union[int, float]", "x", "int or float"),
        ("Literal['none', 'conformal']", "conformel", "'none' or 'conformal'"),
    ],
)
def test_does_not_fit(annotation, value, expected):
    assert mismatch(annotation, value) == expected


def test_wrong_types_are_among_the_mistakes():
    options = ("trainer.max_epochs=abc", "data.horizon=1.5", "++model.net.positions=lerned", "data.drop_last=7")
    with pytest.raises(ConfigMistakes) as caught:
        check(composed("experiment=recycle", *options))
    text = str(caught.value)
    assert "4 mistakes" in text
    assert "trainer.max_epochs=abc: lightning.pytorch.Trainer expects int or None\n" in text + "\n"
    assert "data.horizon=1.5" in text and "data.drop_last=7" in text and "model.net.positions=lerned" in text
