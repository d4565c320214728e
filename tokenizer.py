"""CLIP's tokenizer: text becomes the numbers that CLIP's text encoder reads, by byte-pair encoding.

    python tokenizer.py "a photo of a cat"            # a worked trace, merge by merge

    from tokenizer import Tokenizer
    tokenizer = Tokenizer.openai()                    # CLIP's vocabulary, 49,408 entries
    tokenizer.encode("a photo of a cat")              # [320, 1125, 539, 320, 2368]
    tokenizer(["a photo of a cat", "two dogs"])       # (2, 77): sot, ids, eot, then zeros

Why bytes?  Any text in any script is a string of bytes, so 256 base tokens can spell everything and nothing is ever
"unknown".  Byte-pair encoding (Sennrich et al., arXiv 1508.07909) then gives the frequent byte strings tokens of their
own: starting from single bytes, glue together the neighbouring pair that was most frequent in the training text, again
and again.

Why `</w>`?  CLIP's encoding has no token for the space.  The last byte of every word carries the mark `</w>` ("end of
word") instead, so that "a cat" and "acat" differ, and so do "car" the word and "car" the beginning of "carpet".

Where 49,408 comes from, in the order of the ids:

    0 .. 255          one entry per byte
    256 .. 511        one entry per byte that ends a word
    512 .. 49405      48,894 merges, the most frequent first
    49406, 49407      <|startoftext|> (sot) and <|endoftext|> (eot)

Know before: nothing.  To take away: a word that CLIP met often is one token, a rare word is several, and the ids mean
nothing by themselves.  This file needs torch, ftfy and regex, and none of its neighbours.
"""
import gzip
import hashlib
import html
import importlib.util
import itertools
import pathlib
import sys

import ftfy
import regex
import torch

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
URL = f"https://raw.githubusercontent.com/openai/CLIP/d05afc436d78f1c48dc0dbf8e5980a9d471f35f6/clip/{VOCABULARY}"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
N_MERGES = 49152 - 256 - 2     # the file lists more pairs; CLIP was trained with this many

# How a text falls into words before any merging: merges never cross a word's border.
WORDS = regex.compile(r"""
    <\|startoftext\|> | <\|endoftext\|>        # the two special tokens stay whole
  | 's | 't | 're | 've | 'm | 'll | 'd        # what an apostrophe glues to an English word
  | \p{L}+                                     # letters, of any script
  | \p{N}                                      # digits, one at a time: 224 is 2, 2, 4
  | [^\s\p{L}\p{N}]+                           # a run of anything else: "...", ":-)"
""", regex.VERBOSE | regex.IGNORECASE)


def byte_symbols():
    """{byte: the printable character that stands for it}, in the order of CLIP's first 256 ids.

    The vocabulary is a text file with a space between the two halves of a pair, so no symbol may be a space or a
    control character.  Bytes that are visible characters in Latin-1 stand for themselves and come first; the other 68,
    in rising order, borrow the characters from 256 on.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def clean(text):
    """Mend broken Unicode, undo HTML entities (twice: "&amp;amp;"), one space between words, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", text).strip().lower()


class Tokenizer:
    """Text to ids and back.  merges: pairs of symbols, the first learned first; none = plain bytes.

    sot, eot: the ids of start and end of text; eot is the largest id of all, which is how CLIP's text encoder finds
    it.  vocab_size: 514 + the number of merges.
    """

    def __init__(self, merges=()):
        merges = [tuple(pair) for pair in merges]
        self.symbols = byte_symbols()
        single = list(self.symbols.values())
        self.tokens = single + [s + "</w>" for s in single] + ["".join(pair) for pair in merges]
        self.tokens += ["<|startoftext|>", "<|endoftext|>"]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.vocab_size = len(self.tokens)
        self.sot, self.eot = self.vocab_size - 2, self.vocab_size - 1
        self.known = {"<|startoftext|>": [self.sot], "<|endoftext|>": [self.eot]}   # word -> ids

    @classmethod
    def openai(cls, path=None):
        """The tokenizer of all of OpenAI's CLIP models, from the vocabulary at path; without a path from ~/.cache/clip,
        an installed `clip` or `open_clip`, or a download (1.4 MB, checked).  Raises OSError if there is none,
        ValueError if a file is damaged.
        """
        path = pathlib.Path(path or find_vocabulary())
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                text = file.read(1 << 23)                  # the real one is 3.2 million characters
        except Exception as e:  # noqa: BLE001       damaged bytes can fail in any way
            raise ValueError(f"{path} is not CLIP's vocabulary {VOCABULARY}: {e}") from None
        merges = [tuple(line.split()) for line in text.split("\n")[1:N_MERGES + 1]]         # line 1 is a header
        if [len(pair) for pair in merges] != [2] * N_MERGES:
            raise ValueError(f"{path} is not CLIP's vocabulary: expected a header and {N_MERGES} lines of two symbols")
        return cls(merges)

    def merge_steps(self, word):
        """The symbols of a word, first as single bytes, then after each merge.  The oldest merge that applies goes
        first, wherever it stands in the word: that repeats the order in which the vocabulary was learned.
        """
        parts = [self.symbols[b] for b in word.encode("utf-8")]
        parts[-1] += "</w>"
        while True:
            yield parts
            pairs = [pair for pair in itertools.pairwise(parts) if pair in self.rank]
            if not pairs:
                return
            best, merged, i = min(pairs, key=self.rank.get), [], 0
            while i < len(parts):                          # left to right, every occurrence
                width = 2 if tuple(parts[i:i + 2]) == best else 1
                merged.append("".join(parts[i:i + width]))
                i += width
            parts = merged

    def encode(self, text):
        """str -> list of ids, without sot and eot."""
        ids = []
        for word in WORDS.findall(clean(text)):
            if word not in self.known:
                *_, parts = self.merge_steps(word)
                self.known[word] = [self.ids[part] for part in parts]
            ids += self.known[word]
        return ids

    def decode(self, ids):
        """Ids -> str: lower case, a space after every word; bytes that are no UTF-8 become U+FFFD."""
        byte = {symbol: b for b, symbol in self.symbols.items()}
        symbols = "".join(self.tokens[i] for i in ids)
        return bytes(byte[s] for s in symbols).decode("utf-8", errors="replace").replace("</w>", " ")

    def __call__(self, texts, length=77):
        """Text or N texts -> LongTensor (N, length): sot, ids, eot, then zeros.  ValueError for a text that needs more
        than `length` places.
        """
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(rows, texts):
            ids = [self.sot, *self.encode(text), self.eot]
            if len(ids) > length:
                raise ValueError(f"text of {len(ids)} tokens (with start and end) does not fit in {length}: {text!r}")
            row[:len(ids)] = torch.tensor(ids)
        return rows


def find_vocabulary():
    """Path of a vocabulary with the right checksum; downloads it where there is none."""
    cached = pathlib.Path.home() / ".cache" / "clip" / VOCABULARY
    packages = [importlib.util.find_spec(name) for name in ("clip", "open_clip")]
    folders = [pathlib.Path(f) for spec in packages if spec for f in spec.submodule_search_locations or ()]
    for path in [cached, *(folder / VOCABULARY for folder in folders)]:
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256:
            return path
    try:                                                   # checks the sum, then renames: whole or not there
        cached.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading CLIP's vocabulary (1.4 MB) from {URL} to {cached}", file=sys.stderr)
        torch.hub.download_url_to_file(URL, str(cached), hash_prefix=SHA256)
    except Exception as e:  # noqa: BLE001             no network, a login page, a full disk, ...
        raise OSError(f"CLIP's vocabulary is missing and cannot be downloaded ({e}): put {URL} at {cached}") from None
    return cached


def main(texts):
    """Print how each text becomes ids."""
    tokenizer = Tokenizer.openai()
    for text in texts or ["a photo of a cat"]:
        print(f"text     {text!r}\ncleaned  {clean(text)!r}")
        for word in WORDS.findall(clean(text)):
            special = word in ("<|startoftext|>", "<|endoftext|>")
            steps = ["special, kept whole"] if special else [" ".join(parts) for parts in tokenizer.merge_steps(word)]
            print(f"  {word}:  " + "  ->  ".join(steps) + f"   ids {tokenizer.encode(word)}")
        ids = [tokenizer.sot, *tokenizer.encode(text), tokenizer.eot]
        print(f"ids      {ids}  ({len(ids)} of 77 places)\ndecoded  {tokenizer.decode(ids)!r}\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
