"""No skew: training, batch scoring, a gateway and a device say the same of the same readings.

Every recording of the watches, brought into a lake as a fleet would, with holes, set-back clocks, missing values and a
new epoch: more than 10,000 windows. A forest and a logistic regression are fitted by the trainer and exported; then

- training cuts the windows and computes their features, asks scikit-learn, and runs the exported graph;
- batch scoring reads the lake by itself, and writes `predictions/<model>`;
- a gateway, a real process, is sent the windows by HTTP in the Open Inference Protocol;
- a device, another process with the agent's own rings, engine and writer, gets the readings one by one and in blocks.

Windows, `nan_count` and features are equal to the bit, labels are equal, scores of the forest are equal to the bit,
those of the regression within the family's tolerance (`trainer.families.CLOSE`).

Mutants: the two that matter most are made by the tests here at every run: a scaler before trees, and features in
float32. Those of window cutting are in `tests/property/test_models_window.py`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from contract.inference import decode_response
from contract.models import Cost, Manifest
from lake.predictions import predictions_path
from lake.query import Lake
from lake.scoring import Scorer
from lake.store import Store
from simulators.recordings import FIELDS, STREAM
from tests.integration.gateway_parts import ROOT, GatewayProcess
from tests.integration.release_parts import release
from tests.integration.skew_parts import bring_in_watches, watches, write_watches
from tests.integration.trainer_lake import open_lake
from tests.onnx_mutants import in_float32
from tests.unit.inference_parts import manifest
from trainer import export
from trainer.candidates import Candidate, Trained
from trainer.families import FAMILIES, labels_of
from trainer.material import Material, make_material
from trainer.pipeline import DATASET
from trainer.predict import predict
from trainer.recipe import Recipe
from trainer.recipe_file import parse_recipe
from trainer.runtime import open_session, run_model
from trainer.search import fit_candidate
from trainer.split import Split
from trainer.steps import StepContext, run_step
from trainer.windowset import WindowSet

# Seconds of work; on a busy machine minutes.
pytestmark = pytest.mark.timeout(600)

WINDOWS_MIN = 10_000
REQUEST_WINDOWS = 700
LEARNED_EVERY = 6
RECIPE = {
    "name": "skew",
    "task": "classification",
    "data": {"stream": STREAM, "fields": list(FIELDS)},
    "labels": {"stream": "exercise", "field": "exercise"},
    "window": {"rows": 64, "stride": 19, "gap_s": 0.5},
    "features": {"select": "none"},
    "search": {"metric": "f1_macro"},
}
PATIENT = Cost(latency_ms_p99_max=3_000.0)
"""The device ends a run after ten times this: a busy machine is not what is tried here."""
CANDIDATES = {
    "forest": Candidate(family="random_forest", params={"n_estimators": 30, "min_samples_leaf": 2}),
    "linear": Candidate(family="logistic_regression", params={"C": 0.03, "tol": 1e-3}),
}


class Said(NamedTuple):
    """What somebody says of all windows, by device and time."""

    place: np.ndarray
    """`[N]` of (device, start_us, end_us)."""
    features: np.ndarray
    """`float32[N, F]`"""
    nan_count: np.ndarray
    """`int64[N]`"""
    label: np.ndarray
    """`str[N]`"""
    score: np.ndarray
    """`float32[N]`, that of the label."""


class Model(NamedTuple):
    """An exported model and what training says."""

    trained: Trained
    manifest: Manifest
    content: bytes
    said: Said
    score: np.ndarray
    """`float32[N, K]` of the exported graph, run by the trainer."""


class World(NamedTuple):
    """The lake, the dataset that training made of it, and the models."""

    folder: Path
    store: Store
    dataset: WindowSet
    recipe: Recipe
    material: Material
    split: Split
    models: dict[str, Model]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("skew")
    store, fleet = open_lake(folder / "lake"), watches(1)
    bring_in_watches(store, fleet)
    write_watches(folder, fleet)
    recipe = parse_recipe(RECIPE, "skew")
    lake = Lake(store)
    try:
        context = StepContext(recipe=recipe, work=folder / "work", lake=lake, store=store, seed=1)
        context.work.mkdir()
        run_step(context, DATASET)
        dataset = context.windows()
    finally:
        lake.close()
    learned = np.arange(0, len(dataset), LEARNED_EVERY)
    split = Split(learned, np.setdiff1d(np.arange(len(dataset)), learned), [], "one in six learns")
    material = make_material(dataset, recipe, split, 1)
    found = World(folder, store, dataset, recipe, material, split, {})
    for name, candidate in CANDIDATES.items():
        trained = fit_candidate(material, split.train, recipe, 1, candidate)
        found.models[name] = released(found, name, trained)
    return found


def names_of(world: World, trained: Trained) -> tuple[str, ...]:
    return tuple(world.material.names[column] for column in trained.columns)


def exported(world: World, trained: Trained) -> bytes:
    return export.merge(world.material.spec, names_of(world, trained), trained, "skew").SerializeToString()


def released(world: World, name: str, trained: Trained) -> Model:
    """Export it, put it into the register, and write down what training says."""
    content = exported(world, trained)
    window = world.recipe.window
    draft = manifest(
        name,
        stream=STREAM,
        rows=window.rows,
        stride=window.stride,
        gap_s=window.gap_s,
        fields=FIELDS,
        classes=world.dataset.classes,
        features=names_of(world, trained),
    )
    draft = msgspec.structs.replace(draft, dtypes=world.dataset.meta.dtypes, limits=PATIENT)
    made = release(world.store, draft, content)
    (world.folder / f"{name}.onnx").write_bytes(content)
    (world.folder / f"{name}.manifest.json").write_bytes(msgspec.json.encode(made))
    answers = run_model(open_session(content), world.dataset.windows)
    return Model(trained, made, content, said_by_graph(world, answers), answers.score)


def said_by_graph(world: World, answers) -> Said:
    classes, windows = np.array(world.dataset.classes), world.dataset
    return sorted_by_place(
        windows.devices,
        windows.starts_us,
        windows.ends_us,
        answers.features,
        answers.nan_count,
        classes[answers.label],
        np.take_along_axis(answers.score, answers.label[:, None], axis=1)[:, 0],
    )


def sorted_by_place(devices, starts_us, ends_us, features, nan_count, label, score) -> Said:
    place = np.empty(len(starts_us), [("device", "U16"), ("start_us", "i8"), ("end_us", "i8")])
    place["device"], place["start_us"], place["end_us"] = devices, starts_us, ends_us
    order = np.argsort(place, order=["device", "start_us", "end_us"], kind="stable")
    assert len(np.unique(place)) == len(place)
    parts = (features, np.asarray(nan_count, np.int64), np.asarray(label, "U16"), score)
    return Said(place[order], *(part[order] for part in parts))


def said_in_table(table: pa.Table, device: str, start: str, end: str) -> Said:
    """Of a table of predictions."""
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    features = columns["features"].flatten().cast(pa.float32()).to_numpy()
    return sorted_by_place(
        columns[device].to_pylist(),
        columns[start].cast(pa.int64()).to_numpy(),
        columns[end].cast(pa.int64()).to_numpy(),
        features.reshape(table.num_rows, -1),
        columns["nan_count"].to_numpy(),
        columns["label"].to_pylist(),
        columns["score"].cast(pa.float32()).to_numpy(),
    )


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)


def differing(wanted: Said, found: Said) -> dict[str, int]:
    """How many windows differ in what, to the bit."""
    assert np.array_equal(found.place, wanted.place), "other windows"
    return {
        "features": int((bits(found.features) != bits(wanted.features)).any(axis=1).sum()),
        "nan_count": int((found.nan_count != wanted.nan_count).sum()),
        "label": int((found.label != wanted.label).sum()),
        "score": int((bits(found.score) != bits(wanted.score)).sum()),
    }


def same(wanted: Said, found: Said, family: str) -> None:
    """All of it is equal: to the bit, but for scores of families that have a tolerance."""
    tolerance = FAMILIES[family].tolerance
    apart = differing(wanted, found)
    if tolerance > 0:
        assert np.abs(found.score - wanted.score).max() <= tolerance
        del apart["score"]
    assert not any(apart.values()), apart


def test_the_readings_give_ten_thousand_windows_with_all_that_can_happen_to_them(world: World) -> None:
    assert len(world.dataset) >= WINDOWS_MIN
    missing = world.models["forest"].said.nan_count
    assert 0.1 < (missing > 0).mean() < 0.9
    assert len(world.dataset.classes) == 7
    assert set(world.dataset.meta.dtypes) == {"float32", "float64"}


@pytest.mark.parametrize("name", CANDIDATES)
def test_the_exported_graph_says_what_was_learned_from(world: World, name: str) -> None:
    model = world.models[name]
    columns = np.ascontiguousarray(world.material.features[:, model.trained.columns])
    asked = model.trained.scores(world.material.features)
    labels = labels_of(asked, None)
    chosen = np.take_along_axis(asked, labels[:, None], axis=1)[:, 0]
    classes, windows = np.array(world.dataset.classes), world.dataset
    missing = (~np.isfinite(windows.windows)).sum(axis=(1, 2))
    learned = sorted_by_place(
        windows.devices, windows.starts_us, windows.ends_us, columns, missing, classes[labels], chosen
    )
    same(learned, model.said, model.trained.family)


@pytest.mark.parametrize("name", CANDIDATES)
def test_batch_scoring_says_what_training_said(world: World, name: str) -> None:
    model = world.models[name]
    lake = Lake(world.store)
    try:
        done = predict(lake, world.store, Scorer(model.content, model.manifest))
        query = (
            "SELECT device, epoch_us(window_start) AS start_us, epoch_us(window_end) AS end_us, score, label, "
            f'nan_count, features FROM "{predictions_path(name)}"'
        )
        found = lake.sql(query)
    finally:
        lake.close()
    assert done.windows == len(world.dataset)
    same(model.said, said_in_table(found, "device", "start_us", "end_us"), model.trained.family)


def test_a_gateway_says_what_training_said(world: World, mosquitto, tmp_path: Path) -> None:
    settings = {"timeout_s": 100.0}
    with GatewayProcess(tmp_path, mosquitto.url, {"url": world.store.url}, inference=settings) as gateway:
        for name, model in world.models.items():
            answers = [asked(gateway, name, piece) for piece in pieces_of(world.dataset.windows)]
            parts = {key: np.concatenate([answer[key] for answer in answers]) for key in answers[0]}
            windows = world.dataset
            chosen = np.take_along_axis(parts["score"], parts["label"][:, None], axis=1)[:, 0]
            found = sorted_by_place(
                windows.devices,
                windows.starts_us,
                windows.ends_us,
                parts["features"],
                parts["nan_count"],
                parts["label_name"],
                chosen,
            )
            same(model.said, found, model.trained.family)
            # Not only that of the label: every class has its score.
            if FAMILIES[model.trained.family].tolerance == 0:
                assert parts["score"].tobytes() == model.score.tobytes()


def pieces_of(windows: np.ndarray) -> list[np.ndarray]:
    return [windows[start : start + REQUEST_WINDOWS] for start in range(0, len(windows), REQUEST_WINDOWS)]


def asked(gateway: GatewayProcess, model: str, windows: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs for some windows, over HTTP."""
    # msgspec writes NaN as null, and a float64 so that it is read back to the bit.
    tensor = {"name": "window", "shape": windows.shape, "datatype": "FP32", "data": windows.ravel().tolist()}
    status, answer, _ = gateway.request("POST", f"/v2/models/{model}/infer", msgspec.json.encode({"inputs": [tensor]}))
    assert status == 200, answer[:500]
    kinds = {"FP32": np.float32, "INT64": np.int64, "BYTES": np.str_}
    return {
        tensor.name: np.array(tensor.data, kinds[tensor.datatype]).reshape(tensor.shape)
        for tensor in decode_response(answer).outputs
    }


def test_a_device_says_what_training_said(world: World) -> None:
    program = (sys.executable, "-m", "tests.integration.skew_parts", str(world.folder))
    subprocess.run(program, cwd=ROOT, timeout=500, check=True)
    for name, model in world.models.items():
        with pa.memory_map(str(world.folder / f"{name}.predictions.arrow")) as source:
            table = pa.ipc.open_file(source).read_all()
        same(model.said, said_in_table(table, "device", "window_start", "end_us"), model.trained.family)


def test_features_in_float32_would_be_seen(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, model = export.build_graph, world.models["forest"]
    monkeypatch.setattr(export, "build_graph", lambda spec, selected: in_float32(whole(spec, selected)))
    mutant = run_model(open_session(exported(world, model.trained)), world.dataset.windows)
    apart = differing(model.said, said_by_graph(world, mutant))
    print(apart)
    assert apart["features"] > len(world.dataset) / 2
    with pytest.raises(AssertionError, match="'features'"):
        same(model.said, said_by_graph(world, mutant), "random_forest")


def test_a_scaler_before_trees_would_be_seen(world: World) -> None:
    """The trainer refuses such a pipeline; were it exported, the device would not say what was learned."""
    forest = world.models["forest"].trained
    mutant = make_pipeline(StandardScaler(), RandomForestClassifier(30, min_samples_leaf=2, random_state=1))
    learned = world.material.features[np.ix_(world.split.train, forest.columns)].astype(np.float64)
    mutant.fit(learned, world.material.labels[world.split.train])
    trained = Trained("random_forest", mutant, forest.columns, None)
    answers = run_model(open_session(exported(world, trained)), world.dataset.windows)
    asked_of = trained.scores(world.material.features)
    apart = {
        "score": int((bits(answers.score) != bits(asked_of)).any(axis=1).sum()),
        "label": int((answers.label != labels_of(asked_of, None)).sum()),
    }
    print(apart)
    assert apart["score"] > 0
