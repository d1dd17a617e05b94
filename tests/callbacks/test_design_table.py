import csv
import json

import pytest
import torch

from callbacks.design_table import DesignTable, draw_sweep, markdown, plain
from callbacks.design_writer import DesignWriter
from callbacks.figures import thin_film
from callbacks.figures.callback import FiguresCallback
from callbacks.run_record import RunRecord
from tests.lightning_modules.thin_film_set import decoder, films, module
from tests.lightning_modules.tiny_series import quiet_trainer

PLOTS = (
    "target_and_candidate", "best_so_far", "mae_histogram", "denoising_trajectory", "bragg_motifs", "optical_constants",
)  # fmt: skip


def stats(mean):
    return {"mean": mean, "median": mean / 2, "p90": 2 * mean}


def test_a_table_has_a_cell_where_there_is_a_value():
    rows = [
        {"method": "template", "best": stats(0.02), "refined": stats(0.01)},
        {"method": "net", "N": 10, "first": stats(0.04), "best": stats(0.02)},
    ]
    lines = markdown(rows).splitlines()
    assert lines[2] == "| template |  |  | 0.0200 / 0.0100 |  | 0.0100 / 0.0050 |"
    assert lines[3] == "| net | 10 | 0.0400 / 0.0200 | 0.0200 / 0.0100 |  |  |"
    assert plain({"method": "a", "best": {"mean": torch.tensor(2.0)}}) == {"method": "a", "best": {"mean": 2.0}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a test and a prediction with tables, files and figures, the module and the data."""
    folder = tmp_path_factory.mktemp("run")
    own, data = module(baselines={"gpt": decoder()}), films(targets=["ar_coating", "bandpass"], num_test=5)
    figures = FiguresCallback([f"callbacks.figures.thin_film.{p}" for p in PLOTS], folder / "figures", dpi=40)
    callbacks = [
        RunRecord(str(folder), {"name": "x"}),
        DesignTable(folder / "predictions"),
        figures,
        DesignWriter(folder / "predictions", figures_dir=folder / "figures", max_figures=1),
    ]
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=1)
    with pytest.warns(UserWarning) as caught:
        trainer.fit(own, datamodule=data)
        trainer.test(own, datamodule=data, verbose=False)
        trainer.predict(own, datamodule=data)
    assert not [w for w in caught if "was not drawn" in str(w.message)]
    return folder, own, data


def test_the_table_of_a_run(finished):
    folder, own, _ = finished
    record = json.loads((folder / "results.json").read_text())["thin_film"]
    rows = own.results_table()
    assert [row["method"] for row in record["table"]] == [row["method"] for row in rows]
    assert record["table"][-2]["refined"]["mean"] == pytest.approx(float(rows[-2]["refined"]["mean"]))
    assert record["stacks_per_s"]["net"] > 0 and record["stacks_per_s"]["gpt"] > 0
    text = (folder / "predictions/comparison.md").read_text()
    assert "| OptoLlama | 6 |" in text and "(equal storage)" in text
    with (folder / "predictions/comparison.csv").open() as file:
        written = list(csv.DictReader(file))
    assert float(written[-2]["refined_mean"]) == pytest.approx(float(rows[-2]["refined"]["mean"]))
    assert written[0]["first_mean"] == "" and written[-2]["N"] == "6"


def test_the_files_of_a_prediction(finished):
    folder, own, data = finished
    with (folder / "predictions/designs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["target"] for row in rows} == {"ar_coating", "bandpass"}
    first = [row for row in rows if row["target"] == "bandpass"]
    assert [int(row["rank"]) for row in first] == list(range(1, len(first) + 1))
    assert sorted(float(row["mae"]) for row in first) == [float(row["mae"]) for row in first]
    designs = json.loads((folder / "predictions/designs.json").read_text())
    best = designs[1]["candidates"][0]
    assert best["mae"] == pytest.approx(float(first[0]["mae"])) and designs[1]["substrate"] == "semi_infinite:1.5"
    # The recipe that is written down has the spectrum that is written down.
    names = list(data.vocabulary.materials)
    material = torch.tensor([[names.index(layer["material"]) for layer in best["stack"]]])
    thickness = torch.tensor([[layer["thickness_nm"] for layer in best["stack"]]]).double()
    spectrum = own.refiner.simulate(material, thickness)[0]
    with (folder / "predictions/spectra.csv").open() as file:
        spectra = [row for row in csv.DictReader(file) if row["target"] == "bandpass"]
    written = torch.tensor([[float(row[c]) for row in spectra if row["rank"] == "1"] for c in "RAT"])
    assert (written - spectrum).abs().max() < 1e-3
    assert len([row for row in spectra if row["rank"] == "0"]) == 11


def test_figures_are_drawn(finished):
    folder, _, _ = finished
    assert {p.stem for p in (folder / "figures").glob("*.png")} == {*PLOTS, "ar_coating"}


def test_every_material_has_a_colour():
    colours = {thin_film.material_colour(name) for name in thin_film.MATERIALS}
    assert len(colours) == 18
    assert thin_film.material_colour("Unobtainium") in thin_film.FURTHER


def test_jobs_of_a_sweep_in_one_table(tmp_path):
    template = {"method": "template, 1000 stacks", "best": stats(0.02)}
    for job, method in enumerate(("OptoLlama", "OptoGPT")):
        (tmp_path / str(job)).mkdir()
        table = [template, {"method": method, "N": 10, "best": stats(0.01 * (job + 1))}]
        (tmp_path / str(job) / "results.json").write_text(json.dumps({"thin_film": {"table": table}}))
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["job", "model", "parameters", "status", "run_dir"])
        writer.writerow([0, "optollama", 1, "completed", tmp_path / "0"])
        writer.writerow([1, "optogpt", 1, "completed", tmp_path / "1"])
        writer.writerow([2, "other", 1, "failed", tmp_path / "2"])
    text = draw_sweep(tmp_path)
    assert text.count("template, 1000 stacks") == 1
    assert "| OptoLlama (optollama) | 10 |" in text and "| OptoGPT (optogpt) | 10 |" in text
    assert (tmp_path / "comparison.md").is_file()
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "table.csv").write_text("job,model,parameters,status,run_dir\n")
    assert "no job" in draw_sweep(tmp_path / "none")
