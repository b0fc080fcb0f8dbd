"""Damages the content of files: blindly, and by what their formats are made of.

`damaged(content, form, chance)` gives the kind of damage and the new content; chance, a
random.Random, decides on everything. form: what the file is made of, a key of `FORMS`, or "" for
blind damage only.
"""

import io
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import torch

# Values of every type that JSON has, and some that it should not have.
VALUES = [
    *(None, True, False, 0, -1, 1, 3, 7, 2**31, 10**18, -(10**30), 0.5, -0.0, 1e-30, 1e308),
    *(float("nan"), float("inf"), "", "128", "a\nb", "\x1b[31mred", "../x", "/etc/passwd"),
    *("\ud800", "x" * 3000, [], [0], ["a"], [[]], [None] * 3, {}, {"a": 1}, {"dim": 3}),
]
KEYS = ["", "x", "a.b", "config", "dim", "a\nb", "weight", "__metadata__"]
IMPOSTORS = [
    b"",
    b"<!DOCTYPE html><html></html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    b"GGUF\3\0\0\0" + bytes(80),
    b'{"error": "not found"}',
    b"[" * 100_000,
    b'{"a":' * 5000,
    b"9" * 6000,
    b"NaN",
    b"PK\3\4" + bytes(60),
    b"PK\5\6" + bytes(18),
    bytes(4096),
    b"\xff\xfe{\0}\0",
    b"\xff" * 300,
    pickle.dumps({"x": [1] * 9}),
    b"\x80\x02]" + b"q\0" * 50 + b".",
]

# -------------------------------------------------------------------------------------------- blind


def _place(content: bytes, chance: Random) -> int:
    """A place in the content: half of them near its beginning or its end, where headers lie."""
    near = min(len(content), chance.choice([16, 64, 400, 4000]))
    where = chance.random()
    if where < 0.3:
        return chance.randrange(near)
    if where < 0.5:
        return len(content) - 1 - chance.randrange(near)
    return chance.randrange(len(content))


def _length(chance: Random) -> int:
    return chance.choice([1, 2, 4, 8, 30, 64, 500, 4096])


def flip_bits(content: bytes, chance: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 3, 20])):
        changed[_place(content, chance)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def overwrite(content: bytes, chance: Random) -> bytes:
    at = _place(content, chance)
    length = min(_length(chance), len(content) - at)
    return content[:at] + chance.randbytes(length) + content[at + length :]


def zero(content: bytes, chance: Random) -> bytes:
    at = _place(content, chance)
    length = min(_length(chance), len(content) - at)
    filler = chance.choice([b"\0", b"\0", b"\xff"])
    return content[:at] + filler * length + content[at + length :]


def cut(content: bytes, chance: Random) -> bytes:
    ends = [0, 1, 7, 8, 9, len(content) // 2, chance.randrange(len(content)), len(content) - 1]
    return content[: chance.choice([*ends, _place(content, chance)])]


def insert(content: bytes, chance: Random) -> bytes:
    at = _place(content, chance)
    return content[:at] + chance.randbytes(_length(chance)) + content[at:]


def remove(content: bytes, chance: Random) -> bytes:
    at = _place(content, chance)
    return content[:at] + content[at + _length(chance) :]


def repeat(content: bytes, chance: Random) -> bytes:
    at = _place(content, chance)
    end = at + _length(chance)
    return content[:end] + content[at:end] + content[end:]


def swap(content: bytes, chance: Random) -> bytes:
    """Two blocks of one length in each other's place."""
    length = min(_length(chance), len(content) // 2)
    if not length:
        return content + b"\0"
    a = chance.randrange(len(content) // 2 - length + 1)
    b = chance.randrange(len(content) // 2, len(content) - length + 1)
    first, second = content[a : a + length], content[b : b + length]
    return content[:a] + second + content[a + length : b] + first + content[b + length :]


def replace(content: bytes, chance: Random) -> bytes:
    return chance.choice([*IMPOSTORS, chance.randbytes(3000)])


BLIND = {
    "bits": flip_bits,
    "bytes": overwrite,
    "zeros": zero,
    "cut": cut,
    "insert": insert,
    "remove": remove,
    "repeat": repeat,
    "swap": swap,
    "another file": replace,
}

# --------------------------------------------------------------------------------------------- JSON


class Twice(dict):
    """Written by json.dumps, it has one of its keys twice."""

    def __init__(self, values: dict, key: str, value: Any):
        super().__init__(values)
        self.again = (key, value)

    def items(self):
        return [*super().items(), self.again]


def changed(value: Any, chance: Random) -> Any:
    """A JSON value with one place in it changed."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        rest = {name: entry for name, entry in value.items() if name != key}
        how = chance.random()
        if how < 0.1:
            return rest
        if how < 0.2:
            return rest | {chance.choice([*KEYS, key + ".", key[:-1]]): value[key]}
        if how < 0.3:
            return value | {chance.choice([*KEYS, *value]): chance.choice(VALUES)}
        if how < 0.4:
            return Twice(value, key, changed(value[key], chance))
        if how < 0.5:
            return value | {key: value[chance.choice(list(value))]}  # another one's value
        return value | {key: changed(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        new = list(value)
        at = chance.randrange(len(new))
        how = chance.random()
        if how < 0.2:
            new.pop(at)
        elif how < 0.4:
            new.insert(at, chance.choice([new[at], *VALUES]))
        else:
            new[at] = changed(new[at], chance)
        return new
    if type(value) in (int, float) and chance.random() < 0.5:
        return chance.choice([value + 1, -value, value * 2, value * 10**9, value / 3, str(value)])
    if isinstance(value, str) and value and chance.random() < 0.5:
        return chance.choice([value[:-1], value + value, value.upper(), [value], "\0" + value])
    return chance.choice(VALUES)


def written(value: Any, chance: Random) -> bytes:
    text = json.dumps(value, ensure_ascii=chance.random() < 0.5)
    if chance.random() < 0.05:
        text = text.replace('"', "'", 2)
    return text.encode("utf-8", "surrogatepass")


def json_file(content: bytes, chance: Random) -> bytes:
    return written(changed(json.loads(content), chance), chance)


def json_lines(content: bytes, chance: Random) -> bytes:
    """One line of many: changed as JSON, doubled, or left out."""
    lines = content.splitlines()
    at = chance.randrange(len(lines))
    how = chance.random()
    if how < 0.7:
        lines[at] = written(changed(json.loads(lines[at]), chance), chance)
    elif how < 0.85:
        lines.insert(at, lines[chance.randrange(len(lines))])
    else:
        lines.pop(at)
    return b"\n".join(lines) + b"\n"


def text_lines(content: bytes, chance: Random) -> bytes:
    lines = content.split(b"\n")
    at = chance.randrange(len(lines))
    odd = [b"", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\r", "\u2028".encode(), b"x" * 9000]
    how = chance.random()
    if how < 0.4:
        lines[at] = chance.choice([*odd, lines[at] + chance.choice(odd)])
    elif how < 0.7:
        lines.insert(at, lines[chance.randrange(len(lines))])
    else:
        lines.pop(at)
    return b"\n".join(lines)


def toml(content: bytes, chance: Random) -> bytes:
    """One key's value is another one."""
    values = ["-1", "0", "1e400", "nan", "-inf", "1_000_000_007", '"x"', '""', "[]", "[[1]]"]
    values += ["{a = 1}", "true", "1979-05-27", "0x10", '"a\\nb"', "3.5", "[1, 'a']", ""]
    lines = [line for line in content.decode().splitlines() if line.strip()]
    at = chance.randrange(len(lines))
    key, _, value = lines[at].partition("=")
    how = chance.random()
    if how < 0.7:
        lines[at] = f"{key}= {chance.choice(values)}"
    elif how < 0.8:
        lines[at] = f"{chance.choice(['x', 'a.b', '[table]', key + '.b', ''])} = {value}"
    elif how < 0.9:
        lines.append(lines[at])
    else:
        lines.pop(at)
    return "\n".join(lines).encode()


# ------------------------------------------------------------------------------------------ tensors


def safetensors(content: bytes, chance: Random) -> bytes:
    """The header of a safetensors file, or JSON within it, or what it says of its own length."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    said = header.get("__metadata__")
    if chance.random() < 0.1:
        lies = [0, 1, length - 1, length + 1, length * 2, 2**31, 2**63, 2**64 - 1]
        return chance.choice(lies).to_bytes(8, "little") + content[8:]
    if said and chance.random() < 0.5:
        key = chance.choice(list(said))
        try:
            said[key] = written(changed(json.loads(said[key]), chance), chance).decode(
                "utf-8", "replace"
            )
        except ValueError:
            said[key] = str(chance.choice(VALUES))
    else:
        header = changed(header, chance)
    text = written(header, chance)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def zipped(content: bytes, chance: Random) -> bytes:
    """An entry of a zip changed, compressed, doubled, added, renamed or left out."""
    source = zipfile.ZipFile(io.BytesIO(content))
    entries = {entry.filename: source.read(entry) for entry in source.infolist()}
    pickled = [name for name in entries if name.endswith("data.pkl")]
    victim = chance.choice([*entries, *pickled * 5])
    held = entries[victim]
    kinds = ["bits", "bytes", "cut", "longer", "out", "name", "twice", "small", "more"]
    kind = chance.choice(kinds)
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")  # zipfile's, of a second entry of one name
        for name, entry in entries.items():
            if name != victim or kind == "twice":
                archive.writestr(name, entry)
        if kind in ("bits", "bytes", "cut", "twice") and held:
            archive.writestr(victim, BLIND["bits" if kind == "twice" else kind](held, chance))
        elif kind == "longer":
            archive.writestr(victim, held + bytes(_length(chance)))
        elif kind == "name":
            archive.writestr(chance.choice(["x", "../x", victim + "0", "a/data/0"]), held)
        elif kind == "small":
            archive.writestr(victim, held, zipfile.ZIP_DEFLATED)
        elif kind == "more":
            archive.writestr(victim, held)
            archive.writestr(chance.choice(["x", "archive/data/99", "/etc/x"]), b"x")
    return out.getvalue()


def index(content: bytes, chance: Random) -> bytes:
    """The index of a checkpoint, which says other sizes, places or types."""
    held = pickle.loads(content)  # made by this campaign
    name = chance.choice(list(held.state_dict_metadata))
    entry = held.state_dict_metadata[name]
    key = chance.choice(list(held.storage_data))
    place = held.storage_data[key]
    how = chance.randrange(8)
    if how == 0:
        entry.size = torch.Size([chance.choice([0, 1, 10**6]) for _ in entry.size])
    elif how == 1:
        entry.chunks[0].offsets = torch.Size([chance.choice([1, -1, 2]) for _ in entry.size])
    elif how == 2:
        entry.properties.dtype = chance.choice([torch.float64, torch.int8, torch.bfloat16])
    elif how == 3:
        place.offset = chance.choice([0, 1, -1, 10**9, place.offset + 1])
    elif how == 4:
        place.length = chance.choice([0, 1, -1, 10**12, place.length - 1])
    elif how == 5:
        place.relative_path = chance.choice(["x", "../x", "", "/etc/passwd", "facts.json"])
    elif how == 6:
        del held.storage_data[key]
    else:
        held.state_dict_metadata[name + "x"] = held.state_dict_metadata.pop(name)
    return pickle.dumps(held)


def boxes(content: bytes, chance: Random) -> bytes:
    """A video whose description says another number: a byte behind a name of four letters."""
    names = [match.end() for match in re.finditer(rb"[a-z]{3}[a-z0-9]", content)]
    at = min(chance.choice(names) + chance.randrange(40), len(content) - 1)
    value = bytes([chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])])
    return content[:at] + value + content[at + 1 :]


FORMS: dict[str, Callable[[bytes, Random], bytes]] = {
    "json": json_file,
    "jsonl": json_lines,
    "lines": text_lines,
    "toml": toml,
    "safetensors": safetensors,
    "zip": zipped,
    "index": index,
    "boxes": boxes,
}


def damaged(content: bytes, form: str, chance: Random) -> tuple[str, bytes]:
    """The kind of the damage, and the content with it, which differs."""
    while True:
        kind = chance.choice(list(BLIND))
        change = BLIND[kind]
        if form and chance.random() < 0.5:
            kind = form
            change = FORMS[form]
        new = change(content, chance)
        if new != content:
            return kind, new
