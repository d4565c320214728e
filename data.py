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
import hashlib
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
PHOTO = "a photo of a {}."                                       # the template of whatever has none of its own

# train, val, test: lists of (path, label), label an index into classnames; template: the hand-written prompt that the
# zero-shot baseline uses, with {} for the class name.
Dataset = collections.namedtuple("Dataset", "name classnames train val test template", defaults=[PHOTO])


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
    short = min(image.size)
    width, height = (min(side, 50 * short) for side in image.size)     # 1 x 20,000 pixels would become R x 4,480,000
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    image = image.resize([int(R * side / short) for side in image.size], Image.BICUBIC)
    left, top = (round((side - R) / 2) for side in image.size)
    return image.crop((left, top, left + R, top + R))


def train_crop(image, R, rng):
    """A random part of the picture, 8 to 100 % of its area and 3:4 to 4:3 in shape, resized to R x R, mirrored half
    of the time: the "random resized crop" of torchvision. If you change this, read FeatureCache.

    Area and shape are drawn first, ten times if need be, as a wide part of a high picture may not fit; the shape on
    a log scale, so that 3:4 is as likely as 4:3.
    """
    width, height = image.size
    for _ in range(10):
        area, ratio = width * height * rng.uniform(0.08, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
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
    found = [test_crop(image, R) if n == TEST else train_crop(image, R, random.Random(f"{name} {n}")) for n in numbers]
    return np.stack(found)


def crops(jobs, R):
    """For jobs [(path, [n, ...]), ...] yield (path, n, crop n of that picture), in order. Threads decode ahead, as
    Pillow lets go of Python's lock; but a picture each at most, so that memory does not depend on the consumer.
    """
    jobs, workers = [(path, numbers) for path, numbers in jobs if numbers], min(16, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        submitted = (pool.submit(cut, path, numbers, R) for path, numbers in jobs)
        ahead = collections.deque(itertools.islice(submitted, workers + 1))
        for path, numbers in jobs:
            pixels = ahead.popleft().result()
            ahead.extend(itertools.islice(submitted, 1))
            yield from zip(itertools.repeat(path), numbers, pixels)


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
        except Exception as error:  # noqa: BLE001       damaged bytes can fail in any way
            if not isinstance(error, FileNotFoundError):
                print(f"feature cache: {file} is damaged ({error}): its image is encoded again", file=sys.stderr)
            return {}

    def put(self, file, vectors):
        """Remember {crop number: vector (e,) float32} of one image, beside those known before."""
        vectors = self.get(file) | vectors
        write(file, lambda content: np.savez(content, numbers=list(vectors), vectors=np.stack(list(vectors.values()))))


# ---- Readers ------------------------------------------------------------------------------------
#
# The files in a folder tell which reader applies. It returns a name, a template, {key: class name} and, for train, val
# and test, lists of (path, key). The key is what tells classes apart, the folder's name or a number: two classes may
# have one name. The order of classes and of images is that of the official code, as the draw depends on it (but for
# ImageNet: sorted here, there in the order in which the disk happens to list its files).

KNOWN = {   # split file: (name, image folder, template)
    "split_zhou_DescribableTextures.json": ("dtd", "images", "{} texture."),
    "split_zhou_Caltech101.json": ("caltech-101", "101_ObjectCategories", PHOTO),
    "split_zhou_EuroSAT.json": ("eurosat", "2750", "a centered satellite photo of {}."),
    "split_zhou_OxfordFlowers.json": ("oxford_flowers", "jpg", "a photo of a {}, a type of flower."),
    "split_zhou_OxfordPets.json": ("oxford_pets", "images", "a photo of a {}, a type of pet."),
    "split_zhou_Food101.json": ("food-101", "images", "a photo of {}, a type of food."),
    "split_zhou_StanfordCars.json": ("stanford_cars", ".", PHOTO),
    "split_zhou_SUN397.json": ("sun397", "SUN397", PHOTO),
    "split_zhou_UCF101.json": ("ucf101", "UCF-101-midframes", "a photo of a person doing {}.")}
MENDED = {   # folder: class name, where the two differ; None: no class
    "caltech-101": {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike",
                    "BACKGROUND_Google": None, "Faces_easy": None},
    "eurosat": {"AnnualCrop": "Annual Crop Land", "PermanentCrop": "Permanent Crop Land", "Pasture": "Pasture Land",
                "HerbaceousVegetation": "Herbaceous Vegetation Land", "Highway": "Highway or Road",
                "Industrial": "Industrial Buildings", "Residential": "Residential Buildings", "SeaLake": "Sea or Lake"}}


def load_dataset(root):
    """The dataset in a folder, by the first reader that fits (README, "Your own images"). Raises ValueError, with
    what was expected, if none does, or if the files contradict each other: said now, not after an hour of encoding.
    """
    root = pathlib.Path(root).resolve()
    if root.name == "dtd" and not root.exists():
        download_dtd(root)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder (expected a dataset, or class folders with images)")
    readers = {"split_zhou_*.json": read_split, "labels/train1.txt": read_dtd,
               "images_variant_train.txt": read_aircraft, "classnames.txt": read_imagenet}
    reader = next((reader for file, reader in readers.items() if any(root.glob(file))), read_folders)
    name, template, names, parts = reader(root)

    for path, key in itertools.chain(*parts):
        if key not in names:
            raise ValueError(f"{path} is of class {key!r}, which is none of the {len(names)} classes "
                             "(those of the training images, or of a list beside them)")
        if path.parts[:len(root.parts)] != root.parts or ".." in path.parts:
            raise ValueError(f"the split of {root} has a path that leads outside, {path}")
    if strange := [n for n in names.values() if not isinstance(n, str) or not n.strip() or not n.isprintable()]:
        raise ValueError(f"{root}: a class has the name {strange[0]!r}; expected printable text")
    if missing := [path for path, _ in itertools.chain(*parts) if not os.path.isfile(path)]:
        raise ValueError(f"{root}: {len(missing)} images of the split are missing, the first is {missing[0]}")
    if len(names) < 2 or not parts[2]:
        raise ValueError(f"{root}: {len(names)} classes and {len(parts[2])} test images; needed are at least 2 and 1")
    labels = {key: label for label, key in enumerate(names)}
    parts = [[(path, labels[key]) for path, key in part] for part in parts]
    return Dataset(name, list(names.values()), *parts, template)


def read_split(root):
    """The paper's split files: {"train": [[relative path, label, class name], ...], "val": ..., "test": ...}. They are
    CoOp's own, as most of these datasets have no validation part, and give names, since folders are often codes.
    """
    file = min(root.glob("split_zhou_*.json"))
    name, folder, template = KNOWN.get(file.name, (root.name, "images", PHOTO))
    try:
        split = json.loads(file.read_text(encoding="utf-8"))
        parts = [[(root / folder / path, label) for path, label, _ in split[part]] for part in PARTS]
        names = sorted({(label, word) for part in PARTS for _, label, word in split[part]})
        if [(type(label), label) for label, _ in names] != [(int, label) for label in range(len(names))]:
            raise ValueError("labels are not 0 .. K - 1, with one name each")
    except Exception as error:  # noqa: BLE001       JSON of another shape can fail in any way
        raise ValueError(f"{file} is no split file ({type(error).__name__}: {error}); expected "
                         '{"train": [[path, label, class name], ...], "val": ..., "test": ...}') from None
    return name, template, dict(names), parts


def read_lines(file):
    """Stripped lines of a text file that are not empty."""
    return [line.strip() for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def read_dtd(root):
    """DTD as its authors ship it, with the paper's split, or while that cannot be had with the first of their ten."""
    try:
        download(*DTD_SPLIT, root / "split_zhou_DescribableTextures.json", "0.6 MB")
        return read_split(root)
    except OSError as error:
        print(f"note: {error}. DTD's own split 1 is used: accuracy does not compare with the paper's", file=sys.stderr)
    lines = [read_lines(root / "labels" / f"{part}1.txt") for part in PARTS]
    parts = [[(root / "images" / line, line.split("/")[0]) for line in part] for part in lines]
    return "dtd-split1", "{} texture.", {c: c for c in sorted(c for part in parts for _, c in part)}, parts


def read_aircraft(root):
    """FGVC Aircraft: variants.txt names the classes; the lists hold "1025794 707-320"."""
    lines = [[line.partition(" ") for line in read_lines(root / f"images_variant_{part}.txt")] for part in PARTS]
    parts = [[(root / "images" / f"{image}.jpg", variant) for image, _, variant in part] for part in lines]
    names = {variant: variant for variant in read_lines(root / "variants.txt")}
    return "fgvc_aircraft", "a photo of a {}, a type of aircraft.", names, parts


def read_imagenet(root):
    """ImageNet (images/train, images/val; test is val) or a variant that has only test images, in any one folder.

    classnames.txt: "n01440764 tench". Class folders are named n01440764, or 0 .. 999 (ImageNetV2) for the lines of
    classnames.txt. A and R hold 200 of the classes: those present are the classes.
    """
    lines = [line.partition(" ") for line in read_lines(root / "classnames.txt")]
    names = {key: name.strip() or key for key, _, name in lines}
    names |= {str(i): name for i, name in enumerate(names.values())}
    homes = {f.parent.name: f.parent for f in (*root.glob("*/*"), *root.glob("images/*/*")) if f.name in names}
    train = class_folders(homes["train"]) if "train" in homes else []
    test = class_folders(homes["train"].with_name("val") if train else min(homes.values(), default=root))
    present = {key for _, key in train or test} & names.keys()
    present = sorted(present, key=lambda key: (int(key) if key.isdigit() else 0, key))
    return "imagenet" if train else root.name, PHOTO, {key: names[key] for key in present}, [train, [], test]


def is_image(path):
    """Whether a file's name is that of a picture."""
    name, suffix = os.path.basename(path), os.path.splitext(path)[1].lower()
    return not name.startswith(".") and suffix in Image.registered_extensions()


def class_folders(folder):
    """[(path, class), ...] from folder/<class>/*, sorted, as the order in which a disk lists files differs from
    machine to machine; hidden files and text passed over.
    """
    found = [(sub / image, sub.name) for sub in sorted(folder.iterdir()) if sub.is_dir() and sub.name[0] != "."
             for image in sorted(os.listdir(sub)) if is_image(image)]
    if not found:
        raise ValueError(f"{folder} has no class folders with images (expected {folder / '<class>' / '*.jpg'})")
    return found


def read_folders(root):
    """Class folders in train/, val/ and test/. Or alone, in root or its images/: half of each class is for training,
    a fifth for validation, the rest for testing, after a shuffle that is always the same.
    """
    folders = {f.name for f in root.iterdir() if f.is_dir() and f.name[0] != "."}
    if {"train", "test"} <= folders or "test" in folders <= {"val", "test"}:       # of other folders, test is a class
        parts = [class_folders(root / part) if part in folders else [] for part in PARTS]
        return root.name, PHOTO, {c: c for _, c in parts[0] or parts[2]}, parts
    if "train" in folders and not any(map(is_image, os.listdir(root / "train"))):
        raise ValueError(f"{root} has train/ but no test/ beside it (or put all class folders into {root} itself)")

    known = [known for known in KNOWN.values() if known[1] not in (".", "images", "jpg")]     # told by the image folder
    known += [(root.name, "images", PHOTO), (root.name, ".", PHOTO)]
    name, folder, template = next(known for known in known if (root / known[1]).is_dir())
    mended = MENDED.get(name, {})
    found = [(path, mended.get(c, c)) for path, c in class_folders(root / folder) if mended.get(c, c)]
    train, val, test, rng = [], [], [], random.Random(1)
    for _, group in itertools.groupby(found, key=lambda item: item[1]):
        group = list(group)
        rng.shuffle(group)
        a, b = round(0.5 * len(group)), round(0.7 * len(group))
        train, val, test = train + group[:a], val + group[a:b], test + group[b:]
    return name, template, {c: c for _, c in found}, [train, val, test]


# ---- Downloading DTD ----------------------------------------------------------------------------
#
# DTD is fetched on demand, so that there is one real dataset to begin with. A download appears under its final name
# only when its checksum is right, the unpacked folder only when it is complete.

DTD = ("https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
       "e42855a52a4950a3b59612834602aa253914755c95b0cff9ead6d07395f8e205")
DTD_SPLIT = ("https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/"
             + "ac9077ee4e422f768c9b9109551468605e33ec9a/splits/split_zhou_DescribableTextures.json",
             "f26ebeccd2b58e68d70f07a0dc39fe49bf7b69024bac34396b954dfd87969c38")


def download(url, sha256, path, size):
    """Fetch a file to path, whole and with the right checksum or not at all; OSError if it fails."""
    print(f"downloading {size} from {url} to {path}", file=sys.stderr)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except Exception as error:  # noqa: BLE001       servers and networks fail in a dozen ways
        raise OSError(f"cannot download {url} ({error}); put it at {path}") from None


def download_dtd(root):
    """DTD's images and its authors' labels, 600 MB, to a folder called dtd that is not there yet."""
    archive, folder = root.with_name("dtd-r1.0.1.tar.gz"), root.with_name("dtd.unpacking")
    root.parent.mkdir(parents=True, exist_ok=True)
    if not (archive.is_file() and hashlib.sha256(archive.read_bytes()).hexdigest() == DTD[1]):
        print(f"{root} does not exist: fetching the Describable Textures Dataset", file=sys.stderr)
        download(*DTD, archive, "600 MB")
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)      # from Python 3.10.12: nothing leads outside
        tar.extractall(folder)
    (folder / "dtd").rename(root)                  # only now is there a folder called dtd: it is complete
    folder.rmdir()


# ---- Drawn textures: a picture world for the demo, with nothing to download ---------------------
#
# CoOp needs a CLIP that knows more than the hand-written prompt asks for. So the world has positives and negatives,
# and captions that tell them apart; the demo's CLIP learns both. The pictures to classify are all negatives: "a photo
# of a dotted texture." then means the wrong thing, and V has to learn, from a few pictures, the word nobody gave it.

# DTD's names for: height over the plane (u, v). There is ink where it is positive: light ink on dark ground in pictures
# of the first of two names, dark ink on light ground in those of the second; by chance where there is one name.
PATTERNS = {
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
    ("marbled",): lambda u, v: np.sin(u + 2 * np.sin(v / 2) + 2 * np.sin(0.4 * (u + v)))}
TEXTURES = [name for names in PATTERNS for name in names]
CAPTIONS = ["{d}{n}.", "a {d}{n} texture.", "a {d}photo of a {n} texture.", "a {d}picture of something {n}.",
            "a {d}{n} pattern.", "a {d}view of a {n} surface.", "something {n}, a {d}photo."]
CRISP = {"contrast": (0.5, 1), "grain": (0, 0.15)}               # ranges: what the small CLIP is trained on
FADED = {"contrast": (0.4, 0.5), "grain": (0.2, 0.25)}           # ranges: the pictures to classify; fainter is harder
FAINTER = {"contrast": (0.3, 0.4), "grain": (0.25, 0.3)}
SHIFTED = {"demo-crisp": (True, CRISP), "demo-fainter": (True, FAINTER), "demo-positive": (False, FADED)}   # negatives?


def draw_texture(name, rng, negative, contrast, grain, size=64):
    """A picture (size, size, 3) uint8 of a texture, in two random colours, at any scale and angle, drawn with rng, a
    numpy Generator; contrast, grain: ranges of the picture's contrast (1: full) and noise.

    negative: the photo negative, light for dark. Of a dotted texture that looks like a perforated one, and of a lined
    one like a grooved one, yet its name stays: the names swap their looks.
    """
    names, pattern = next(item for item in PATTERNS.items() if name in item[0])
    y, x = (np.mgrid[:size, :size] + 0.5) / size - rng.uniform(0.3, 0.7, (2, 1, 1))
    scale, angle = 2 * np.pi * rng.uniform(3, 6), rng.uniform(0, np.pi)          # 3 to 6 periods per picture
    u, v = scale * (x * np.cos(angle) + y * np.sin(angle)), scale * (y * np.cos(angle) - x * np.sin(angle))
    ink = 1 / (1 + np.exp(-rng.uniform(6, 16) * pattern(u, v)))[..., None]       # soft or sharp edges
    dark, light = rng.uniform(0, 0.45, 3), rng.uniform(0.55, 1, 3)
    light_ink = name == names[0] if len(names) > 1 else rng.random() < 0.5
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
        negative = rng.random() < 0.4
        pictures.append(draw_texture(name, rng, negative, **CRISP))
        said = "negative " if negative and rng.random() < 0.9 else ""
        captions.append(rng.choice(CAPTIONS).format(d=said, n=name))
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
