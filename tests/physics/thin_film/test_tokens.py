"""Tokens, ids and masks; ids are whatever the list says."""

from __future__ import annotations

import json

import pytest
import torch

from physics.thin_film.generator import SPACES
from physics.thin_film.tokens import Layer, Vocabulary, parse_layer

SHUFFLED = ["TiO2_60", "<PAD>", "Ag_10", "<MSK>", "TiO2_20", "SiO2_100", "<EOS>", "Ag_25.5"]


@pytest.fixture
def shuffled():
    return Vocabulary(SHUFFLED)


def test_the_paper_has_903_tokens():
    vocabulary = SPACES["paper"].vocabulary()
    assert len(vocabulary) == 903 and len(vocabulary.materials) == 18 and int(vocabulary.is_layer.sum()) == 900
    assert vocabulary.tokens[vocabulary.id("Ag_500")] == "Ag_500"


def test_ids_follow_the_list(shuffled):
    assert [shuffled.tokens[i] for i in (shuffled.eos, shuffled.pad, shuffled.msk)] == ["<EOS>", "<PAD>", "<MSK>"]
    assert shuffled.materials == ("TiO2", "Ag", "SiO2")
    ids = shuffled.encode([("Ag", 25.5), "SiO2_100", Layer("TiO2", 20)], length=6)
    assert ids.tolist() == [7, 5, 4, 6, 1, 1]
    assert shuffled.decode(ids) == [("Ag", 25.5), ("SiO2", 100.0), ("TiO2", 20.0)]
    assert shuffled.text(ids) == "Ag_25.5 SiO2_100 TiO2_20"
    assert shuffled.encode([]).tolist() == [shuffled.eos]


def test_layers_end_at_the_first_eos_and_special_tokens_are_none(shuffled):
    sequence = shuffled.encode(["Ag_10", "TiO2_60"], 6)
    sequence[1] = shuffled.msk
    sequence[4] = shuffled.id("SiO2_100")  # after EOS
    material, thickness = shuffled.layers(sequence[None])
    assert material.tolist() == [[1, -1, -1, -1, -1, -1]] and thickness.tolist() == [[10, 0, 0, 0, 0, 0]]
    assert shuffled.decode(sequence) == [("Ag", 10.0)]


@pytest.mark.parametrize(
    ("tokens", "well_formed"),
    [
        ("Ag_10 TiO2_60 <EOS> <PAD> <PAD>", True),
        ("Ag_10 TiO2_60 SiO2_100 TiO2_20 <EOS>", True),
        ("<EOS> <PAD> <PAD> <PAD> <PAD>", True),
        ("Ag_10 TiO2_60 SiO2_100 TiO2_20 Ag_10", False),  # no EOS
        ("Ag_10 <PAD> TiO2_60 <EOS> <PAD>", False),
        ("Ag_10 <MSK> <EOS> <PAD> <PAD>", False),
        ("Ag_10 <EOS> <PAD> <EOS> <PAD>", False),
        ("Ag_10 <EOS> TiO2_60 <PAD> <PAD>", False),
        ("Ag_10 <EOS> <MSK> <PAD> <PAD>", False),
    ],
)
def test_well_formed_sequences(shuffled, tokens, well_formed):
    ids = torch.tensor([shuffled.id(t) for t in tokens.split()])
    assert shuffled.well_formed(ids[None]).tolist() == [well_formed]
    assert bool(shuffled.well_formed(ids)) is well_formed


def test_allowed_tokens(shuffled):
    def names(**limits):
        return {shuffled.tokens[i] for i in shuffled.allowed(**limits).nonzero()[:, 0].tolist()}

    always = {"<EOS>", "<PAD>"}
    layers = set(SHUFFLED) - {"<EOS>", "<PAD>", "<MSK>"}
    assert names() == layers | always
    assert names(exclude=["metals"]) == {"TiO2_60", "TiO2_20", "SiO2_100"} | always
    assert names(allow=["Ag", "SiO2_100"]) == {"Ag_10", "Ag_25.5", "SiO2_100"} | always
    assert names(allow=["dielectrics"], exclude=["TiO2_20"]) == {"TiO2_60", "SiO2_100"} | always
    assert names(exclude=["semiconductors"]) == layers | always  # none there: nothing to exclude
    for limits, message in (
        ({"allow": []}, "leaves no layer token"),
        ({"exclude": ["metals", "dielectrics"]}, "leaves no layer token"),
        ({"allow": ["Gold"]}, "allow: 'Gold' is unknown"),
        ({"exclude": ["Ag_11"]}, "exclude: 'Ag_11' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            shuffled.allowed(**limits)


def test_files(tmp_path, shuffled):
    shuffled.save(tmp_path / "tokens.json")
    assert json.loads((tmp_path / "tokens.json").read_text()) == SHUFFLED
    again = Vocabulary.load(tmp_path / "tokens.json")
    assert again == shuffled and hash(again) == hash(shuffled) and again != Vocabulary(SHUFFLED[::-1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", r"tokens\.json, line 1, column 2: no JSON"),
        ('{"a": 1}', "must be a list"),
        ("[1, 2]", "must be a list"),
        ('["Ag_10", "<EOS>", "<PAD>"]', "tokens.json: special tokens are missing: <MSK>"),
        ('["<EOS>", "<PAD>", "<MSK>"]', "no layer token"),
        ('["Ag_10", "Ag_10", "<EOS>", "<PAD>", "<MSK>"]', "more than once: Ag_10"),
        ('["Ag_10", "Ag", "<EOS>", "<PAD>", "<MSK>"]', "token 1: 'Ag' is no layer"),
        ('["<BOS>", "Ag_10", "<EOS>", "<PAD>", "<MSK>"]', "token 0: '<BOS>' is no layer"),
    ],
)
def test_broken_files(tmp_path, text, message):
    (tmp_path / "tokens.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Vocabulary.load(tmp_path / "tokens.json")


def test_unknown_tokens(shuffled):
    with pytest.raises(ValueError, match="unknown token 'TiO2_61'; close: TiO2_60"):
        shuffled.id("TiO2_61")
    with pytest.raises(ValueError, match="unknown token 'Xy_7'"):
        shuffled.encode([("Xy", 7)])
    with pytest.raises(ValueError, match="2 layers and EOS do not fit into a sequence of 2"):
        shuffled.encode(["Ag_10", "TiO2_60"], 2)
    with pytest.raises(ValueError, match="id 8 is outside"):
        shuffled.decode([8])


def test_layers_as_text():
    assert parse_layer("my_glass_12.5") == Layer("my_glass", 12.5)
    assert str(Layer("Ag", 10.0)) == "Ag_10"
    for token in ("Ag", "_10", "Ag_", "Ag_-1", "Ag_0", "Ag_inf", "Ag_nan"):
        with pytest.raises(ValueError, match="is no layer"):
            parse_layer(token)
    with pytest.raises(ValueError, match="at least one material"):
        Vocabulary.build([], [10])
