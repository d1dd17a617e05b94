"""The table of what a classifier predicts of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


def prediction_table(
    outputs: Mapping[str, Any] | Sequence[Mapping[str, Any]], names: Sequence[str], class_names: Sequence[str]
) -> pd.DataFrame:
    """Tabulate predict outputs, one row per image.

    Args:
        outputs: Outputs of a predict step, or a list of them: ``prediction`` (batch,) class, ``probability``
            (batch, class), ``index`` (batch,), and where known ``target``, ``entropy`` and ``mutual_information``,
            (batch,) each.
        names: Of the images of the part.
        class_names: In the order of the labels.

    Returns:
        Columns image (its name), prediction (name of the class), probability (of that class), entropy and
        mutual_information (nats) where the module delivers them, label where it is known, and origin, the number of the
        image in its part, by which the rows are sorted.
    """
    import pandas as pd

    frames = [
        _table_of_batch(batch, names, class_names)
        for batch in ([outputs] if isinstance(outputs, Mapping) else outputs)
    ]  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def _table_of_batch(outputs: Mapping[str, Any], names: Sequence[str], class_names: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    index = outputs["index"].tolist()
    prediction = outputs["prediction"].cpu()
    probability = outputs["probability"].cpu().gather(1, prediction[:, None])[:, 0]
    columns: dict[str, Any] = {
        "image": [names[i] for i in index],
        "prediction": [class_names[c] for c in prediction.tolist()],
        "probability": probability.double().numpy().round(6),
    }
    for name in ("entropy", "mutual_information"):
        if outputs.get(name) is not None:
            columns[name] = outputs[name].cpu().double().numpy().round(6)
    if outputs.get("target") is not None:
        columns["label"] = [class_names[c] for c in outputs["target"].tolist()]
    return pd.DataFrame(columns | {"origin": index})
