from __future__ import annotations

import pytest

from lora_diffusion.core.errors import DataError
from lora_diffusion.data.preflight import find_images
from tests.data.conftest import Dataset

SUBJECT = "10_sks dog"


def _kept(dataset: Dataset, **settings: str) -> list[str]:
    return [sample.key for sample in dataset.read(captions="optional", **settings)]


def _fill(dataset: Dataset, **folders: int) -> None:
    for folder, number in folders.items():
        for index in range(number):
            dataset.image(f"{folder}/{index}.png", None)


@pytest.mark.parametrize(
    ("images", "reg"),
    [
        *(("img", "reg"), ("image", "Reg"), ("images", "regularization"), ("train", "regularisation_images")),
        *(
            (".", "reg-images"),
            ("img", "class_images"),
            ("img", "dog_reg"),
            ("img", "regs_dog"),
            (".", "\u6b63\u5219\u5316"),
        ),
    ],
)
def test_regularisation_images_are_no_subject(dataset, caplog, images, reg):
    for index in range(3):
        dataset.image(f"{images}/{SUBJECT}/{index}.png", f"sks dog number {index}")
        dataset.image(f"{reg}/1_dog/{index}.png", "a dog")
    dataset.image("model/sample/last_000100_00_20240101120000_42.png", None)
    dataset.text("log/events.out", "x")
    samples = dataset.read()
    assert {(sample.key.split("/")[-2], sample.num_repeats, sample.trigger) for sample in samples} == {
        (SUBJECT, 10, "sks dog")
    }
    assert len(samples) == 3
    assert f"Left out regularisation images: 3 ({reg}/1_dog/)" in caplog.text
    assert "Caption files" not in caplog.text


def test_a_class_beside_its_subject_is_regularisation(dataset, caplog):
    dataset.image(f"{SUBJECT}/a.png", None)
    dataset.image("1_dog/b.png", "a dog")
    dataset.image("class/1_dog/b.png", "a dog")
    dataset.image("5_cat/c.png", None)
    assert _kept(dataset) == [f"{SUBJECT}/a.png", "5_cat/c.png"]
    assert "Left out regularisation images: 2 (1_dog/, class/1_dog/)" in caplog.text
    dataset.text("1_dog/b.txt", "another sks dog")
    assert "1_dog/b.png" in _kept(dataset)


def test_a_folder_of_regularisation_images_that_is_given_is_pointed_out(dataset, caplog):
    dataset.image("reg/1_dog/a.png", None)
    assert len(Dataset(dataset.root / "reg").read()) == 1
    assert "named as folders of regularisation images" in caplog.text
    with pytest.raises(DataError, match=r"holds no images to train on, but 1 regularisation images \(reg/1_dog/\)"):
        dataset.read()


def test_output_folders_are_left_out_of_a_kohya_project_only(dataset, caplog):
    _fill(dataset, **{f"img/{SUBJECT}": 1, "model/x": 1, "logs": 1})
    assert _kept(dataset) == [f"img/{SUBJECT}/0.png"]
    assert "Left out images in folders in which trainers write: 2 (logs/, model/x/)" in caplog.text
    dataset.text("model/x/0.txt", "a model")
    assert "model/x/0.png" in _kept(dataset)
    (dataset.root / "img").rename(dataset.root / "cats")
    assert len(_kept(dataset)) == 3


@pytest.mark.parametrize(
    "name",
    [
        *(
            "0-masklabel.png",
            "0-condlabel.png",
            "9-masklabel.png",
            "0_mask.jpg",
            "0.mask.png",
            "0-depth.png",
            "mask_0.png",
        ),
        *("0_canny_1.png", "masks/0.png", "mask/0.png", "control/0_canny.png", "conditioning_images/0.png"),
        *("depth/0.png", "thumbs/0.png", "@eaDir/0.png/SYNOPHOTO_THUMB_XL.png", "samples/x.png", "previews/x.png"),
        *("sub/last_e000002_01_20240101120000.png", "1712345678901__000000250_0.png"),
    ],
)
def test_companions_are_no_training_images(dataset, caplog, name):
    dataset.image("0.png", "zorg one")
    dataset.image("1.png", "zorg two")
    dataset.image(name, None)
    assert _kept(dataset) == ["0.png", "1.png"]
    assert any(record.getMessage().startswith("Left out ") for record in caplog.records)
    assert [path.name for path in find_images(str(dataset.root), "evaluate.references")] == ["0.png", "1.png"]


def test_masks_beside_the_folder_of_the_images(dataset):
    _fill(dataset, images=3, masks=3)
    assert _kept(dataset) == [f"images/{index}.png" for index in range(3)]


@pytest.mark.parametrize("folder", ["masks", "samples", "model", "log", "control", "thumbs", "poses"])
def test_images_with_captions_are_kept_whatever_their_folder_is_called(dataset, folder):
    dataset.image("0.png", "zorg one")
    dataset.image(f"{folder}/carnival.png", "zorg in Venice")
    dataset.image("venetian_mask.png", None)
    dataset.image("0_pose.png", "zorg stands")
    assert len(_kept(dataset)) == 4


def test_a_run_in_the_folder_is_left_out(dataset):
    dataset.image("0.png", "zorg")
    dataset.image("runs/mine/previews/step-000100/0.png", None)
    dataset.text("runs/mine/config.yaml", "")
    dataset.text("runs/mine/metrics.jsonl", "")
    assert _kept(dataset) == ["0.png"]


def test_tables_may_name_what_is_left_out(dataset):
    dataset.image("0.png", None)
    dataset.image("0-masklabel.png", None)
    lines = ['{"file_name": "0.png", "text": "zorg"}', '{"file_name": "0-masklabel.png", "text": "a mask"}']
    dataset.text("metadata.jsonl", "\n".join(lines))
    assert [sample.captions for sample in dataset.read()] == [("zorg",)]
