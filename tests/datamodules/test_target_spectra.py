import json

import numpy as np
import pytest
import torch

from datamodules.readers.target_spectra import on_grid, read_target_spectra

GRID = np.arange(400.0, 801.0, 50.0)


def written(folder, text, name="wish.csv"):
    path = folder / name
    path.write_text(text)
    return path


def target(folder, text, name="wish.csv", **options):
    (table,) = read_target_spectra(written(folder, text, name))
    return on_grid(table, GRID, **options)


def rows(columns, values):
    return "\n".join([columns, *(f"{nm:g},{values}" for nm in GRID)])


def test_a_whole_spectrum(tmp_path):
    found = target(tmp_path, rows("nm,R,A,T", "0.2,0.3,0.5"))
    assert found.name == "wish"
    torch.testing.assert_close(found.spectrum, torch.tensor([0.2, 0.3, 0.5]).double()[:, None].expand(3, 9))
    assert (found.weight == 1).all()


def test_rows_in_any_order_and_columns_too(tmp_path):
    lines = [f"{0.1 * i:.1f},{nm:g}" for i, nm in enumerate(GRID)]
    found = target(tmp_path, "\n".join(["R,nm", *lines[::-1]]))
    torch.testing.assert_close(found.spectrum[0], torch.arange(9).double() / 10)


def test_the_third_channel_follows_and_counts(tmp_path):
    found = target(tmp_path, rows("nm,R,T", "0.25,0.5"))
    torch.testing.assert_close(found.spectrum[1], torch.full((9,), 0.25).double())
    assert (found.weight == 1).all()


def test_one_channel_leaves_the_others_open(tmp_path):
    found = target(tmp_path, rows("nm,R", "0.9"))
    assert found.weight.sum(1).tolist() == [9, 0, 0]
    torch.testing.assert_close(found.spectrum.sum(0), torch.ones(9).double())
    assert found.spectrum[1].max() == 0  # the residue is transmitted
    found = target(tmp_path, rows("nm,T", "0.9"))
    assert found.weight.sum(1).tolist() == [0, 0, 9] and found.spectrum[0, 0] == pytest.approx(0.1)


def test_a_window_leaves_other_wavelengths_open(tmp_path):
    found = target(tmp_path, "nm,R,T\n500,0.1,0.8\n550,0.2,0.7\n")
    assert found.weight.sum(0).tolist() == [0, 0, 3, 3, 0, 0, 0, 0, 0]
    assert found.spectrum[0].tolist() == pytest.approx([0.1] * 3 + [0.2] * 6)  # filled for the network
    found = target(tmp_path, "nm,R,T\n500,0.1,\n550,,0.7\n600,,\n")
    assert found.weight[:, 2].tolist() == [1, 0, 0] and found.weight[:, 3].tolist() == [0, 0, 1]
    assert found.weight[:, 4].sum() == 0


def test_weights(tmp_path):
    found = target(tmp_path, "nm,R,weight\n500,0.1,2\n550,0.2,0\n")
    assert found.weight[0].tolist() == [0, 0, 2, 0, 0, 0, 0, 0, 0]


def test_interpolation_is_asked_for_and_never_extrapolates(tmp_path):
    text = "nm,R\n420,0.2\n780,0.56\n"
    with pytest.raises(
        ValueError, match=r"wish: 420 nm is not on the grid of 400 to 800 nm, step 50.*interpolate=true"
    ):
        target(tmp_path, text)
    found = target(tmp_path, text, interpolate=True)
    assert found.weight[0].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 0]
    torch.testing.assert_close(found.spectrum[0, 1:8], torch.from_numpy(GRID[1:8] / 1000 - 0.22))
    with pytest.raises(ValueError, match="no value with a weight lies between 400 and 800 nm"):
        target(tmp_path, "nm,R\n900,0.2\n950,0.3\n", interpolate=True)


def test_several_targets_of_a_file(tmp_path):
    path = written(tmp_path, "target,nm,R\na,500,0.1\na,550,0.2\nb,500,0.3\n")
    a, b = read_target_spectra(path)
    assert (a.name, len(a.wavelength_nm), b.name, len(b.wavelength_nm)) == ("a", 2, "b", 1)


def test_json(tmp_path):
    content = [{"name": "a", "nm": [500, 550], "R": [0.1, None]}, {"nm": [500], "T": [0.3]}]
    a, b = read_target_spectra(written(tmp_path, json.dumps(content), "w.json"))
    assert a.name == "a" and b.name == "w_1" and np.isnan(a.values[0, 1])
    one = read_target_spectra(written(tmp_path, json.dumps(content[1]), "w.json"))[0]
    assert one.name == "w"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nm,R,A,T\n500,0.5,0.3,0.3\n", r"R \+ A \+ T = 1.1000 at 500 nm.*data.repair=true"),
        ("nm,R,T\n500,0.7,0.4\n", r"R \+ T = 1.1000 at 500 nm"),
        ("nm,R\n500,1.2\n", r"R=1.2 at 500 nm is outside of \[0, 1\]; data.repair=true"),
        ("nm,R\n500,-0.2\n", r"R=-0.2 at 500 nm"),
        ("nm,R\n500,98\n", r"\[0, 1\] \(are these percent\?\); data"),
        ("nm,R\n500,inf\n", "column R is infinite in row 1"),
        ("nm,R\n500,red\n", "column R holds something that is no number"),
        ("nm,R\n500,0.1\n500,0.2\n", "500 nm occurs more than once"),
        ("nm,R\n-5,0.1\n", "nm must hold positive numbers"),
        ("nm,R\n500,\n", "there is no value"),
        ("nm,X\n500,0.1\n", "unknown column 'X'"),
        ("R,T\n0.1,0.2\n", "needs a column nm"),
        ("nm,R,weight\n500,0.1,-1\n", "weight must not be negative; at 500 nm"),
        ("", "no CSV table"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        target(tmp_path, text)


def test_json_mistakes(tmp_path):
    with pytest.raises(ValueError, match="line 1, column 2: no JSON"):
        read_target_spectra(written(tmp_path, "{", "w.json"))
    with pytest.raises(ValueError, match="must be an object"):
        read_target_spectra(written(tmp_path, "[1]", "w.json"))
    with pytest.raises(ValueError, match="different lengths"):
        read_target_spectra(written(tmp_path, '{"nm": [1, 2], "R": [0.1]}', "w.json"))


def test_repair_gives_a_possible_spectrum(tmp_path):
    found = target(tmp_path, "nm,R,A,T\n500,1.2,0.3,-0.1\n550,0.5,0.3,0.3\n600,0.1,0.1,0.1\n", repair=True)
    assert (found.spectrum >= 0).all() and (found.spectrum <= 1).all()
    torch.testing.assert_close(found.spectrum.sum(0), torch.ones(9).double())


def test_rounding_is_forgiven(tmp_path):
    found = target(tmp_path, "nm,R,A,T\n500,0.3334,0.3333,0.3337\n550,1.0004,0,0\n")
    torch.testing.assert_close(found.spectrum.sum(0), torch.ones(9).double())
    assert found.spectrum.max() <= 1
