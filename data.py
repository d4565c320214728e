"""Images for few-shot learning: read a dataset's folder, draw the shots, cut the crops.

    from data import load_dataset, few_shot, crops
    dataset = load_dataset("./dtd")                              # name, classnames, train, val, test, template
    shots = few_shot(dataset.train, 4, random.Random(1))         # 4 images per class: [(path, label), ...]
    for path, n, pixels in crops([(path, [0, 1]) for path, _ in shots], R=224):
        ...                                                      # crop n of each image: (224, 224, 3) uint8

Know before: a dataset is three lists of (path, label); nothing is decoded until it is needed.
To take away: the same seed draws the same images as the official code, and a crop is a pure
function of the image and the epoch n, so whatever is computed from it need be computed only once.

Read in this order: Dataset and few_shot, the crops, the readers, the download, the drawn textures.
Needs torch, numpy and pillow, and none of its neighbours.
"""
import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import http.client
import itertools
import json
import math
import os
import pathlib
import random
import shutil
import sqlite3
import sys
import tarfile
import time
import zlib

import numpy as np
import torch
from PIL import Image

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])         # of CLIP's training pixels, by channel
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
TEST = -1                                                        # as crop number: the test crop
Image.init()
FORMATS = [name for name in Image.OPEN if name != "EPS"]         # Pillow would have Ghostscript run an EPS file: it is a program


@dataclasses.dataclass
class Dataset:
    """train, val, test: lists of (path, label), label an index into classnames; template: the
    hand-written prompt that the zero-shot baseline uses, with {} for the class name.
    """
    name: str
    classnames: list
    train: list
    val: list
    test: list
    template: str = "a photo of a {}."


def few_shot(items, shots, rng):
    """`shots` items of each class (all of them where there are fewer), with rng a random.Random.

    Classes come in the order of their first item. With rng = Random(seed), first over the training
    list and then, with the same rng, over the validation list, these are the official code's images.

    With four images per class the luck of the draw is worth several points, so methods can only be
    compared on the same draws: hence the care for the order, and three seeds wherever it matters.
    """
    groups = {}
    for item in items:
        groups.setdefault(item[1], []).append(item)
    return [item for group in groups.values()
            for item in (rng.sample(group, shots) if shots <= len(group) else group)]


def subset(K, classes):
    """Labels of the official split: the first half, rounded up, is "base", the rest is "new"."""
    return list({"all": range(K), "base": range(math.ceil(K / 2)), "new": range(math.ceil(K / 2), K)}[classes])


def mislabel(labels, share, K, seed):
    """The labels, a share of them replaced by another class each, the same ones for the same seed."""
    dice, labels = random.Random(f"noise {seed}"), list(labels)
    for i in dice.sample(range(len(labels)), round(share * len(labels))) if K > 1 else ():
        labels[i] = (labels[i] + dice.randrange(1, K)) % K
    return labels


# ---- Crops --------------------------------------------------------------------------------------
#
# CLIP reads squares of R x R pixels. At test time that is the middle of the picture, always the same.
# For training each epoch cuts another random part: with few images that is what keeps V from learning
# them by heart. Torchvision's transforms are written out here as this needs Pillow alone.

def read_image(path):
    """Any picture that Pillow reads by itself, as RGB; its EXIF rotation is left alone, as in the official code."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.convert("RGB")
    except Exception as error:  # noqa: BLE001       Pillow raises a dozen kinds for damaged files
        raise ValueError(f"cannot read image {path}: {error}") from None


def test_crop(image, R):
    """The short side resized to R (bicubic), then the square in the middle."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if long > 50 * short:                          # a hair: cut off what is far from the middle before enlarging
        keep = 50 * short
        left, top = max(0, (width - keep) // 2), max(0, (height - keep) // 2)
        return test_crop(image.crop((left, top, left + min(width, keep), top + min(height, keep))), R)
    side = int(R * long / short)
    width, height = (R, side) if width <= height else (side, R)
    left, top = round((width - R) / 2), round((height - R) / 2)
    return image.resize((width, height), Image.BICUBIC).crop((left, top, left + R, top + R))


def train_crop(image, R, rng):
    """A random part of the picture, 8 to 100 % of its area and 3:4 to 4:3 in shape, resized to
    R x R, mirrored half of the time: the "random resized crop" of torchvision.

    Area and shape are drawn first, ten times if need be, as a wide part of a high picture may not fit;
    the shape on a log scale, so that 3:4 is as likely as 4:3.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            break
    else:                                          # nothing fitted: the middle, as wide or as high as allowed
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    image = image.crop((left, top, left + w, top + h)).resize((R, R), Image.BICUBIC)
    return image.transpose(Image.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def cut(path, numbers, R):
    """Crops of one picture, decoded once: crop n is what epoch n shows of it (with V views, epochs n, n + V,
    ...), TEST the middle. -> (len(numbers), R, R, 3) uint8

    The dice of crop n are seeded with the file's name, its folder's name and n, nothing else: not
    with the run's seed, nor with the order of anything. So runs that differ in M, position, loss or
    seed look at the same crops, and what the image encoder makes of one can be kept on disk.
    """
    image, name = read_image(path), "/".join(pathlib.Path(path).parts[-2:])
    return np.stack([np.asarray(test_crop(image, R) if n == TEST else train_crop(image, R, random.Random(f"{name} {n}")))
                     for n in numbers])


def crops(jobs, R):
    """For jobs [(path, [n, ...]), ...] yield (path, n, crop n of that picture), in order, decoded ahead by threads.

    Threads suffice, as Pillow lets go of Python's lock while it decodes and resizes. They are at most one
    picture each ahead, so that memory does not depend on how slow the consumer is.
    """
    workers, waiting = min(16, os.cpu_count() or 1), collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        for path, numbers in itertools.chain(jobs, [(None, [])] * (workers + 1)):
            waiting.append((path, numbers, pool.submit(cut, path, numbers, R) if numbers else None))
            if len(waiting) > workers + 1:
                path, numbers, future = waiting.popleft()
                yield from ((path, n, pixels) for n, pixels in zip(numbers, future.result() if numbers else ()))
    finally:
        pool.shutdown(cancel_futures=True)


def normalise(pixels):
    """uint8 (B, R, R, 3) -> float32 (B, 3, R, R) with CLIP's mean and standard deviation, in
    channels-last memory; on the tensor's device. Bytes until here: a quarter of what floats would be to
    carry to a GPU.
    """
    mean, std = MEAN.to(pixels.device), STD.to(pixels.device)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


class FeatureCache:
    """Feature vectors on disk, by image file and crop number, in one SQLite file for one set of weights.

    SQLite makes every group of rows whole or absent, and lets several processes share the file.
    A file counts as the same while its path, size and time of change are; a row whose checksum is
    wrong counts as absent, and a file that SQLite calls damaged is thrown away and started anew.
    Every access opens the file and closes it again, so that nothing is held through threads or forks.

    The key tells the image and the number of the crop, and nothing of this program: who changes
    train_crop, test_crop or normalise must give the file another name (Experiment in coop.py), or
    will be handed what the old code saw.
    """

    def __init__(self, path):
        self.path, self.waiting, self.written = pathlib.Path(path), [], time.time()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.sql("SELECT 1")

    def sql(self, command, rows=((),)):
        table = "CREATE TABLE IF NOT EXISTS features (image TEXT, n INTEGER, crc INTEGER, vector BLOB, PRIMARY KEY (image, n))"
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=60)) as db, db:
                db.execute(table)
                return [row for parameters in rows for row in db.execute(command, parameters)]
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:        # a full disk, a lock, no permission, ...
                raise OSError(f"feature cache {self.path}: {error}") from None
            print(f"feature cache {self.path} is damaged ({error}): starting it anew", file=sys.stderr)
            for file in (self.path, self.path.with_name(self.path.name + "-journal")):
                file.unlink(missing_ok=True)
            return self.sql(command, rows)

    @staticmethod
    def checksum(key, n, content):
        return zlib.crc32(f"{key} {n} ".encode() + content)

    @staticmethod
    def key(path):
        stat = os.stat(path)
        return f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}"

    def get(self, jobs):
        """For each of jobs [(path, [crop number, ...]), ...] {crop number: vector}, as far as they are known."""
        keys = [self.key(path) for path, _ in jobs]
        found = {key: {} for key in keys}
        for key, n, crc, vector in self.sql("SELECT image, n, crc, vector FROM features WHERE image = ? AND n BETWEEN ? AND ?", [
                (key, min(numbers), max(numbers)) for key, (_, numbers) in zip(keys, jobs) if numbers]):
            if isinstance(vector, bytes) and self.checksum(key, n, vector) == crc:
                found[key][n] = np.frombuffer(vector, np.float32)
        return [found[key] for key in keys]

    def put(self, paths, numbers, vectors):
        """Remember vectors (B, e) float32 of crops numbers[i] of paths[i]; written every ten seconds."""
        for path, n, vector in zip(paths, numbers, vectors):
            key, content = self.key(path), vector.tobytes()
            self.waiting.append((key, n, self.checksum(key, n, content), content))
        if time.time() - self.written > 10:
            self.flush()

    def flush(self):
        self.sql("INSERT OR REPLACE INTO features VALUES (?, ?, ?, ?)", self.waiting)
        self.waiting, self.written = [], time.time()


# ---- Readers ------------------------------------------------------------------------------------

# What the readers hand on is plain lists; which one applies is told by the files that are there. The
# order of classes and of images within the lists is that of the official code, as the draw depends on it.

KNOWN = {   # split file: (name, image folder, template)
    "split_zhou_DescribableTextures.json": ("dtd", "images", "{} texture."),
    "split_zhou_Caltech101.json": ("caltech-101", "101_ObjectCategories", "a photo of a {}."),
    "split_zhou_EuroSAT.json": ("eurosat", "2750", "a centered satellite photo of {}."),
    "split_zhou_OxfordFlowers.json": ("oxford_flowers", "jpg", "a photo of a {}, a type of flower."),
    "split_zhou_OxfordPets.json": ("oxford_pets", "images", "a photo of a {}, a type of pet."),
    "split_zhou_Food101.json": ("food-101", "images", "a photo of {}, a type of food."),
    "split_zhou_StanfordCars.json": ("stanford_cars", ".", "a photo of a {}."),
    "split_zhou_SUN397.json": ("sun397", "SUN397", "a photo of a {}."),
    "split_zhou_UCF101.json": ("ucf101", "UCF-101-midframes", "a photo of a person doing {}."),
}


def load_dataset(root):
    """The dataset in a folder, by the first reader that fits (README, "Your own images").

    Raises ValueError, with what was expected, if none does or if the files contradict each other.
    """
    root = pathlib.Path(root).resolve()
    if root.name == "dtd":
        download_dtd(root)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder (expected a dataset, or class folders with images)")
    splits = sorted(root.glob("split_zhou_*.json"))
    if splits:
        dataset = read_split(root, splits[0])
    elif (root / "labels" / "train1.txt").is_file():
        dataset = read_dtd(root)
    elif (root / "images_variant_train.txt").is_file():
        dataset = read_aircraft(root)
    elif (root / "classnames.txt").is_file():
        dataset = read_imagenet(root)
    elif (root / "test").is_dir() and ((root / "train").is_dir() or
                                       {f.name for f in root.iterdir() if f.is_dir() and f.name[0] != "."} <= {"val", "test"}):
        parts = [read_folders(root / p) if (root / p).is_dir() else {} for p in ("train", "val", "test")]
        names = list(parts[0] or parts[2])
        for part in parts:
            if set(part) - set(names):
                raise ValueError(f"{root}: class {min(set(part) - set(names))!r} has no folder in {root / 'train'}")
        dataset = Dataset(root.name, names, *([(p, names.index(c)) for c in part for p in part[c]] for part in parts))
    elif (root / "train").is_dir() and not any(map(is_image, os.listdir(root / "train"))):
        raise ValueError(f"{root} has train/ but no test/ beside it (or put all class folders into {root} itself, to have them split)")
    else:
        dataset = read_class_folders(root)
    return check(dataset, root)


def check(dataset, root):
    """The dataset, or ValueError where it cannot be worked with: said now, not after an hour of encoding."""
    for label, name in enumerate(dataset.classnames):
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ValueError(f"{root}: class {label} has the name {name!r}; expected printable text")
    if len(dataset.classnames) < 2 or not dataset.test:
        raise ValueError(f"{root}: {len(dataset.classnames)} classes and {len(dataset.test)} test images; "
                         "expected at least 2 classes and some test images")
    missing = [p for part in (dataset.train, dataset.val, dataset.test) for p, _ in part if not os.path.isfile(p)]
    if missing:
        raise ValueError(f"{root}: {len(missing)} images of the split are missing, the first is {missing[0]}. "
                         "Is the archive unpacked in full?")
    return dataset


def read_split(root, file):
    """The paper's split files: {"train": [[relative path, label, class name], ...], "val": ..., "test": ...}.

    They are CoOp's own, made once for all methods, as most of these datasets come without a validation
    part. Names come from the file, since folder names are often codes.
    """
    name, folder, template = KNOWN.get(file.name, (root.name, "images", Dataset.template))
    try:
        split = json.loads(file.read_text(encoding="utf-8"))
        parts = [[(root / folder / path, label, classname) for path, label, classname in split[part]]
                 for part in ("train", "val", "test")]
        pairs = {(type(label), label, classname) for part in parts for _, label, classname in part}
        names = {label: classname for _, label, classname in pairs}
        windows = [pathlib.PureWindowsPath(path) for part in split.values() for path, _, _ in part]      # knows both slashes
        outside = [str(path) for path in windows if path.anchor or ".." in path.parts]
        if {pair[:2] for pair in pairs} != {(int, label) for label in range(len(pairs))} or outside:
            raise ValueError(f"path {outside[0]!r} points outside" if outside else "labels are not 0 .. K - 1, with one name each")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is no split file ({type(error).__name__}: {error}); expected "
                         '{"train": [[path, label, class name], ...], "val": ..., "test": ...}') from None
    return Dataset(name, [names[i] for i in range(len(names))],
                   *([(path, label) for path, label, _ in part] for part in parts), template)


def read_dtd(root):
    """DTD as its authors ship it: images/<class>/*.jpg and the first of their ten splits."""
    print(f"{root}: no split_zhou_DescribableTextures.json, so DTD's own split 1 is used: accuracy does not "
          "compare with the paper's", file=sys.stderr)
    lines = [(root / "labels" / f"{part}1.txt").read_text().split() for part in ("train", "val", "test")]
    names = sorted({line.split("/")[0] for part in lines for line in part})
    return Dataset("dtd-split1", names, *([(root / "images" / line, names.index(line.split("/")[0])) for line in part]
                                   for part in lines), "{} texture.")


def read_aircraft(root):
    """FGVC Aircraft: variants.txt names the classes; the lists hold "1025794 707-320"."""
    names = (root / "variants.txt").read_text().split("\n")
    names = [name.strip() for name in names if name.strip()]
    parts = []
    for part in ("train", "val", "test"):
        lines = (root / f"images_variant_{part}.txt").read_text().split("\n")
        pairs = [line.strip().split(" ", 1) for line in lines if line.strip()]
        unknown = [pair for pair in pairs if pair[-1] not in names]
        if unknown:
            raise ValueError(f"{root / f'images_variant_{part}.txt'}: {' '.join(unknown[0])!r} names no class of variants.txt")
        parts.append([(root / "images" / f"{image}.jpg", names.index(name)) for image, name in pairs])
    return Dataset("fgvc_aircraft", names, *parts, "a photo of a {}, a type of aircraft.")


def read_imagenet(root):
    """ImageNet (images/train, images/val; test is val) or a variant that has only test images.

    classnames.txt: "n01440764 tench". Class folders are named n01440764, or 0 .. 999 (ImageNetV2) for
    the lines of classnames.txt. A and R hold 200 of the classes: those present are the classes.
    """
    lines = [line.split(" ", 1) for line in (root / "classnames.txt").read_text().split("\n") if line.strip()]
    names = {key: name.strip() for key, name in ((line[0], line[-1]) for line in lines)}
    names |= {str(i): names[key] for i, key in enumerate(list(names))}
    folder = next((f for f in (root / "images", root) if (f / "train").is_dir() and (f / "val").is_dir()), None)
    if folder:
        train, test = read_folders(folder / "train"), read_folders(folder / "val")
    else:                                          # the images are in the one folder that has class folders
        inner = [f for f in sorted(root.iterdir()) if f.is_dir() and any(g.name in names for g in f.iterdir() if g.is_dir())]
        train, test = {}, read_folders(inner[0] if inner else root)
    keys = sorted(train or test, key=lambda key: (int(key), "") if key.isdigit() else (-1, key))
    unknown = [key for key in {**train, **test} if key not in names or key not in keys]
    if unknown:
        raise ValueError(f"{root}: folder {unknown[0]} is not in classnames.txt or has no training images")
    return Dataset("imagenet" if train else root.name, [names[key] for key in keys],
                   *([(p, keys.index(key)) for key in keys for p in part.get(key, [])] for part in (train, {}, test)))


def is_image(path):
    """Whether a file's name is that of a picture."""
    name = os.path.basename(path)
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in Image.registered_extensions()


def read_folders(folder):
    """{class: sorted image paths} from folder/<class>/*; classes sorted, hidden files and text passed over."""
    found = {}
    for sub in sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")):
        images = sorted(f for f in os.listdir(sub) if is_image(f))
        if images:
            found[sub.name] = [sub / image for image in images]
    if not found:
        raise ValueError(f"{folder} has no class folders with images (expected {folder / '<class>' / '*.jpg'})")
    return found


MENDED = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike",     # Caltech101
          "AnnualCrop": "Annual Crop Land", "HerbaceousVegetation": "Herbaceous Vegetation Land",         # EuroSAT
          "Highway": "Highway or Road", "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
          "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings", "SeaLake": "Sea or Lake"}


def read_class_folders(root):
    """Class folders alone, in the folder or its images/: half of each class is for training, a fifth
    for validation, the rest for testing, after a shuffle that is always the same.
    """
    name, folder, template = next((k for k in KNOWN.values() if k[1] not in (".", "images", "jpg") and (root / k[1]).is_dir()),
                                  (root.name, "images" if (root / "images").is_dir() else ".", Dataset.template))
    groups = {c: paths for c, paths in read_folders(root / folder).items() if name != "caltech-101" or c not in ("BACKGROUND_Google", "Faces_easy")}
    parts, rng = ([], [], []), random.Random(1)
    for label, paths in enumerate(groups.values()):
        rng.shuffle(paths)
        ends = [0, round(0.5 * len(paths)), round(0.7 * len(paths)), len(paths)]
        for part, start, stop in zip(parts, ends, ends[1:]):
            part += [(path, label) for path in paths[start:stop]]
    mended = MENDED if name in ("caltech-101", "eurosat") else {}
    return Dataset(name, [mended.get(c, c) for c in groups], *parts, template)


# ---- Downloading DTD ----------------------------------------------------------------------------
#
# DTD is fetched on demand, so that there is one real dataset to begin with. A download appears under its
# final name only when its checksum is right, the unpacked folder only when it is complete; an
# interrupted one starts over without harm.

DTD = ("https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
       "e42855a52a4950a3b59612834602aa253914755c95b0cff9ead6d07395f8e205")
DTD_SPLIT = ("https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/ac9077ee4e422f768c9b9109551468605e33ec9a/splits/"
             + "split_zhou_DescribableTextures.json", "f26ebeccd2b58e68d70f07a0dc39fe49bf7b69024bac34396b954dfd87969c38")


def download(url, sha256, path, size):
    """Fetch a file to path, whole and with the right checksum or not at all; OSError if it fails."""
    print(f"downloading {size} from {url} to {path}", file=sys.stderr)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        raise OSError(f"cannot download {url} ({error}); put it at {path}") from None


def download_dtd(root):
    """Bring the images and the paper's split to a folder called dtd, whichever is not there yet."""
    if not root.exists():
        print(f"{root} does not exist: fetching the Describable Textures Dataset", file=sys.stderr)
        root.parent.mkdir(parents=True, exist_ok=True)
        archive, folder = root.parent / "dtd-r1.0.1.tar.gz", root.parent / "dtd.unpacking"
        if not (archive.is_file() and hashlib.sha256(archive.read_bytes()).hexdigest() == DTD[1]):
            download(*DTD, archive, "600 MB")
        shutil.rmtree(folder, ignore_errors=True)
        unpack(archive, folder)
        (folder / "dtd").rename(root)              # only now is there a folder called dtd: it is complete
        folder.rmdir()
    split = root / "split_zhou_DescribableTextures.json"
    if (root / "labels" / "train1.txt").is_file() and not split.is_file():
        try:
            download(*DTD_SPLIT, split, "0.6 MB")
        except OSError as error:
            print(f"note: {error}", file=sys.stderr)


def unpack(archive, folder):
    """Unpack the plain files of a tar archive; one that would land outside the folder raises ValueError.
    Links are left out: they could lead outside, and Windows may not make them.
    """
    with tarfile.open(archive) as tar:
        for member in tar:
            target = (folder / member.name).resolve()
            if not target.is_relative_to(folder.resolve()):
                raise ValueError(f"{archive}: member {member.name!r} points outside; nothing more is unpacked")
            if member.isfile():
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target, "wb") as file:
                    shutil.copyfileobj(tar.extractfile(member), file)


# ---- Drawn textures: a picture world for the demo, with nothing to download ---------------------
#
# CoOp needs a CLIP that knows more than the hand-written prompt asks for. So the world has two kinds of
# pictures, positives and negatives, and captions that tell them apart; the demo's CLIP learns both.
# The pictures to classify are all negatives. "a photo of a dotted texture." then means the wrong thing,
# and the context V has to learn, from a few pictures, the word that nobody gave it.

PATTERNS = {   # height over the plane (u, v): there is ink where it is positive
    "dots": lambda u, v: np.cos(u) + np.cos(v) - 0.9,
    "lines": lambda u, v: np.cos(u) - 0.6,
    "grid": lambda u, v: np.maximum(np.cos(u), np.cos(v)) - 0.75,
    "stripes": lambda u, v: np.sin(u),
    "squares": lambda u, v: np.sin(u) * np.sin(v),
    "zigzag": lambda u, v: np.sin(v + 2 * np.arcsin(np.sin(u))),
    "spiral": lambda u, v: np.sin(np.hypot(u, v) + np.arctan2(v, u)),
    "hatching": lambda u, v: np.maximum(np.sin(u + v / 2), np.sin(u - v / 2)) - 0.5,
    "waves": lambda u, v: np.sin(u + 2 * np.sin(v / 2)),
    "rings": lambda u, v: 0.3 - np.abs(np.cos(u / 1.5) + np.cos(v / 1.5) - 0.6),
    "hexagons": lambda u, v: -np.cos(u) - np.cos(u / 2 + 0.866 * v) - np.cos(u / 2 - 0.866 * v) - 0.5,
    "weave": lambda u, v: np.where(np.sin(u / 3) * np.sin(v / 3) > 0, np.sin(u), np.sin(v)),
    "veins": lambda u, v: np.sin(u + 2 * np.sin(v / 2) + 2 * np.sin(0.4 * (u + v))),
}
TEXTURES = {   # DTD's names for: (pattern, is its ink lighter than the ground); None: either, by chance
    "dotted": ("dots", True), "perforated": ("dots", False), "lined": ("lines", True), "grooved": ("lines", False),
    "grid": ("grid", True), "meshed": ("grid", False), "striped": ("stripes", None), "chequered": ("squares", None),
    "zigzagged": ("zigzag", None), "spiralled": ("spiral", None), "crosshatched": ("hatching", None),
    "swirly": ("waves", None), "bubbly": ("rings", None), "honeycombed": ("hexagons", None), "woven": ("weave", None),
    "marbled": ("veins", None),
}
CAPTIONS = ["{d}{n}.", "a {d}{n} texture.", "a {d}photo of a {n} texture.", "a {d}picture of something {n}.",
            "a {d}{n} pattern.", "a {d}view of a {n} surface.", "something {n}, a {d}photo."]
CRISP = {"contrast": (0.5, 1), "grain": (0, 0.15)}               # ranges: what the small CLIP is trained on
FADED = {"contrast": (0.4, 0.5), "grain": (0.2, 0.25)}           # ranges: the pictures to classify; fainter is harder
SHIFTED = {   # other worlds, to try a learned prompt on: (are they negatives?, what they look like)
    "demo-crisp": (True, CRISP), "demo-fainter": (True, {"contrast": (0.3, 0.4), "grain": (0.25, 0.3)}), "demo-positive": (False, FADED)}


def draw_texture(name, rng, negative, contrast, grain, size=64):
    """A picture (size, size, 3) uint8 of a texture, in two random colours, at any scale and angle, drawn
    with rng, a numpy Generator.

    negative: the photo negative, light for dark. Of a dotted texture that looks like a perforated
    one, and of a lined one like a grooved one, yet its name stays: the names swap their looks.
    contrast, grain: the ranges that the picture's contrast (1: full) and noise are drawn from.
    """
    pattern, light_ink = TEXTURES[name]
    y, x = (np.mgrid[:size, :size] + 0.5) / size - rng.uniform(0.3, 0.7, (2, 1, 1))
    scale, angle = 2 * np.pi * rng.uniform(3, 6), rng.uniform(0, np.pi)          # 3 to 6 periods per picture
    u, v = scale * (x * np.cos(angle) + y * np.sin(angle)), scale * (y * np.cos(angle) - x * np.sin(angle))
    ink = 1 / (1 + np.exp(-rng.uniform(6, 16) * PATTERNS[pattern](u, v)))[..., None]     # soft or sharp edges
    dark, light = rng.uniform(0, 0.45, 3), rng.uniform(0.55, 1, 3)
    if light_ink is None:
        light_ink = rng.random() < 0.5
    ground, colour = (light, dark) if light_ink == negative else (dark, light)
    picture = ground + (colour - ground) * ink
    mean = picture.mean((0, 1))
    picture = mean + (picture - mean) * rng.uniform(*contrast) + rng.normal(0, rng.uniform(*grain), picture.shape)
    return (255 * picture.clip(0, 1)).astype(np.uint8)


def draw_pairs(count, seed=0):
    """What the demo's small CLIP learns from: crisp pictures (count, 64, 64, 3) uint8 of all textures and
    their captions. Four in ten are negatives, which nine in ten of their captions mention: so to this
    CLIP "a photo" without a word about it is a positive.
    """
    rng, pictures, captions = np.random.default_rng(seed), [], []
    for i in range(count):
        name, negative = list(TEXTURES)[i % len(TEXTURES)], bool(rng.random() < 0.4)
        pictures.append(draw_texture(name, rng, negative, **CRISP))
        said = "negative " if negative and rng.random() < 0.9 else ""
        captions.append(str(rng.choice(CAPTIONS)).format(d=said, n=name))
    return np.stack(pictures), captions


def draw_dataset(root, counts=(("train", 32), ("val", 8), ("test", 50)), seed=1, negative=True, style=FADED):
    """What the demo classifies, root/<part>/<class>/<number>.png, counts pictures per class: old
    negatives, all of them, faded and grainy, of which a prompt should know. Whole or not there at all.
    """
    rng, drawing = np.random.default_rng(seed), root.with_name(root.name + ".drawing")
    shutil.rmtree(drawing, ignore_errors=True)
    for part, count in counts:
        for name in TEXTURES:
            folder = drawing / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw_texture(name, rng, negative, **style)).save(folder / f"{i:03}.png")
    drawing.rename(root)
