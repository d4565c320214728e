"""Images for few-shot learning: read a dataset's folder, sample the shots, cut the crops.

    import random
    from data import load_dataset, few_shot, crops
    dataset = load_dataset("./dtd")                         # .classnames .train .val .test ...
    shots = few_shot(dataset.train, 4, random.Random(1))    # 4 per class: [(path, label), ...]
    for path, n, pixels in crops([(path, [0, 1]) for path, _ in shots], R=224):
        ...                                                 # crop n: (224, 224, 3) uint8

Know before: a dataset is three lists of (path, label); nothing is decoded until it is needed.
To take away: the same seed samples the same images as the official code, and a crop is a pure
function of the image and a number n, so whatever is computed from it can be kept.

Read in this order: Dataset and few_shot, the crops, the cache, the readers, the download, the
drawn world of the demo.  Needs torch, numpy and pillow, and no other file of this project.
"""
import collections
import concurrent.futures
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import random
import re
import shutil
import socket
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])     # of CLIP's training pixels, by channel
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
PARTS = ("train", "val", "test")
TEST = -1                                                    # as crop number: the test crop
PHOTO = "a photo of a {}."


@dataclass
class Dataset:
    """Images and classes of a folder.  Labels are indices into classnames."""

    name: str
    classnames: list                # K class names, as they stand in prompts but for "_"
    train: list                     # of (path, label)
    val: list
    test: list
    template: str = PHOTO           # the hand-written prompt of zero-shot, {} for the class name
    root: pathlib.Path = pathlib.Path()
    notes: list = field(default_factory=list)       # what was passed over or is likely a mistake


def few_shot(items, shots, rng):
    """`shots` items (path, label) of each class, all of them where a class has fewer.

    rng: a random.Random.  Classes are sampled one after the other, in the order of their first
    item.  With rng = Random(seed), first for the training list and then for min(shots, 4) of the
    validation list, these are the official code's images.  With four images per class the luck of
    the sample is worth several points, so compare methods on the same samples, and over several
    seeds.
    """
    groups = {}
    for path, label in items:
        groups.setdefault(label, []).append((path, label))
    sample = []
    for group in groups.values():
        if len(group) >= shots:
            group = rng.sample(group, shots)
        sample += group
    return sample


def subset(K, classes):
    """Labels of a class split: "all", "base" (the first half, rounded up) or "new" (the rest)."""
    half = math.ceil(K / 2)
    splits = {"all": range(K), "base": range(half), "new": range(half, K)}
    return list(splits[classes])


def mislabel(labels, share, K, seed):
    """The labels with a share of them replaced by another class each; the same for one seed."""
    rng = random.Random(f"noise {seed}")
    labels = list(labels)
    if K > 1:
        for i in rng.sample(range(len(labels)), round(share * len(labels))):
            labels[i] = (labels[i] + rng.randrange(1, K)) % K
    return labels


# ---- Crops ---------------------------------------------------------------------------------------
#
# CLIP reads squares of R x R pixels.  For testing that is the middle of the image, always the same.
# For training each epoch cuts another random part, which keeps V from learning the few images by
# heart.  These are torchvision's transforms, written out for Pillow alone.

Image.init()
FORMATS = [name for name in Image.OPEN if name != "EPS"]     # EPS is a program, run by Ghostscript


def read_image(path):
    """Any image that Pillow reads, upright, as 8-bit RGB.  ValueError if it cannot be read.

    Turned as its EXIF orientation says, since phones store photographs sideways; transparency is
    laid over white.  (The official code does neither.)
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            return to_rgb(upright(image))
    except Exception as error:       # Pillow raises a dozen kinds of errors for damaged files
        raise ValueError(f"cannot read image {path}: {error} (replace or remove it; HEIC and the "
                         "like: convert it to JPEG)") from None


TURNS = {   # EXIF orientation: how to undo it
    2: Image.FLIP_LEFT_RIGHT,
    3: Image.ROTATE_180,
    4: Image.FLIP_TOP_BOTTOM,
    5: Image.TRANSPOSE,
    6: Image.ROTATE_270,
    7: Image.TRANSVERSE,
    8: Image.ROTATE_90,
}


def upright(image):
    """The image turned as its EXIF orientation says.

    (PIL.ImageOps.exif_transpose also rewrites the other EXIF tags, and fails where one is odd.)
    """
    orientation = image.getexif().get(0x0112)
    if orientation in TURNS:
        return image.transpose(TURNS[orientation])
    return image


def to_rgb(image):
    """An image of any mode as 8-bit RGB.  ValueError where the range of the pixels is unknown.

    Pillow's own conversion would clip 16 bits at 255, and so make everything white.
    """
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no fixed range (save it with 8 or 16 bits)")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("its integers need more than 16 bits (save it with 8 or 16 bits)")
        image = Image.fromarray((pixels // 256).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def test_crop(image, R):
    """The short side resized to R (bicubic), then the square in the middle.

    Bit-identical to the official code's, but for strips longer than 50:1: they are cut to 50:1
    first (1 x 20,000 pixels would become R x 4,480,000), which shifts them by up to half a pixel.
    """
    short = min(image.size)
    width = min(image.width, 50 * short)
    height = min(image.height, 50 * short)
    image = crop_box(
        image, (image.width - width) // 2, (image.height - height) // 2, width, height)
    width = int(R * image.width / short)
    height = int(R * image.height / short)
    image = image.resize((width, height), Image.BICUBIC)
    return crop_box(image, round((width - R) / 2), round((height - R) / 2), R, R)


def crop_box(image, left, top, width, height):
    return image.crop((left, top, left + width, top + height))


def train_crop(image, R, rng):
    """A random part of the image, resized to R x R (bicubic), mirrored half of the time.

    The part has 8 to 100 % of the area and an aspect ratio of 3:4 to 4:3: torchvision's
    RandomResizedCrop.  rng: a random.Random.  Area and ratio are sampled up to ten times, as a
    wide part of a tall image may not fit; the ratio on a log scale, so that 3:4 is as likely as
    4:3.
    """
    for _ in range(10):
        area = image.width * image.height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width = round(math.sqrt(area * ratio))
        height = round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = rng.randint(0, image.width - width)
            top = rng.randint(0, image.height - height)
            break
    else:                            # nothing fitted: the middle, as wide or as high as allowed
        width = min(image.width, round(image.height * 4 / 3))
        height = min(image.height, round(image.width * 4 / 3))
        left = (image.width - width) // 2
        top = (image.height - height) // 2
    image = crop_box(image, left, top, width, height).resize((R, R), Image.BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    return image


def cut(path, numbers, R):
    """Crops of one image, which is decoded once -> (number of crops, R, R, 3) uint8.

    Epoch n shows crop n of an image (with --views, crop n % views); TEST is the middle.  Its random
    numbers are seeded with the names of the file and its folder and n, nothing else: not with the
    seed of a run, nor with the order of anything.  So runs that differ in M, position or loss look
    at the same crops, and the features of a crop can be kept on disk.
    """
    image = read_image(path)
    name = "/".join(pathlib.Path(os.path.abspath(path)).parts[-2:])
    found = []
    for n in numbers:
        if n == TEST:
            found.append(test_crop(image, R))
        else:                        # as bytes: a file name need not be UTF-8
            found.append(train_crop(image, R, random.Random(os.fsencode(f"{name} {n}"))))
    return np.stack(found)


def crops(jobs, R):
    """Yield (path, n, crop n of that image) for jobs [(path, [n, ...]), ...], in order.

    A crop is uint8 (R, R, 3); normalize takes a batch of them.  ValueError at the first image that
    cannot be read, which names the others, too (at most 20).
    """
    try:
        yield from decode_ahead(jobs, R)
    except ValueError as error:
        damaged = find_damaged([path for path, _ in jobs])
        raise ValueError(f"{error}; of {len(jobs)} images {len(damaged)} cannot be decoded: "
                         f"{some(damaged, 20)}") from None


def decode_ahead(jobs, R):
    """The crops, by threads, as Pillow releases Python's lock.

    Each thread is only an image ahead, so that memory does not depend on how fast crops are used.
    """
    workers = min(16, os.cpu_count() or 1)
    ahead = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for path, numbers in jobs:
            if not numbers:
                continue
            ahead.append((path, numbers, pool.submit(cut, path, numbers, R)))
            if len(ahead) > workers:
                yield from finished_crops(*ahead.popleft())
        while ahead:
            yield from finished_crops(*ahead.popleft())


def finished_crops(path, numbers, future):
    for n, pixels in zip(numbers, future.result()):
        yield path, n, pixels


def normalize(pixels):
    """uint8 (B, R, R, 3) -> float32 (B, 3, R, R) with CLIP's mean and standard deviation.

    On the tensor's device, in channels-last memory.  Bytes until here: a quarter of what floats
    would be to carry to a GPU.
    """
    pixels = pixels.float() / 255
    pixels = (pixels - MEAN.to(pixels.device)) / STD.to(pixels.device)
    return pixels.permute(0, 3, 1, 2)


def check_images(paths, dataset):
    """Look at the headers of images of a dataset, which takes seconds for ten thousand.

    Raises one ValueError if one cannot be read; it then names all such images of the dataset (at
    most 20 of each kind), so that they can be replaced at once.  Damage further inside a file is
    found on decoding.
    """
    broken = find_broken(paths)
    if broken:
        parts = itertools.chain(dataset.train, dataset.val, dataset.test)
        paths = sorted({path for path, _ in parts})
        broken = find_broken(paths)
        count = sum(len(files) for files in broken.values())
        named = "; ".join(f"{problem}: {some(files, 20)}" for problem, files in broken.items())
        raise ValueError(f"{count} of {len(paths)} images cannot be read, replace or remove them: "
                         f"{named}")


def find_broken(paths):
    """{problem: [path, ...]} of the images that cannot be read.  paths: a list."""
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        problems = list(pool.map(find_problem, paths))
    broken = {}
    for path, problem in zip(paths, problems):
        if problem:
            broken.setdefault(problem, []).append(path)
    return broken


def find_damaged(paths):
    """The images that cannot be decoded completely."""
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        damaged = list(pool.map(is_damaged, paths))
    return [path for path, bad in zip(paths, damaged) if bad]


def is_damaged(path):
    try:
        read_image(path)
    except ValueError:
        return True
    return False


def find_problem(path):
    """Why an image cannot be read, or None."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode == "F":
                return "32-bit float pixels, which have no fixed range (save 8 or 16 bits)"
        return None
    except Image.DecompressionBombError as error:
        return f"too large ({error})"
    except Exception:                # Pillow raises a dozen kinds of errors for damaged files
        return describe_file(path)


def describe_file(path):
    """What a file that should be an image is instead, by its first bytes."""
    try:
        with open(path, "rb") as file:
            start = file.read(100).lstrip()
    except OSError as error:
        return error.strerror
    if not start:
        return "empty"
    if start.startswith(b"version https://git-lfs"):
        return "Git LFS pointers, not images (git lfs pull)"
    if start.lower().startswith((b"<html", b"<!doctype", b"<?xml")):
        return "web pages, not images"
    return "damaged, or in no format that Pillow reads here"


# ---- Files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path):
    """`with atomic_write(path) as file`: a binary file that appears complete or not at all.

    Written in memory first, then under a temporary name, which is renamed.  (Straight to a full
    disk torch.save would not raise OSError.)
    """
    content = io.BytesIO()
    yield content
    path = pathlib.Path(path)
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(content.getvalue())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class FeatureCache:
    """Features on disk, a file for each chunk of crops that are encoded together.

    The name of a file is a key, a hash of what its features depend on, so no file is ever changed
    or merged, and several processes may share the folder.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def has(self, key):
        return (self.folder / f"{key}.npz").exists()

    def load(self, key, shape):
        """The features (number of crops, e) fp32 with this key, or None.

        A damaged file counts as absent, with a line on stderr: zip archives have checksums.
        """
        path = self.folder / f"{key}.npz"
        if not path.exists():
            return None
        try:
            with np.load(path) as content:
                features = content["features"]
            if features.shape != shape or features.dtype != np.float32:
                raise ValueError(f"features {features.shape}, expected {shape}")
            return torch.from_numpy(features)
        except Exception as error:   # damaged bytes can fail in any way
            print(f"note: cache file {path} is damaged ({error}): encoding again", file=sys.stderr)
            return None

    def save(self, key, features):
        with atomic_write(self.folder / f"{key}.npz") as file:
            np.savez(file, features=features.numpy())


# ---- Readers -------------------------------------------------------------------------------------
#
# The files in a folder decide which reader applies.  Order matters: the few-shot sample depends on
# the order of classes and images, which is that of the official code (but for ImageNet: sorted
# here, there in the order in which the disk happens to list the files).

SPLIT_FORM = '{"train": [["cat/1.jpg", 0, "cat"], ...], "val": [...], "test": [...]}'
FOLDER_FORM = "train/<class>/*.jpg and test/<class>/*.jpg, or <class>/*.jpg alone"
SPLIT_FILES = ("https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/"
               "ac9077ee4e422f768c9b9109551468605e33ec9a/splits/")
KNOWN = {   # split file: (name, image folder, template)
    "split_zhou_DescribableTextures.json": ("dtd", "images", "{} texture."),
    "split_zhou_Caltech101.json": ("caltech-101", "101_ObjectCategories", PHOTO),
    "split_zhou_EuroSAT.json": ("eurosat", "2750", "a centered satellite photo of {}."),
    "split_zhou_OxfordFlowers.json": (
        "oxford_flowers", "jpg", "a photo of a {}, a type of flower."),
    "split_zhou_OxfordPets.json": ("oxford_pets", "images", "a photo of a {}, a type of pet."),
    "split_zhou_Food101.json": ("food-101", "images", "a photo of {}, a type of food."),
    "split_zhou_StanfordCars.json": ("stanford_cars", ".", PHOTO),
    "split_zhou_SUN397.json": ("sun397", "SUN397", PHOTO),
    "split_zhou_UCF101.json": ("ucf101", "UCF-101-midframes", "a photo of a person doing {}."),
}


def load_dataset(root):
    """The dataset in a folder, by the first reader that fits.  Reads names, not pixels.

    A folder called dtd that does not exist is downloaded.  Raises ValueError, with what was found
    and what was expected, if none fits or if the files contradict each other; OSError if a file is
    missing or the download fails.  What is passed over stands in `.notes`.
    """
    root = pathlib.Path(os.path.abspath(root))
    if root.name == "dtd" and not root.exists():
        download_dtd(root)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; expected {FOLDER_FORM}, or one of the paper's "
                         "datasets")
    if any(root.glob("split_zhou_*.json")):
        dataset = read_split(root)
    elif (root / "labels" / "train1.txt").is_file():
        dataset = read_dtd(root)
    elif (root / "images_variant_train.txt").is_file():
        dataset = read_aircraft(root)
    elif wnid_names(root):
        dataset = read_imagenet(root)
    else:
        dataset = read_folders(root)
    check_dataset(dataset)
    dataset.notes += likely_mistakes(dataset)
    return dataset


def make_dataset(name, template, root, names, parts, notes=()):
    """A Dataset from {key: class name} and train, val, test as lists of (path, key).

    The key is a class folder's name or a number; two classes may have one name.
    """
    labels = {key: label for label, key in enumerate(names)}
    labeled = []
    for part in parts:
        for path, key in part:
            if key not in labels:
                raise ValueError(f"{path} is of class {key!r}, which is none of the {len(names)} "
                                 "classes (those of the training images, or of a list beside them)")
        labeled.append([(path, labels[key]) for path, key in part])
    return Dataset(name, list(names.values()), *labeled, template, root, list(notes))


def check_dataset(dataset):
    """Raise ValueError for what would fail or mislead later."""
    root = dataset.root
    paths = [path for part in (dataset.train, dataset.val, dataset.test) for path, _ in part]
    for name in dataset.classnames:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ValueError(f"{root}: a class has the name {name!r}; expected printable text")
    for path in paths:
        if not path.is_relative_to(root) or ".." in path.parts:
            raise ValueError(f"the split of {root} has a path that leads outside, {path}")
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise ValueError(f"{root}: {len(missing)} images of the split are missing, the first is "
                         f"{missing[0]}")
    if len(dataset.classnames) < 2 or not dataset.test:
        raise ValueError(f"{root}: {len(dataset.classnames)} classes and {len(dataset.test)} test "
                         "images; needed are at least 2 and 1")


def likely_mistakes(dataset):
    """Notes on class names that CLIP cannot understand and on classes without images."""
    notes = []
    names = dataset.classnames
    codes = [name for name in names
             if re.fullmatch(r"n\d{8}.*|\d+([._-]\D.*)?|class[ _-]?\d+", name)]
    if codes:
        notes.append(f"{len(codes)} class names have codes in them, e.g. {codes[0]}: CLIP needs "
                     "words, so rename the folders (for codes like n01440764 a classnames.txt with "
                     "lines like 'n01440764 tench' will do, too)")
    if {name.lower() for name in names} <= {"images", "masks", "labels", "annotations"}:
        notes.append(f"{some(names)} look like parts of a segmentation dataset, not like classes")
    for first, second in same_prompts(names):
        notes.append(f"classes {first!r} and {second!r} make the same prompt")
    for part in (dataset.train, dataset.test):
        lacking = [names[k] for k in sorted(set(range(len(names))) - {label for _, label in part})]
        if part and lacking:
            kind = "training" if part is dataset.train else "test"
            notes.append(f"classes without {kind} images: {some(lacking)}")
    return notes


def same_prompts(names):
    """Pairs of class names that differ only in "_", case and spaces."""
    seen = {}
    pairs = []
    for name in names:
        prompt = " ".join(name.replace("_", " ").lower().split())
        if prompt in seen:
            pairs.append((seen[prompt], name))
        seen[prompt] = name
    return pairs


def some(names, count=5):
    """The first few names, for a message."""
    text = ", ".join(str(name) for name in names[:count])
    if len(names) > count:
        text += f", ... ({len(names)} in all)"
    return text


def read_lines(file):
    """Stripped lines of a text file that are not empty; a byte-order mark is ignored."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text file in UTF-8 ({error}); save it as one") from None
    return [line.strip() for line in lines if line.strip()]


def read_split(root):
    """The paper's split files, which give class names, since folders are often codes.

        dtd/
            split_zhou_DescribableTextures.json     SPLIT_FORM above, paths relative to images/
            images/banded/banded_0002.jpg
    """
    files = sorted(root.glob("split_zhou_*.json"))
    file = files[0]
    notes = [f"{other.name} is not used, {file.name} is" for other in files[1:]]
    name, folder, template = KNOWN.get(file.name, (root.name, "images", PHOTO))
    parts = []
    names = {}
    try:
        split = json.loads(file.read_text(encoding="utf-8-sig"))
        for part in PARTS:
            parts.append([(root / folder / path, label) for path, label, _ in split[part]])
            for _, label, word in split[part]:
                if names.setdefault(label, word) != word:
                    raise ValueError("a label has two names")
        names = dict(sorted(names.items()))
        labels = list(names)
        if labels != list(range(len(labels))) or any(type(label) is not int for label in labels):
            raise ValueError("labels are not 0 .. K - 1 with one name each")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not a split file ({type(error).__name__}: {error}); expected "
                         f"{SPLIT_FORM}") from None
    return make_dataset(name, template, root, names, parts, notes)


def read_dtd(root):
    """DTD as its authors ship it: images/ and labels/.  The paper's split file is fetched.

    Its authors' own ten splits are not used: accuracies would not compare with the paper's.
    """
    download(*DTD_SPLIT, root / "split_zhou_DescribableTextures.json", "0.6 MB")
    return read_split(root)


def read_aircraft(root):
    """FGVC Aircraft.

        fgvc_aircraft/
            variants.txt                        class names
            images_variant_train.txt            lines like "1025794 707-320"; also _val, _test
            images/1025794.jpg
    """
    parts = []
    for part in PARTS:
        items = []
        for line in read_lines(root / f"images_variant_{part}.txt"):
            image, _, variant = line.partition(" ")
            items.append((root / "images" / f"{image}.jpg", variant))
        parts.append(items)
    names = {variant: variant for variant in read_lines(root / "variants.txt")}
    template = "a photo of a {}, a type of aircraft."
    return make_dataset("fgvc_aircraft", template, root, names, parts)


def wnid_names(root):
    """{wnid: class name} of a classnames.txt with lines like "n01440764 tench", or {}."""
    file = root / "classnames.txt"
    names = {}
    if file.is_file():
        for line in read_lines(file):
            wnid, _, name = line.partition(" ")
            if not re.fullmatch(r"n\d{8}", wnid):
                return {}
            names[wnid] = name.strip() or wnid
    return names


def read_imagenet(root):
    """ImageNet, its variants, or any class folders that are named by wnids.

        imagenet/                               the test images are those of val
            classnames.txt                      lines like "n01440764 tench"
            images/train/n01440764/*.JPEG       or without images/
            images/val/n01440764/*.JPEG
        imagenet-a/                             a variant: test images in one folder
            classnames.txt
            imagenet-a/n01440764/*.jpg          or 0 .. 999 for the lines of classnames.txt (V2)
        my_subset/                              split 50/20/30, as class folders without a list
            classnames.txt
            n01440764/*.jpg

    Those that are present are the classes: A and R have 200 of the 1,000.
    """
    names = wnid_names(root)
    names.update({str(i): name for i, name in enumerate(list(names.values()))})
    homes = [folder for folder in (root / "images", root) if (folder / "train").is_dir()]
    skipped = Skipped(root)
    if homes:
        train = class_folders(homes[0] / "train", skipped)
        test = class_folders(homes[0] / "val", skipped)
        if not test:
            raise ValueError(f"{homes[0] / 'val'} has no class folders with images; "
                             + "; ".join(skipped.notes()))
        skipped.unused += [homes[0] / name for name in scan(homes[0]).folders
                           if name not in ("train", "val", "images")]
        found = train
        parts = [flatten(train), [], flatten(test)]
        title = "imagenet" if len(train) == 1000 else root.name      # T is 50 for all of it
    else:
        folders = [root] + [root / name for name in scan(root).folders]
        homes = [folder for folder in folders if set(scan(folder).folders) & set(names)]
        if not homes:
            raise ValueError(f"{root} has a classnames.txt with wnids, but no folder n01440764 or "
                             "the like, nor images/train and images/val")
        found = class_folders(homes[0], skipped)
        parts = [[], [], flatten(found)]
        title = root.name
        if homes[0] == root:
            parts = split_classes(found)
    unknown = [name for name in found if name not in names]
    if unknown:
        raise ValueError(f"{root}: classnames.txt has no name for {some(unknown)}")
    present = sorted(found, key=lambda key: (int(key) if key.isdigit() else 0, key))
    names = {key: names[key] for key in present}
    return make_dataset(title, PHOTO, root, names, parts, skipped.notes())


# ---- Class folders: what people have -------------------------------------------------------------

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff",
            ".jp2", ".ppm", ".pgm", ".pbm", ".pnm", ".avif")
TABLES = (".csv", ".tsv", ".json", ".txt")
JUNK = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "Thumbs.db", "desktop.ini", "lost+found")
PART_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
FILLERS = ("", "set", "split", "data", "images", "image", "imgs", "img", "photos")


@dataclass
class Content:
    """The visible names in a folder, sorted, as disks list them in different orders."""

    folders: list
    images: list
    others: list


def scan(folder):
    """Content of a folder.  Hidden names and a system's junk are left out, links are followed."""
    content = Content([], [], [])
    for name in sorted(os.listdir(folder)):
        if name.startswith(".") or name in JUNK:
            continue
        if os.path.isdir(os.path.join(folder, name)):
            content.folders.append(name)
        elif name.lower().endswith(SUFFIXES):
            content.images.append(name)
        else:
            content.others.append(name)
    return content


def find_files(folder, seen=()):
    """Content of a folder and all below it, as paths, sorted by folder."""
    found = Content([], [], [])
    real = os.path.realpath(folder)
    if real in seen:                 # a link that leads back up
        return found
    content = scan(folder)
    found.images += [pathlib.Path(folder, name) for name in content.images]
    found.others += [pathlib.Path(folder, name) for name in content.others]
    for name in content.folders:
        below = find_files(pathlib.Path(folder, name), (*seen, real))
        found.folders += [pathlib.Path(folder, name), *below.folders]
        found.images += below.images
        found.others += below.others
    return found


def find_images(folder):
    """All images in a folder and below it."""
    return find_files(folder).images


@dataclass
class Skipped:
    """What a reader of class folders passes over, to be named in a few lines."""

    root: pathlib.Path
    files: list = field(default_factory=list)       # no images
    deeper: list = field(default_factory=list)      # images in sub-folders of a class folder
    loose: list = field(default_factory=list)       # images beside class folders
    empty: list = field(default_factory=list)       # class folders without images
    unused: list = field(default_factory=list)      # files and folders beside the parts

    def notes(self):
        notes = []
        if self.files:
            kinds = collections.Counter(path.suffix or "without a suffix" for path in self.files)
            counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            notes.append("files passed over, no image format that Pillow reads here: "
                         f"{counts}; first: {self.below(self.files[0])}")
        if self.deeper:
            notes.append("images in sub-folders of class folders passed over: "
                         f"{len(self.deeper)}; first: {self.below(self.deeper[0])}")
        if self.loose:
            notes.append(f"images beside the class folders passed over: {len(self.loose)}; first: "
                         f"{self.below(self.loose[0])}")
        if self.empty:
            names = [self.below(path) for path in self.empty]
            notes.append(f"folders without images are no classes: {some(names)}")
        if self.unused:
            notes.append(f"not used: {some([self.below(path) for path in self.unused])}")
        return notes

    def below(self, path):
        return path.relative_to(self.root).as_posix()


def class_folders(home, skipped):
    """{class: [image path, ...]} of home/<class>/*, both sorted.  ValueError if there are none."""
    if not home.is_dir():
        raise ValueError(f"{home} is missing; expected class folders with images in it")
    content = scan(home)
    skipped.loose += [home / name for name in content.images]
    for name in content.others:
        if not name.lower().startswith(("readme", "license")) and not name.endswith(TABLES):
            skipped.files.append(home / name)
    found = {}
    for name in content.folders:
        inside = scan(home / name)
        images = [home / name / image for image in inside.images]
        skipped.files += [home / name / other for other in inside.others]
        for folder in inside.folders:
            skipped.deeper += find_images(home / name / folder)
        if images:
            found[name] = images
        else:
            skipped.empty.append(home / name)
    return found


def flatten(found):
    """{class: [path, ...]} -> [(path, class), ...]"""
    return [(path, name) for name, paths in found.items() for path in paths]


def read_folders(root):
    """Class folders, in parts or alone, in the folder itself or in its images/.

        my_photos/                              my_photos/
            train/cat/*.jpg                         cat/*.jpg
            val/cat/*.jpg       (optional)          dog/*.jpg
            test/cat/*.jpg

    Parts may have their other common names ("Training_Set", "valid", ...).  train/ and val/ alone:
    val/ is for testing.  test/ alone: for zero-shot and for a learned prompt.  Class folders
    alone: half of each class is for training, a fifth for validation, the rest for testing, after
    a shuffle that is always the same.
    """
    refuse_known_dataset(root)
    skipped = Skipped(root)
    home = root
    if (root / "images").is_dir() and holds_classes(root / "images"):
        home = root / "images"
        skipped.unused += [root / name for name in scan(root).folders if name != "images"]
    content = scan(home)
    parts = find_parts(home)
    tables = scan_tables([root] if home == root else [root, home])
    refuse_flat_parts(home, parts)
    if any(has_class_folders(folder) for folder in parts.values()):
        folders = [home / name for name in content.folders]
        skipped.unused += [folder for folder in folders if folder not in parts.values()]
        skipped.loose += [home / name for name in content.images]
        tables += scan_tables(parts.values())
        names, lists, notes = read_parts(home, parts, skipped)
    else:
        found = class_folders(home, skipped)
        if len(found) < 2:
            raise ValueError(explain_no_classes(root, home, found, skipped))
        names = {name: name for name in found}
        lists = split_classes(found)
        notes = []
    for first, second in same_prompts(names):
        raise ValueError(f"{home}: the classes {first!r} and {second!r} make the same prompt; "
                         "rename or merge the folders")
    for file in tables:
        notes.append(f"{file.relative_to(root).as_posix()} is not used (labels come from folders, "
                     f"or from a file split_zhou_*.json in {root})")
    return make_dataset(root.name, PHOTO, root, names, lists, notes + skipped.notes())


def scan_tables(folders):
    """Files in folders that might hold labels or class names."""
    tables = []
    for folder in folders:
        tables += [folder / name for name in scan(folder).others if name.endswith(TABLES)]
    return [file for file in tables if file.suffix != ".txt" or file.name == "classnames.txt"]


def read_parts(home, parts, skipped):
    """Class folders in parts -> names {class: class}, [train, val, test], notes."""
    found = {part: class_folders(folder, skipped) for part, folder in parts.items()}
    notes = []
    if "train" in found and len(found) == 1:
        raise ValueError(f"{home} has {parts['train'].name}/ and no test/ beside it; expected "
                         f"{FOLDER_FORM}, so {parts['train']} alone would be split")
    if "test" not in found:
        notes.append(f"{home} has no test/: the images of {parts['val'].name}/ are for testing, "
                     "none are left for validation")
        found["test"] = found.pop("val")
    classes = found["train"] if "train" in found else found["test"]
    if len(classes) < 2:
        folder = parts.get("train") or parts["test"]
        found = f"{folder} has {len(classes)} class folders with images, needed are at least 2"
        raise ValueError("; ".join([found, *skipped.notes(), f"expected {FOLDER_FORM}"]))
    lists = [flatten(found.get(part, {})) for part in PARTS]
    return {name: name for name in classes}, lists, notes


def part_of(name):
    """"train", "val" or "test" for a folder called so or "Training_Set", "valid", ...; or None."""
    words = [word for word in name_words(name) if word not in FILLERS]
    for part, spellings in PART_WORDS.items():
        if len(words) == 1 and words[0] in spellings:
            return part
    return None


def name_words(name):
    """The words of a folder's name: "Test-Set_2" -> ["test", "", ""]"""
    return [word.removesuffix("set") for word in re.split(r"[^a-z]+", name.lower())]


def find_parts(home):
    """{"train": folder, ...} of the sub-folders that are called so."""
    parts = {}
    for name in scan(home).folders:
        part = part_of(name)
        if part in parts and has_class_folders(home / name):
            raise ValueError(f"{home} has {parts[part].name}/ and {name}/: which one is {part}?")
        if part and part not in parts:
            parts[part] = home / name
    return parts


def has_class_folders(folder, at_least=1):
    return sum(bool(scan(folder / name).images) for name in scan(folder).folders) >= at_least


def holds_classes(folder, at_least=1):
    """Whether there are class folders in a folder, or in parts of it."""
    folders = [folder, *find_parts(folder).values()]
    return any(has_class_folders(place, at_least) for place in folders)


def refuse_flat_parts(home, parts):
    """train/*.jpg and test/*.jpg are no classes, but a dataset whose labels are elsewhere."""
    all_words = set(itertools.chain.from_iterable(PART_WORDS.values()))
    named = [name for name in scan(home).folders if all_words & set(name_words(name))]
    flat = [home / name for name in named if scan(home / name).images]     # "cars_train", too
    classes = [name for name in scan(home).folders if name not in named]
    if any(has_class_folders(folder) for folder in parts.values()):
        flat = [folder for folder in parts.values() if scan(folder).images]
        classes = []
    if flat and not classes:
        raise ValueError(f"{home}: {some([folder.name + '/' for folder in flat])} with images "
                         f"directly inside, which have no labels; expected {FOLDER_FORM}, or a "
                         f"file split_zhou_NAME.json: {SPLIT_FORM}")


def explain_no_classes(root, home, found, skipped):
    """Why a folder is no dataset, and what it might be instead."""
    message = f"{home}: class folders with images: {len(found)}, needed are at least 2; "
    for name in scan(home).folders:
        candidates = [home / name] + [home / name / inner for inner in scan(home / name).folders]
        for candidate in candidates:
            if holds_classes(candidate, at_least=2):
                return message + f"did you mean {candidate}?"
    for note in skipped.notes():
        message += f"{note}; "
    for file in scan_tables([root]):
        message += f"{file.name} is not read; "
    return message + f"expected {FOLDER_FORM}, or a file split_zhou_NAME.json: {SPLIT_FORM}"


def refuse_known_dataset(root):
    """The paper's datasets without their split file would have other splits and class names."""
    for file, (name, folder, _) in KNOWN.items():
        told_by_its_folder = folder not in (".", "images", "jpg")
        if told_by_its_folder and (root / folder).is_dir():
            raise ValueError(f"{root} has {folder}/, so it is {name}; expected {file} beside it, "
                             f"the paper's split (most are at {SPLIT_FILES}, all are linked in "
                             "DATASETS.md of github.com/KaiyangZhou/CoOp)")


def split_classes(found):
    """{class: [path, ...]} -> [train, val, test] as lists of (path, class), 50/20/30 per class.

    Rounded as the official code does; then at least one for testing and one for training.
    """
    rng = random.Random(1)
    train = []
    val = []
    test = []
    for name, paths in found.items():
        if len(paths) < 2:
            raise ValueError(f"class {name!r} has 1 image; it needs one for training and one for "
                             "testing (add images, or move the folder away; to test a learned "
                             "prompt on all images, put the class folders into a folder test)")
        items = [(path, name) for path in paths]
        rng.shuffle(items)
        n_train = round(0.5 * len(items))
        n_val = round(0.2 * len(items))
        if n_train + n_val == len(items):       # 2 images: 1, 0, 1; 3 images: 1, 1, 1
            n_train = 1
        train += items[:n_train]
        val += items[n_train:n_train + n_val]
        test += items[n_train + n_val:]
    return [train, val, test]


# ---- Downloading DTD -----------------------------------------------------------------------------
#
# DTD is fetched on demand, so that there is one real dataset to begin with.  A download appears
# under its final name only when its checksum is right, the folder only when it is complete.

DTD = ("https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
       "e42855a52a4950a3b59612834602aa253914755c95b0cff9ead6d07395f8e205")
DTD_SPLIT = (SPLIT_FILES + "split_zhou_DescribableTextures.json",
             "f26ebeccd2b58e68d70f07a0dc39fe49bf7b69024bac34396b954dfd87969c38")
TIMEOUT = 30                   # seconds without an answer until a download is given up


def download(url, sha256, path, size):
    """Fetch a file to path, atomically and with the right checksum.  OSError if it fails."""
    print(f"downloading {size} from {url} to {path}", file=sys.stderr)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except Exception as error:       # servers and networks fail in a dozen ways
        raise OSError(f"cannot download {url} ({error}); put it at {path}") from None
    finally:
        socket.setdefaulttimeout(before)


def download_dtd(root):
    """DTD's images and its authors' labels, 600 MB, to a folder dtd that does not exist yet."""
    archive = root.with_name("dtd-r1.0.1.tar.gz")
    unpacking = root.with_name("dtd.unpacking")
    if not archive.is_file() or hashlib.sha256(archive.read_bytes()).hexdigest() != DTD[1]:
        print(f"{root} does not exist: fetching the Describable Textures Dataset", file=sys.stderr)
        download(*DTD, archive, "600 MB")
    shutil.rmtree(unpacking, ignore_errors=True)
    with tarfile.open(archive) as tar:
        # From Python 3.10.12: nothing in the archive can lead outside the folder.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(unpacking)
    (unpacking / "dtd").rename(root)
    unpacking.rmdir()


# ---- The demo's world ----------------------------------------------------------------------------
#
# A world to learn CLIP and CoOp from, with nothing to download.  Its images show one of 8 textures
# in one of 6 colors, at some scale, on a dark or bright ground, as a plain photo, a faded one or a
# negative.  Captions always name color and texture and often the rest, so the features of an image
# hold much that is not its class, as those of a real CLIP do.  The images to classify are all
# negatives, a little fainter than the captioned ones, which "a photo of a {} texture." does not
# say: CoOp has to find it out.

HUES = {"red": 0, "yellow": 50, "green": 125, "blue": 225, "purple": 285, "orange": 25}  # degrees
# DTD's names, in DTD's spelling
TEXTURES = ("dotted", "perforated", "striped", "chequered", "zigzagged", "spiralled", "grid",
            "meshed")
SCALES = {"fine": (5, 7), "coarse": (2, 3)}                  # periods per image
GROUNDS = {"black": (0.0, 0.2), "white": (0.8, 1.0)}         # brightness
CAPTIONS = (
    "a {kind}{name} texture{ground}.",
    "a {kind}photo of a {name} texture{ground}.",
    "a {kind}photo of a {name} pattern{ground}.",
    "{kind}{name}{ground}.",
    "a {kind}picture of something {name}{ground}.",
)


@dataclass(frozen=True)
class Style:
    """How an image looks, whatever it shows: ranges of contrast and noise, and light for dark."""

    contrast: tuple = (0.7, 1)
    noise: tuple = (0, 0.08)
    negative: bool = False


KINDS = {"": Style(), "faded": Style(contrast=(0.25, 0.45)), "negative": Style(negative=True)}
TASK = Style(contrast=(0.5, 0.75), noise=(0.04, 0.12), negative=True)     # to classify


def height(texture, u, v):
    """A texture as a landscape over the plane (u, v): there is ink where it is positive."""
    if texture in ("dotted", "perforated"):
        return np.cos(u) + np.cos(v) - 0.9
    if texture in ("grid", "meshed"):
        return np.maximum(np.cos(u), np.cos(v)) - 0.75
    if texture == "striped":
        return np.sin(u)
    if texture == "chequered":
        return np.sin(u) * np.sin(v)
    if texture == "zigzagged":
        return np.sin(v + 2 * np.arcsin(np.sin(u)))
    if texture == "spiralled":
        return np.sin(np.hypot(u, v) + np.arctan2(v, u))
    raise ValueError(f"unknown texture {texture!r}")


def rgb(hue, saturation, value):
    """One color from hue in degrees, saturation and value in 0..1 -> (3,) in 0..1."""
    hsv = (int(hue % 360 / 360 * 255), int(255 * saturation), int(255 * value))
    pixel = Image.new("HSV", (1, 1), hsv).convert("RGB")
    return np.array(pixel.getpixel((0, 0))) / 255


def draw(color, texture, scale, ground, style, rng, size=64):
    """An image (size, size, 3) uint8 with these properties and everything else at random.

    rng: a numpy Generator.
    """
    y, x = (np.mgrid[:size, :size] + 0.5) / size - rng.uniform(0.3, 0.7, (2, 1, 1))
    angle = rng.uniform(0, np.pi)
    frequency = 2 * np.pi * rng.uniform(*SCALES[scale])
    u = frequency * (x * np.cos(angle) + y * np.sin(angle))
    v = frequency * (y * np.cos(angle) - x * np.sin(angle))
    sharpness = rng.uniform(6, 16)
    ink = 1 / (1 + np.exp(-sharpness * height(texture, u, v)))[..., None]      # (size, size, 1)
    if texture in ("perforated", "meshed"):                  # holes in the ink, not ink in dots
        ink = 1 - ink
    paper = np.full(3, rng.uniform(*GROUNDS[ground]))
    paint = rgb(HUES[color] + rng.uniform(-8, 8), rng.uniform(0.6, 1), rng.uniform(0.7, 1))
    image = paper + (paint - paper) * ink
    if style.negative:
        image = 1 - image
    mean = image.mean((0, 1))
    image = mean + (image - mean) * rng.uniform(*style.contrast)
    image = image + rng.normal(0, rng.uniform(*style.noise), image.shape)
    return (255 * image.clip(0, 1)).astype(np.uint8)


def draw_pairs(count, seed=0):
    """What the demo's CLIP learns from: images (count, 64, 64, 3) uint8, and their captions.

    Captions name color and texture, scale and ground half of the time, the kind mostly.
    """
    rng = np.random.default_rng(seed)
    images = []
    captions = []
    for _ in range(count):
        color = rng.choice(list(HUES))
        texture = rng.choice(TEXTURES)
        scale = rng.choice(list(SCALES))
        ground = rng.choice(list(GROUNDS))
        kind = rng.choice(list(KINDS))
        images.append(draw(color, texture, scale, ground, KINDS[kind], rng))
        words = {"name": f"{color} {texture}", "kind": "", "ground": ""}
        if rng.random() < 0.5:
            words["name"] = f"{scale} {words['name']}"
        caption = rng.choice(CAPTIONS)
        if kind and rng.random() < 0.8:
            words["kind"] = f"{kind} "
        if rng.random() < 0.5:
            words["ground"] = f" on {ground}"
        captions.append(caption.format(**words))
    return np.stack(images), captions


def caption_words():
    """All words that a caption can contain, sorted."""
    text = " ".join([*HUES, *TEXTURES, *SCALES, *GROUNDS, *KINDS, *CAPTIONS, "on"])
    return sorted(set(re.findall(r"[a-z]+", re.sub(r"{\w+}", " ", text))))


def draw_dataset(root, counts, style=TASK, seed=1):
    """Draw root/<part>/<color texture>/<number>.png, all in one style, atomically.

    counts: {part: images per class}.
    """
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix="drawing-") as temporary:
        drawing = pathlib.Path(temporary) / "images"
        for part, count in counts.items():
            for texture, color in itertools.product(TEXTURES, HUES):
                folder = drawing / part / f"{color} {texture}"
                folder.mkdir(parents=True)
                for i in range(count):
                    scale = rng.choice(list(SCALES))
                    ground = rng.choice(list(GROUNDS))
                    image = draw(color, texture, scale, ground, style, rng)
                    Image.fromarray(image).save(folder / f"{i:03}.png")
        try:
            drawing.rename(root)
        except OSError:
            if not root.is_dir():                    # or another process was faster
                raise
