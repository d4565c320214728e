"""Images for few-shot learning: read a dataset's folder, draw the shots, cut the crops.

    from data import load_dataset, few_shot, crops
    dataset = load_dataset("./dtd")                              # name, classnames, train, val, test, template
    shots = few_shot(dataset.train, 4, random.Random(1))         # 4 images per class: [(path, label), ...]
    for path, n, pixels in crops([(path, [0, 1]) for path, _ in shots], R=224):
        ...                                                      # crop n of each image: (224, 224, 3) uint8

Know before: a dataset is three lists of (path, label); nothing is decoded until it is needed.
To take away: the same seed draws the same images as the official code, and a crop is a pure function of the
image and the epoch n, so whatever is computed from it need be computed only once.

Read in this order: Dataset and few_shot, the crops, the readers, the download, the drawn textures.
Needs torch, numpy and pillow, and none of its neighbours.
"""
import collections
import concurrent.futures
import dataclasses
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import pathlib
import random
import shutil
import sys
import tarfile

import numpy as np
import torch
from PIL import Image

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])         # of CLIP's training pixels, by channel
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
PARTS = ("train", "val", "test")
TEST = -1                                                        # as crop number: the test crop
Image.init()
FORMATS = [name for name in Image.OPEN if name != "EPS"]         # such a file is a program, run by Ghostscript


@dataclasses.dataclass
class Dataset:
    """train, val, test: lists of (path, label), label an index into classnames; template: the hand-written
    prompt that the zero-shot baseline uses, with {} for the class name.
    """
    name: str
    classnames: list
    train: list
    val: list
    test: list
    template: str = "a photo of a {}."


def few_shot(items, shots, rng):
    """`shots` items of each class (all of them where there are fewer), with rng a random.Random.

    Classes come in the order of their first item. With rng = Random(seed), first over the training list and then,
    with the same rng, over the validation list, these are the official code's images: the classes draw from one
    stream of dice in turn, so another order would give other images. With four images per class the luck of the
    draw is worth several points, so methods can only be compared on the same draws, and over several seeds.
    """
    groups = {}
    for item in items:
        groups.setdefault(item[1], []).append(item)
    return [item for group in groups.values() for item in (rng.sample(group, shots) if shots <= len(group) else group)]


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
# CLIP reads squares of R x R pixels. At test time that is the middle of the picture, always the same. For training
# each epoch cuts another random part, which is meant to keep V from learning the few images by heart (on the demo
# one crop per image does as well: README, "Speed"). Torchvision's transforms, written out for Pillow alone.

def read_image(path):
    """Any picture that Pillow reads by itself, as RGB; its EXIF rotation is left alone, as in the official code."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.convert("RGB")
    except Exception as error:  # noqa: BLE001       Pillow raises a dozen kinds for damaged files
        raise ValueError(f"cannot read image {path}: {error}") from None


def test_crop(image, R):
    """The short side resized to R (bicubic), then the square in the middle."""
    def middle(image, width, height):
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))

    short = min(image.size)                        # 1 x 20,000 pixels would become R x 4,480,000: its far ends go first
    image = middle(image, min(image.width, 50 * short), min(image.height, 50 * short))
    return middle(image.resize([int(R * side / short) for side in image.size], Image.BICUBIC), R, R)


def train_crop(image, R, rng):
    """A random part of the picture, 8 to 100 % of its area and 3:4 to 4:3 in shape, resized to R x R, mirrored half
    of the time: the "random resized crop" of torchvision. If you change this, read FeatureCache.

    Area and shape are drawn first, ten times if need be, as a wide part of a high picture may not fit; the shape on
    a log scale, so that 3:4 is as likely as 4:3.
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
    """Crops of one picture, decoded once: crop n is what epoch n shows of it (with --views 4 also epochs n + 4,
    n + 8, ...), TEST the middle. -> (len(numbers), R, R, 3) uint8

    The dice of crop n are seeded with the file's name, its folder's name and n, nothing else: not with the run's
    seed, nor with the order of anything. So runs that differ in M, position, loss or seed look at the same crops,
    and what the image encoder makes of one can be kept on disk.
    """
    image, name = read_image(path), "/".join(pathlib.Path(path).parts[-2:])
    return np.stack([np.asarray(test_crop(image, R) if n == TEST else train_crop(image, R, random.Random(f"{name} {n}")))
                     for n in numbers])


def crops(jobs, R):
    """For jobs [(path, [n, ...]), ...] yield (path, n, crop n of that picture), in order. Threads decode ahead, as
    Pillow lets go of Python's lock; but a picture each at most, so that memory does not depend on the consumer.
    """
    jobs, workers = [(path, numbers) for path, numbers in jobs if numbers], min(16, os.cpu_count() or 1)
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        submitted = (pool.submit(cut, path, numbers, R) for path, numbers in jobs)
        ahead = collections.deque(itertools.islice(submitted, workers + 1))
        for path, numbers in jobs:
            pixels = ahead.popleft().result()
            ahead.extend(itertools.islice(submitted, 1))
            yield from zip(itertools.repeat(path), numbers, pixels)
    finally:
        pool.shutdown(cancel_futures=True)


def normalise(pixels):
    """uint8 (B, R, R, 3) -> float32 (B, 3, R, R) with CLIP's mean and standard deviation, in channels-last memory; on
    the tensor's device. Bytes until here: a quarter of what floats would be to carry to a GPU.
    """
    return ((pixels.float() / 255 - MEAN.to(pixels.device)) / STD.to(pixels.device)).permute(0, 3, 1, 2)


def write(path, save):
    """What save(file) writes to a file, at path, whole or not at all: first in memory, then under a temporary name
    (which a kill -9 at that moment would leave behind).
    """
    content, temporary = io.BytesIO(), path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    save(content)                                        # straight to a full disk torch.save would raise no OSError
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(content.getbuffer())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class FeatureCache:
    """Feature vectors of crops on disk, a file per image, in a folder for one set of weights and precision.

    An image counts as the same while its path, size and time of change are. A damaged file counts as absent. Several
    processes may share the folder: each file is replaced as a whole, and if two write the same one the last one
    counts. The key tells the image and the number of the crop, and nothing of this program: who changes train_crop,
    test_crop or normalise must give the folder another name (Experiment in coop.py) or is handed what the old code
    saw (and give the command --again, as it knows the old results, too).
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, path):
        """Where the features of an image are, as it is now."""
        stat = os.stat(path)
        key = os.fsencode(f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}")
        return self.folder / (hashlib.sha256(key).hexdigest()[:32] + ".npz")

    def get(self, file):
        """{crop number: vector (e,) float32} of one image, as far as they are known."""
        try:
            with np.load(file) as found:
                if found.zip.testzip():                  # compares all checksums
                    raise ValueError("wrong checksum")
                return dict(zip(found["numbers"].tolist(), found["vectors"]))
        except FileNotFoundError:
            return {}
        except Exception as error:  # noqa: BLE001       damaged bytes can fail in any way
            print(f"feature cache: {file} is damaged ({error}): its image is encoded again", file=sys.stderr)
            return {}

    def put(self, file, vectors):
        """Remember {crop number: vector (e,) float32} of one image, beside those known before."""
        vectors = self.get(file) | vectors
        write(file, lambda content: np.savez(content, numbers=list(vectors), vectors=np.stack(list(vectors.values()))))


# ---- Readers ------------------------------------------------------------------------------------
#
# What the readers hand on is plain lists; which one applies is told by the files that are there. The order of classes
# and of images in the lists is that of the official code, as the draw depends on it (but for ImageNet: sorted here,
# there in the order in which the disk happens to list its files).

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
    """The dataset in a folder, by the first reader that fits (README, "Your own images"). Raises ValueError, with
    what was expected, if none does, or if the files contradict each other: said now, not after an hour of encoding.
    """
    root = pathlib.Path(root).resolve()
    if root.name == "dtd":
        download_dtd(root)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder (expected a dataset, or class folders with images)")
    folders = {f.name for f in root.iterdir() if f.is_dir() and f.name[0] != "."}
    if splits := sorted(root.glob("split_zhou_*.json")):
        dataset = read_split(root, splits[0])
    elif (root / "labels" / "train1.txt").is_file():
        dataset = read_dtd(root)
    elif (root / "images_variant_train.txt").is_file():
        dataset = read_aircraft(root)
    elif (root / "classnames.txt").is_file():
        dataset = read_imagenet(root)
    elif {"train", "test"} <= folders or "test" in folders <= {"val", "test"}:
        parts = [read_folders(root / part) if part in folders else [] for part in PARTS]
        dataset = labelled(root.name, [key for _, key in parts[0] or parts[2]], parts)
    elif "train" in folders and not any(map(is_image, os.listdir(root / "train"))):
        raise ValueError(f"{root} has train/ but no test/ beside it (or put all class folders into {root} itself)")
    else:
        dataset = read_class_folders(root)

    for label, name in enumerate(dataset.classnames):
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ValueError(f"{root}: class {label} has the name {name!r}; expected printable text")
    if len(dataset.classnames) < 2 or not dataset.test:
        raise ValueError(f"{root}: {len(dataset.classnames)} classes and {len(dataset.test)} test images; "
                         "expected at least 2 classes and some test images")
    missing = [path for path, _ in dataset.train + dataset.val + dataset.test if not os.path.isfile(path)]
    if missing:
        raise ValueError(f"{root}: {len(missing)} images of the split are missing, the first is {missing[0]}. "
                         "Is the archive unpacked in full?")
    return dataset


def labelled(name, keys, parts, template=Dataset.template, classname=str):
    """The Dataset of parts [(path, key), ...]: classes count in the order in which keys names them first; classname
    makes a key readable.
    """
    labels = {key: label for label, key in enumerate(dict.fromkeys(keys))}
    for path, key in itertools.chain(*parts):
        if key not in labels:
            raise ValueError(f"{name}: {path} is of class {key!r}, which is none of the {len(labels)} classes "
                             "(those of the training images, or of a list beside them)")
    return Dataset(name, list(map(classname, labels)), *([(p, labels[key]) for p, key in part] for part in parts), template)


def read_split(root, file):
    """The paper's split files: {"train": [[relative path, label, class name], ...], "val": ..., "test": ...}. They are
    CoOp's own, as most of these datasets have no validation part, and give names, since folders are often codes.
    """
    name, folder, template = KNOWN.get(file.name, (root.name, "images", Dataset.template))
    try:
        split = json.loads(file.read_text(encoding="utf-8"))
        parts = [[(path, (label, classname)) for path, label, classname in split[part]] for part in PARTS]
        keys = sorted({key for part in parts for _, key in part})
        for path in (pathlib.PureWindowsPath(path) for part in parts for path, _ in part):     # knows both slashes
            if path.anchor or ".." in path.parts:
                raise ValueError(f"path {str(path)!r} points outside")
        if [(type(label), label) for label, _ in keys] != [(int, label) for label in range(len(keys))]:
            raise ValueError("labels are not 0 .. K - 1, with one name each")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is no split file ({type(error).__name__}: {error}); expected "
                         '{"train": [[path, label, class name], ...], "val": ..., "test": ...}') from None
    parts = [[(root / folder / path, key) for path, key in part] for part in parts]
    return labelled(name, keys, parts, template, classname=lambda key: key[1])


def read_lines(file):
    """Stripped lines of a text file that are not empty."""
    return [line.strip() for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def read_dtd(root):
    """DTD as its authors ship it: images/<class>/*.jpg and the first of their ten splits."""
    print(f"{root}: no split_zhou_DescribableTextures.json, so DTD's own split 1 is used: accuracy does not "
          "compare with the paper's", file=sys.stderr)
    parts = [[(root / "images" / line, line.split("/")[0]) for line in read_lines(root / "labels" / f"{part}1.txt")]
             for part in PARTS]
    return labelled("dtd-split1", sorted(key for part in parts for _, key in part), parts, "{} texture.")


def read_aircraft(root):
    """FGVC Aircraft: variants.txt names the classes; the lists hold "1025794 707-320"."""
    parts = [[line.partition(" ") for line in read_lines(root / f"images_variant_{part}.txt")] for part in PARTS]
    parts = [[(root / "images" / f"{image}.jpg", variant) for image, _, variant in part] for part in parts]
    return labelled("fgvc_aircraft", read_lines(root / "variants.txt"), parts, "a photo of a {}, a type of aircraft.")


def read_imagenet(root):
    """ImageNet (images/train, images/val; test is val) or a variant that has only test images.

    classnames.txt: "n01440764 tench". Class folders are named n01440764, or 0 .. 999 (ImageNetV2) for the lines of
    classnames.txt. A and R hold 200 of the classes: those present are the classes.
    """
    lines = [line.partition(" ") for line in read_lines(root / "classnames.txt")]
    names = {key: name.strip() or key for key, _, name in lines}
    names |= {str(i): name for i, name in enumerate(names.values())}
    train, test = [], None
    for folder in (root, root / "images"):
        if (folder / "train").is_dir() and (folder / "val").is_dir():
            train, test = read_folders(folder / "train"), read_folders(folder / "val")
    if test is None:                               # the images are in the one folder that has class folders
        inner = [f.parent for f in sorted(root.glob("*/*/")) if f.name in names]
        test = read_folders(inner[0] if inner else root)
    keys = sorted({key for _, key in train or test}, key=lambda key: (int(key), "") if key.isdigit() else (-1, key))
    if unknown := [key for key in keys if key not in names]:
        raise ValueError(f"{root}: folder {unknown[0]} is not in classnames.txt")
    return labelled("imagenet" if train else root.name, keys, [train, [], test], classname=names.get)


def is_image(path):
    """Whether a file's name is that of a picture."""
    name = os.path.basename(path)
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in Image.registered_extensions()


def read_folders(folder):
    """[(path, class), ...] from folder/<class>/*, sorted, as the order in which a disk lists files differs from
    machine to machine; hidden files and text passed over.
    """
    found = [(sub / image, sub.name) for sub in sorted(folder.iterdir()) if sub.is_dir() and sub.name[0] != "."
             for image in sorted(os.listdir(sub)) if is_image(image)]
    if not found:
        raise ValueError(f"{folder} has no class folders with images (expected {folder / '<class>' / '*.jpg'})")
    return found


MENDED = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike",     # Caltech101
          "AnnualCrop": "Annual Crop Land", "HerbaceousVegetation": "Herbaceous Vegetation Land",         # EuroSAT
          "Highway": "Highway or Road", "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
          "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings", "SeaLake": "Sea or Lake"}


def read_class_folders(root):
    """Class folders alone, in the folder or its images/: half of each class is for training, a fifth for validation,
    the rest for testing, after a shuffle that is always the same.
    """
    name, folder, template = root.name, "images" if (root / "images").is_dir() else ".", Dataset.template
    for known in KNOWN.values():                   # a dataset without its split file: some image folders tell which one
        if known[1] not in (".", "images", "jpg") and (root / known[1]).is_dir():
            name, folder, template = known
    found = read_folders(root / folder)
    if name == "caltech-101":
        found = [(path, c) for path, c in found if c not in ("BACKGROUND_Google", "Faces_easy")]
    parts, rng = ([], [], []), random.Random(1)
    for _, group in itertools.groupby(found, key=lambda item: item[1]):
        group = list(group)
        rng.shuffle(group)
        ends = [0, round(0.5 * len(group)), round(0.7 * len(group)), len(group)]
        for part, start, stop in zip(parts, ends, ends[1:]):
            part += group[start:stop]
    mended = MENDED if name in ("caltech-101", "eurosat") else {}
    return labelled(name, [c for _, c in found], parts, template, lambda c: mended.get(c, c))


# ---- Downloading DTD ----------------------------------------------------------------------------
#
# DTD is fetched on demand, so that there is one real dataset to begin with. A download appears under its final name
# only when its checksum is right, the unpacked folder only when it is complete.

DTD = ("https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
       "e42855a52a4950a3b59612834602aa253914755c95b0cff9ead6d07395f8e205")
DTD_SPLIT = ("https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/ac9077ee4e422f768c9b9109551468605e33ec9a"
             "/splits/split_zhou_DescribableTextures.json", "f26ebeccd2b58e68d70f07a0dc39fe49bf7b69024bac34396b954dfd87969c38")


def download(url, sha256, path, size):
    """Fetch a file to path, whole and with the right checksum or not at all; OSError if it fails."""
    print(f"downloading {size} from {url} to {path}" + " (the file there is damaged)" * path.is_file(), file=sys.stderr)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        raise OSError(f"cannot download {url} ({error}); put it at {path}") from None


def download_dtd(root):
    """Bring the images and the paper's split to a folder called dtd, whichever is not there yet."""
    if not root.exists():
        print(f"{root} does not exist: fetching the Describable Textures Dataset", file=sys.stderr)
        archive, folder = root.parent / "dtd-r1.0.1.tar.gz", root.parent / "dtd.unpacking"
        root.parent.mkdir(parents=True, exist_ok=True)
        if not (archive.is_file() and hashlib.sha256(archive.read_bytes()).hexdigest() == DTD[1]):
            download(*DTD, archive, "600 MB")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with tarfile.open(archive) as tar:     # the filter raises if a member leads outside; Python 3.10.12 and later
                tar.extraction_filter = getattr(tarfile, "data_filter", None)
                tar.extractall(folder)
        except tarfile.TarError as error:
            raise ValueError(f"{archive}: {error}; nothing more is unpacked") from None
        (folder / "dtd").rename(root)              # only now is there a folder called dtd: it is complete
        folder.rmdir()
    split = root / "split_zhou_DescribableTextures.json"
    if (root / "labels" / "train1.txt").is_file() and not split.is_file():
        try:
            download(*DTD_SPLIT, split, "0.6 MB")
        except OSError as error:
            print(f"note: {error}", file=sys.stderr)


# ---- Drawn textures: a picture world for the demo, with nothing to download ---------------------
#
# CoOp needs a CLIP that knows more than the hand-written prompt asks for. So the world has positives and negatives,
# and captions that tell them apart; the demo's CLIP learns both. The pictures to classify are all negatives: "a photo
# of a dotted texture." then means the wrong thing, and V has to learn, from a few pictures, the word nobody gave it.

PATTERNS = {   # DTD's names for: height over the plane (u, v); there is ink where it is positive
    ("dotted", "perforated"): lambda u, v: np.cos(u) + np.cos(v) - 0.9,
    ("lined", "grooved"): lambda u, v: np.cos(u) - 0.6,
    ("grid", "meshed"): lambda u, v: np.maximum(np.cos(u), np.cos(v)) - 0.75,
    ("striped",): lambda u, v: np.sin(u),
    ("chequered",): lambda u, v: np.sin(u) * np.sin(v),
    ("zigzagged",): lambda u, v: np.sin(v + 2 * np.arcsin(np.sin(u))),
    ("spiralled",): lambda u, v: np.sin(np.hypot(u, v) + np.arctan2(v, u)),
    ("crosshatched",): lambda u, v: np.maximum(np.sin(u + v / 2), np.sin(u - v / 2)) - 0.5,
    ("swirly",): lambda u, v: np.sin(u + 2 * np.sin(v / 2)),
    ("bubbly",): lambda u, v: 0.3 - np.abs(np.cos(u / 1.5) + np.cos(v / 1.5) - 0.6),
    ("honeycombed",): lambda u, v: -np.cos(u) - np.cos(u / 2 + 0.866 * v) - np.cos(u / 2 - 0.866 * v) - 0.5,
    ("woven",): lambda u, v: np.where(np.sin(u / 3) * np.sin(v / 3) > 0, np.sin(u), np.sin(v)),
    ("marbled",): lambda u, v: np.sin(u + 2 * np.sin(v / 2) + 2 * np.sin(0.4 * (u + v))),
}
TEXTURES = {   # name: (pattern, is its ink lighter than the ground): of two names the first one's; None: by chance
    name: (pattern, name == names[0] if len(names) > 1 else None) for names, pattern in PATTERNS.items() for name in names}
CAPTIONS = ["{d}{n}.", "a {d}{n} texture.", "a {d}photo of a {n} texture.", "a {d}picture of something {n}.",
            "a {d}{n} pattern.", "a {d}view of a {n} surface.", "something {n}, a {d}photo."]
CRISP = {"contrast": (0.5, 1), "grain": (0, 0.15)}               # ranges: what the small CLIP is trained on
FADED = {"contrast": (0.4, 0.5), "grain": (0.2, 0.25)}           # ranges: the pictures to classify; fainter is harder
FAINTER = {"contrast": (0.3, 0.4), "grain": (0.25, 0.3)}
SHIFTED = {"demo-crisp": (True, CRISP), "demo-fainter": (True, FAINTER), "demo-positive": (False, FADED)}    # negatives?


def draw_texture(name, rng, negative, contrast, grain, size=64):
    """A picture (size, size, 3) uint8 of a texture, in two random colours, at any scale and angle, drawn with rng, a
    numpy Generator; contrast, grain: ranges of the picture's contrast (1: full) and noise.

    negative: the photo negative, light for dark. Of a dotted texture that looks like a perforated one, and of a lined
    one like a grooved one, yet its name stays: the names swap their looks.
    """
    pattern, light_ink = TEXTURES[name]
    y, x = (np.mgrid[:size, :size] + 0.5) / size - rng.uniform(0.3, 0.7, (2, 1, 1))
    scale, angle = 2 * np.pi * rng.uniform(3, 6), rng.uniform(0, np.pi)          # 3 to 6 periods per picture
    u, v = scale * (x * np.cos(angle) + y * np.sin(angle)), scale * (y * np.cos(angle) - x * np.sin(angle))
    ink = 1 / (1 + np.exp(-rng.uniform(6, 16) * pattern(u, v)))[..., None]       # soft or sharp edges
    dark, light = rng.uniform(0, 0.45, 3), rng.uniform(0.55, 1, 3)
    if light_ink is None:
        light_ink = rng.random() < 0.5
    ground, colour = (light, dark) if light_ink == negative else (dark, light)
    picture = ground + (colour - ground) * ink
    mean = picture.mean((0, 1))
    picture = mean + (picture - mean) * rng.uniform(*contrast) + rng.normal(0, rng.uniform(*grain), picture.shape)
    return (255 * picture.clip(0, 1)).astype(np.uint8)


def draw_pairs(count, seed=0):
    """What the demo's small CLIP learns from: crisp pictures (count, 64, 64, 3) uint8 of all textures and their
    captions. Four in ten are negatives, and nine in ten of these captions say so: "a photo" alone means a positive.
    """
    rng, pictures, captions = np.random.default_rng(seed), [], []
    for name in itertools.islice(itertools.cycle(TEXTURES), count):
        negative = bool(rng.random() < 0.4)
        pictures.append(draw_texture(name, rng, negative, **CRISP))
        said = "negative " if negative and rng.random() < 0.9 else ""
        captions.append(str(rng.choice(CAPTIONS)).format(d=said, n=name))
    return np.stack(pictures), captions


def draw_dataset(root, counts=(("train", 32), ("val", 8), ("test", 50)), seed=1, negative=True, style=FADED):
    """root/<part>/<class>/<number>.png, counts pictures per class, as the demo classifies them. Whole or not there."""
    rng, drawing = np.random.default_rng(seed), root.with_name(root.name + ".drawing")
    shutil.rmtree(drawing, ignore_errors=True)
    for (part, count), name in itertools.product(counts, TEXTURES):
        (drawing / part / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(draw_texture(name, rng, negative, **style)).save(drawing / part / name / f"{i:03}.png")
    drawing.rename(root)
