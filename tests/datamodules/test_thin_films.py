import json

import lightning.pytorch as pl
import pytest
import torch

from datamodules.design_targets import Variants
from datamodules.stack_set import Numbers, StackSet, fingerprints, take_unlike
from datamodules.thin_films import ThinFilms
from physics.thin_film.layout import Shard, read_shard, write_shard
from tests.lightning_modules.tiny_series import quiet_trainer

SMALL = {"num_train": 600, "num_val": 40, "num_test": 30, "batch_size": 50, "eval_batch_size": 16}
TINY = {"materials": ["SiO2", "TiO2"], "thickness_nm": [50, 100, 50], "num_tokens": 7, "max_layers": 2, "length": 3}


def films(**options):
    return ThinFilms(**SMALL | options)


def all_batches(loader):
    batches = list(loader)
    return {key: torch.cat([b[key] for b in batches]) for key in batches[0]}


# --------------------------------------------------------------------------------------------------------------- sets


def test_batches_are_spectra_of_their_stacks():
    data = films()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == set(data.batch_keys)
    assert batch["spectrum"].shape == (50, 3, 57) and batch["spectrum"].dtype == torch.float32
    assert batch["tokens"].shape == (50, 7) and batch["tokens"].dtype == torch.int64 and (batch["weight"] == 1).all()
    simulated = data.simulate(batch["tokens"])
    assert (simulated - batch["spectrum"]).abs().max() < 6e-4  # stored in half precision
    assert data.vocabulary.well_formed(batch["tokens"]).all()
    test = all_batches(data.test_dataloader())
    assert (data.simulate(test["tokens"]) - test["spectrum"]).abs().max() < 1e-6


def test_a_set_is_the_beginning_of_a_larger_one():
    small, large = films(num_train=200), films(num_train=600)
    a, b = small.library(200), large.library(200)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.spectra, b.spectra)
    with pytest.raises(ValueError, match=r"templates: 601 stacks, but data\.num_train=600"):
        large.library(601)


def test_seeds_make_parts_and_other_seeds_other_ones():
    data = films()
    parts = {name: data.part(name).tokens for name in ("train", "val", "test")}
    other = films(test_seed=7).part("test").tokens
    assert not torch.equal(parts["test"], other)
    assert torch.equal(parts["test"], films(val_seed=3, train_seed=4).part("test").tokens)


def test_validation_has_no_stack_of_the_test_part():
    """Two materials, two thicknesses, two layers: 12 stacks in all, of which the test part has most."""
    data = films(**TINY, num_test=6, num_val=5, num_train=20)
    val, test = (fingerprints(data.part(name).tokens) for name in ("val", "test"))
    assert not torch.isin(val, test).any() and len(val) == 5
    free = ThinFilms(**SMALL)
    val, test = (fingerprints(free.part(name).tokens) for name in ("val", "test"))
    assert not torch.isin(val, test).any() and len(val) == 40


def test_test_targets_may_be_unknown_stacks():
    known, unknown = films(), films(unseen_test=True)
    train = fingerprints(known.part("train").tokens)
    assert torch.isin(fingerprints(known.part("test").tokens), train).any()
    assert not torch.isin(fingerprints(unknown.part("test").tokens), train).any()
    assert len(unknown.part("test")) == 30
    with pytest.raises(ValueError, match="the space is too small"):
        films(**TINY, unseen_test=True).part("test")


def test_fingerprints_tell_stacks_apart():
    tokens = torch.cartesian_prod(*[torch.arange(13)] * 4)
    assert len(fingerprints(tokens).unique()) == len(tokens)
    assert torch.equal(fingerprints(tokens[:5].to(torch.int16)), fingerprints(tokens)[:5])


def test_stacks_are_taken_in_order_without_those_to_avoid():
    avoid = fingerprints(torch.tensor([[3], [5]]))
    tokens, numbers = take_unlike(lambda index: index[:, None], 6, avoid)
    assert tokens[:, 0].tolist() == [0, 1, 2, 4, 6, 7] == numbers.tolist()


def test_several_files_are_one_set():
    shards = [Shard(torch.rand(n, 3, 2).half(), torch.randint(0, 9, (n, 4)).to(torch.int16)) for n in (5, 1, 7)]
    joined = Shard(torch.cat([s.spectra for s in shards]), torch.cat([s.tokens for s in shards]))
    whole = StackSet(shards)
    index = torch.tensor([12, 0, 4, 5, 6, 5])
    found = whole.gather(index)
    assert len(whole) == 13
    assert torch.equal(found.spectra, joined.spectra[index]) and torch.equal(found.tokens, joined.tokens[index])
    assert torch.equal(whole[6]["tokens"], joined.tokens[6].long())


# ----------------------------------------------------------------------------------------------------- every epoch anew


class Looking(pl.LightningModule):
    """Keeps what it sees."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append({key: value.clone() for key, value in batch.items()})
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def looked_at(data, epochs=2):
    module = Looking()
    quiet_trainer(max_epochs=epochs).fit(module, datamodule=data)
    per_epoch = len(module.seen) // epochs
    parts = [module.seen[e * per_epoch : (e + 1) * per_epoch] for e in range(epochs)]
    joined = [{k: torch.cat([b[k] for b in part]) for k in part[0]} for part in parts]
    return [{k: v[one["index"].argsort()] for k, v in one.items()} for one in joined]


def test_a_stream_has_new_stacks_in_every_epoch():
    first, second = looked_at(films(stream=True, num_train=100))
    stored = films(num_train=200).library(200)
    assert torch.equal(first["tokens"], stored.tokens[:100].long())
    assert torch.equal(second["tokens"], stored.tokens[100:].long())
    assert (first["spectrum"] - stored.spectra[:100].float()).abs().max() < 6e-4
    data = films(stream=True, num_train=100)
    assert isinstance(data.part("train"), Numbers) and torch.equal(data.library(50).tokens, stored.tokens[:50])


def test_noise_is_that_of_training_and_new_in_every_epoch():
    first, second = looked_at(films(noise=0.02))
    clean = films().library(600).spectra.float()
    for seen in (first, second):
        off = (seen["spectrum"] - clean)[:, [0, 2]]
        assert 0.01 < off.std() < 0.03
        torch.testing.assert_close(seen["spectrum"].sum(1), torch.ones(600, 57), rtol=0, atol=1e-5)
        assert seen["spectrum"].min() >= 0 and seen["spectrum"].max() <= 1
    assert (first["spectrum"] - second["spectrum"]).abs().max() > 0.01
    again, _ = looked_at(films(noise=0.02, batch_size=30))
    torch.testing.assert_close(again["spectrum"], first["spectrum"])


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_cache_is_used_and_belongs_to_its_settings(tmp_path):
    made = films(cache_dir=str(tmp_path)).library(600)
    (file,) = tmp_path.rglob("train-0.safetensors")
    stamp = file.stat().st_mtime_ns
    data = films(cache_dir=str(tmp_path))
    assert torch.equal(data.library(600).spectra, made.spectra)
    assert torch.equal(data.library(600).tokens.long(), made.tokens.long()) and file.stat().st_mtime_ns == stamp
    films(cache_dir=str(tmp_path), num_train=700).library(700)  # longer: made anew
    assert file.stat().st_mtime_ns != stamp and len(read_shard(file).tokens) == 700
    films(cache_dir=str(tmp_path), substrate="none").library(10)
    assert len(list(tmp_path.rglob("train-0.safetensors"))) == 2
    assert torch.equal(films().library(600).tokens.long(), made.tokens.long())


def test_what_is_exported_is_read_again(tmp_path):
    films(num_train=100, export_dir=str(tmp_path / "out")).prepare_data()
    source = films(num_train=100)
    data = ThinFilms(
        source="published", folder="out", data_dir=str(tmp_path), num_train=None, num_val=10, num_test=None
    )
    data.setup("fit")
    data.setup("test")
    source.setup("test")
    assert data.vocabulary == source.vocabulary
    train = data.part("train")
    assert len(train) == 90 and torch.equal(train.tokens, source.part("train").tokens[:90])
    test = all_batches(data.test_dataloader())
    assert torch.equal(test["tokens"], source.part("test").tokens)
    assert (test["spectrum"] - source.part("test").shards[0].spectra).abs().max() <= 2.0**-11
    assert (data.index - source.index).abs().max() < 1e-6
    assert not torch.isin(fingerprints(data.part("val").tokens), fingerprints(data.part("test").tokens)).any()
    few = ThinFilms(source="published", folder="out", data_dir=str(tmp_path), num_train=50, num_val=10, num_test=7)
    assert len(few.part("train")) == 50
    assert torch.equal(few.part("test").tokens, source.part("test").tokens[: 7 * 4 : 4])  # evenly spread


def test_published_files_that_do_not_fit(tmp_path):
    films(num_train=100, export_dir=str(tmp_path / "out")).prepare_data()
    options = {"source": "published", "folder": "out", "data_dir": str(tmp_path), "num_val": 10}
    with pytest.raises(ValueError, match=r"set data\.num_tokens=53"):
        ThinFilms(**options, num_tokens=54).setup("fit")
    with pytest.raises(ValueError, match=r"stacks of 7 tokens.*data\.length=6"):
        ThinFilms(**options, max_layers=5, length=6).setup("fit")
    with pytest.raises(ValueError, match=r"data\.num_val=100: the training files hold 100 stacks"):
        ThinFilms(**options | {"num_val": 100}).setup("fit")
    path = tmp_path / "out" / "test" / "test.safetensors"
    shard = read_shard(path)
    for wrong, message in ((99, "ids outside of the 53 tokens"), (3, "stack 4 is not a sequence of layers, one <EOS>")):
        tokens = shard.tokens.clone()
        tokens[4, -1] = wrong
        tokens[4, tokens[4] == 50] = wrong
        write_shard(tmp_path / "new", shard.spectra.clone(), tokens)
        (tmp_path / "new").replace(path)
        with pytest.raises(ValueError, match=message):
            ThinFilms(**options).setup("fit")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.safetensors"):
        ThinFilms(**options).setup("fit")
    tokens = json.loads((tmp_path / "out" / "tokens.json").read_text())
    (tmp_path / "out" / "tokens.json").write_text(json.dumps(["Unobtainium_20", *tokens[1:]]))
    with pytest.raises(ValueError, match="Unobtainium"):
        ThinFilms(**options).setup("fit")


def test_own_tables_of_materials(tmp_path):
    (tmp_path / "SiO2.csv").write_text("nm,n,k\n200,1.7,0\n2500,1.7,0\n")
    data = films(material_folder=str(tmp_path))
    data.setup("predict")
    assert (data.index[data.vocabulary.materials.index("SiO2")] == 1.7).all()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        films(material_folder=str(tmp_path / "none")).setup("fit")


# -------------------------------------------------------------------------------------------------------------- targets


def test_targets_by_name_mapping_and_file(tmp_path):
    (tmp_path / "wish.csv").write_text("nm,R\n300,0.5\n330,0.5\n")
    options = {"name": "dbr", "centre_nm": 700.0}
    data = films(targets=["ar_coating", options, f"file:{tmp_path / 'wish.csv'}"])
    data.setup("predict")
    assert data.target_names == ["ar_coating", "dbr", "wish"]
    batch = all_batches(data.predict_dataloader())
    assert batch["spectrum"].shape == (3, 3, 57) and batch["variants"].shape == (3, 1, 3, 57) and "tokens" not in batch
    torch.testing.assert_close(batch["variants"][:, 0], batch["spectrum"])
    assert batch["weight"][2].sum() == 2
    assert films(targets="ar_coating").targets == ["ar_coating"]
    with pytest.raises(ValueError, match="'ar_coating' occurs more than once; give one a label"):
        films(targets=["ar_coating", "ar_coating"]).setup("predict")
    twice = films(targets=["dbr", options | {"label": "red mirror"}])
    twice.setup("predict")
    assert twice.target_names == ["dbr", "red mirror"]
    with pytest.raises(ValueError, match=r"data\.targets: target='rainbow' is unknown"):
        films(targets=["rainbow"]).setup("predict")
    with pytest.raises(ValueError, match=r"data\.targets: .*middle_nm"):
        films(targets=[{"name": "dbr", "middle_nm": 3}]).setup("predict")
    with pytest.raises(ValueError, match=r"data\.targets: {'centre_nm': 700} has no name"):
        films(targets=[{"centre_nm": 700}]).setup("predict")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        films(targets=["no.csv"]).setup("predict")


def test_a_region_of_interest_and_variants():
    data = films(targets=["bandpass"], roi_nm=[500, 700], variants=Variants(number=4, fill="smooth_random"))
    data.setup("predict")
    batch = all_batches(data.predict_dataloader())
    counted = batch["weight"][0].sum(0) > 0
    assert data.wavelength_nm[counted].tolist() == [510, 540, 570, 600, 630, 660, 690]
    assert batch["variants"].shape == (1, 4, 3, 57)
    torch.testing.assert_close(batch["variants"][:, 0], batch["spectrum"])
    assert (batch["variants"][:, 1:] - batch["spectrum"][:, None]).abs().amax((2, 3)).min() > 0.01
    torch.testing.assert_close(batch["variants"].sum(2), torch.ones(1, 4, 57))
    with pytest.raises(ValueError, match="leaves nothing"):
        films(targets=["bandpass"], roi_nm=[2500, 2600]).setup("predict")


# ------------------------------------------------------------------------------------------------------- wrong settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "files"}, "data.source='files'"),
        ({"source": "published"}, "needs a folder"),
        ({"folder": "x"}, "data.source=generator has none"),
        ({"num_train": 0}, r"data\.num_train=0"),
        ({"num_train": None}, r"data\.num_train=null"),
        ({"max_layers": 0, "length": 1}, r"data\.max_layers=0"),
        ({"val_seed": 1}, "must differ"),
        ({"num_tokens": 54}, r"set data\.num_tokens=53"),
        ({"length": 8}, r"set data\.length=7"),
        ({"num_wavelengths": 58}, r"set data\.num_wavelengths=57"),
        ({"wavelength_nm": [300, 1980, 31]}, "the step does not lead"),
        ({"wavelength_nm": [300, 1980]}, "first value, the last one and the step"),
        ({"stream": True, "unseen_test": True}, r"set data\.stream=false"),
        ({"roi_nm": [700, 500]}, "first and the last wavelength"),
        ({"noise": -1.0}, "must not be negative"),
        ({"materials": []}, r"data\.materials is empty"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        films(**options)


def test_unknown_material_and_substrate_are_named():
    with pytest.raises(ValueError, match="SiO2"):
        films(materials=["Ag", "SiO3"], num_tokens=23).setup("fit")
    with pytest.raises(ValueError, match="substrate='glass'"):
        films(substrate="glass").setup("fit")
    with pytest.raises(ValueError, match=r"variants\.number=0"):
        Variants(number=0)
