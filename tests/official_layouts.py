"""Small copies of the official data sets' layouts, with their irregularities, for importer tests.

Each function writes below a folder and returns it. Numbers of images differ between classes, and
one class has a single image.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from tests.oracles_data import encoded_image

CAR_NAMES = tuple(f"Make{number % 9} Model {number}" for number in range(1, 197))


def jpeg(seed: int, mode: str = "RGB", size: tuple[int, int] = (24, 18)) -> bytes:
    """Return a JPEG of noise in mode RGB, L or CMYK."""
    stream = io.BytesIO()
    with Image.open(io.BytesIO(encoded_image(seed, "png", size))) as image:
        image.convert(mode).save(stream, "JPEG")
    return stream.getvalue()


def put(path: Path, data: bytes) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def put_images(root: Path, paths: Iterable[str]) -> None:
    """Write JPEG files: every third grey, every seventh CMYK."""
    for seed, path in enumerate(paths):
        put(root / path, jpeg(seed, "L" if seed % 3 == 1 else "CMYK" if seed % 7 == 6 else "RGB"))


def put_strays(folder: Path, name: str) -> None:
    """Write what unpacking and looking at folders leaves there."""
    put(folder / f"._{name}", b"\0\5\26\7 no image")
    put(folder / ".DS_Store", b"x")
    put(folder / "Thumbs.db", b"x")


# Class id, super-class id and name, number of images; 11,319 begins the test classes.
SOP_TRAIN = ((1, 1, "bicycle", 4), (2, 1, "bicycle", 1), (10, 3, "chair", 3))
SOP_TEST = ((11_319, 1, "bicycle", 3), (22_634, 12, "toaster", 2))


def sop_rows(classes: Sequence[tuple[int, int, str, int]], first_id: int = 1) -> list[str]:
    """Return the lines of a listing, without its header."""
    rows: list[str] = []
    for class_id, super_id, super_class, count in classes:
        for number in range(count):
            path = f"{super_class}_final/{class_id:012d}_{number}.JPG"
            rows.append(f"{first_id + len(rows)} {class_id} {super_id} {path}")
    return rows


def sop_listing(path: Path, rows: Sequence[str]) -> None:
    put(path, ("image_id class_id super_class_id path\n" + "\n".join(rows) + "\n").encode())


def sop(folder: Path) -> Path:
    """Stanford_Online_Products/ in a folder: one .jpg that is listed as .JPG, one not listed."""
    root = folder / "Stanford_Online_Products"
    train, test = sop_rows(SOP_TRAIN), sop_rows(SOP_TEST, 59_552)
    sop_listing(root / "Ebay_train.txt", train)
    sop_listing(root / "Ebay_test.txt", test)
    sop_listing(root / "Ebay_info.txt", train + test)
    put_images(root, [row.split()[3] for row in train + test])
    odd = root / "bicycle_final/000000000001_1.JPG"
    odd.rename(odd.with_suffix(".jpg"))
    put(root / "chair_final/unlisted_0.JPG", jpeg(99))
    put_strays(root / "chair_final", "000000000010_0.JPG")
    return folder


# Class, number of images.
CUB = ((1, 3), (2, 1), (100, 2), (101, 3), (200, 2))


def cub200(folder: Path) -> Path:
    """CUB_200_2011/ in a folder, with the two files that are not used."""
    root = folder / "CUB_200_2011"
    paths = [f"{c:03d}.Bird_{c}/Bird_{c}_{at:04d}.jpg" for c, count in CUB for at in range(count)]
    labels = [c for c, count in CUB for _ in range(count)]
    numbered = list(enumerate(zip(paths, labels, strict=True), start=1))
    put(root / "images.txt", "".join(f"{i} {path}\n" for i, (path, _) in numbered).encode())
    put(
        root / "image_class_labels.txt",
        "".join(f"{i} {label}\n" for i, (_, label) in numbered).encode(),
    )
    put(root / "classes.txt", "".join(f"{c} {c:03d}.Bird_{c}\n" for c in range(1, 201)).encode())
    put(
        root / "train_test_split.txt",
        "".join(f"{i} {i % 2}\n" for i, _ in numbered).encode(),
    )
    put(root / "README", b"x")
    put(folder / "attributes.txt", b"x")
    put_images(root / "images", paths)
    put_strays(root / "images/001.Bird_1", "Bird_1_0000.jpg")
    return folder


# Class of each image; 98 is the last one that trains.
CARS = (1, 1, 98, 98, 98, 99, 99, 7, 196, 196)


def annotations(path: Path, name_field: str, names: Sequence[str], classes: Sequence[int]) -> None:
    """Write a .mat file of annotations as the official ones are, with class_names."""
    fields = [name_field, "bbox_x1", "class", "test"]
    records = np.empty((1, len(names)), dtype=[(field, object) for field in fields])
    for at, (name, number) in enumerate(zip(names, classes, strict=True)):
        records[0, at] = (name, np.uint8(3), np.uint8(number), np.uint8(at % 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"annotations": records, "class_names": np.array([CAR_NAMES], dtype=object)})


def cars_annotated(folder: Path) -> Path:
    """cars_annos.mat with car_ims/."""
    paths = [f"car_ims/{at:06d}.jpg" for at in range(1, len(CARS) + 1)]
    annotations(folder / "cars_annos.mat", "relative_im_path", paths, CARS)
    put_images(folder, paths)
    put_strays(folder / "car_ims", "000001.jpg")
    return folder


def cars_devkit(folder: Path, *, nested: bool = False) -> Path:
    """cars_train/ and cars_test/ with devkit/; file names are the same in both."""
    for part, name, classes in (
        ("cars_train", "cars_train_annos.mat", CARS[::2]),
        ("cars_test", "cars_test_annos_withlabels.mat", CARS[1::2]),
    ):
        names = [f"{at:05d}.jpg" for at in range(1, len(classes) + 1)]
        annotations(folder / "devkit" / name, "fname", names, classes)
        put_images(folder / part / (part if nested else "."), names)
    annotations(folder / "devkit/cars_meta.mat", "fname", [], [])
    return folder


def car_folder(number: int) -> str:
    """Return the folder of a class in the layout by class."""
    return CAR_NAMES[number - 1]


def cars_by_class(folder: Path, *, tables: bool = True) -> Path:
    """car_data/car_data/{train,test}/<class>/ with anno_train.csv, anno_test.csv and names.csv."""
    rows: dict[str, list[str]] = {"train": [], "test": []}
    for at, number in enumerate(CARS):
        part = ("train", "test")[at % 2]
        name = f"{len(rows[part]) + 1:05d}.jpg"
        put(folder / "car_data/car_data" / part / car_folder(number) / name, jpeg(at))
        rows[part].append(f"{name},1,2,3,4,{number}\n")
    if tables:
        for part, lines in rows.items():
            put(folder / f"anno_{part}.csv", "".join(lines).encode())
        put(folder / "names.csv", "".join(f"{name}\n" for name in CAR_NAMES).encode())
    return folder


# Item, status, number of images; each test item is in query and gallery.
INSHOP = (
    (2, "train", 3),
    (7, "train", 1),
    (1, "query", 2),
    (1, "gallery", 3),
    (10, "query", 1),
    (10, "gallery", 1),
)


def inshop_rows() -> list[tuple[str, str, str]]:
    """Return image, item and status of each line."""
    return [
        (
            f"img/WOMEN/Dresses/id_{item:08d}/{'qgt'.index(status[0]):02d}_{at}_front.jpg",
            f"id_{item:08d}",
            status,
        )
        for item, status, count in INSHOP
        for at in range(count)
    ]


def inshop_listing(path: Path, rows: Sequence[tuple[str, str, str]]) -> None:
    """Write the list as it is: number of images, header, columns filled up with blanks."""
    lines = [str(len(rows)), "image_name                                       item_id eval_status"]
    lines[1] = lines[1].replace("eval_status", "evaluation_status")
    lines += [f"{name:68}{item} {status:8}   " for name, item, status in rows]
    put(path, ("\r\n".join(lines) + "\r\n").encode())


def inshop(folder: Path, images: str = "Img") -> Path:
    """Eval/ and Img/img/ as the official archives unpack."""
    rows = inshop_rows()
    inshop_listing(folder / "Eval/list_eval_partition.txt", rows)
    put_images(folder / images, [name for name, *_ in rows])
    put_strays(folder / images / "img/WOMEN/Dresses/id_00000002", "02_0_front.jpg")
    return folder
