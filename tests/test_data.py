"""Stores on disk, order."""

import json
import os
import subprocess
import sys

import pytest
import torch
from common import private_memory, randn
from safetensors import safe_open
from safetensors.torch import save_file

from wan5b.data import HEADER, Store, TextStore, difference, order
from wan5b.extras.shards import check_texts, write_shard


def two_shards(folder, **facts):
    """Items 0 to 4 in a shard of 3 and one of 2, with an empty one between. Returns the tensors."""
    x = randn(5, 2, 3).bfloat16()
    index = torch.arange(5)
    for i, part in enumerate((slice(0, 3), slice(0, 0), slice(3, 5))):
        prompts = [f"prompt {k}" for k in range(5)[part]]
        tensors = {"x": x[part], "index": index[part]}
        write_shard(folder / f"0000{i}.safetensors", tensors, prompts, **facts)
    return x, index


def text_shards(folder, dim=8):
    """Three prompts of 4, 1 and 2 tokens in two shards. Returns prompt -> embedding."""
    rows = {
        "a fox": randn(4, dim).bfloat16(),
        "": randn(1, dim, seed=1).bfloat16(),
        "红": randn(2, dim, seed=2).bfloat16(),
    }
    for i, prompts in enumerate((["a fox", ""], ["红"])):
        lengths = torch.tensor([len(rows[prompt]) for prompt in prompts])
        tensors = {"rows": torch.cat([rows[prompt] for prompt in prompts]), "lengths": lengths}
        write_shard(folder / f"0000{i}.safetensors", tensors, prompts, negative="")
    return rows


# ------------------------------------------------------------------------------------------- stores


def test_store_round_trip(tmp_path):
    x, index = two_shards(tmp_path, sigmas=[1.0, 0.1], name="é")
    store = Store(tmp_path)
    assert len(store) == 5
    assert store.prompts == [f"prompt {k}" for k in range(5)]
    assert store.facts == {"sigmas": [1.0, 0.1], "name": "é"}
    assert store.shapes == {"x": (2, 3), "index": ()}
    for i, item in enumerate(store):
        assert item.keys() == {"x", "index"}
        assert torch.equal(item["x"], x[i])
        assert item["x"].dtype == torch.bfloat16
        assert item["index"] == index[i]
    with pytest.raises(IndexError):
        store[5]


def test_items_are_copies(tmp_path):
    x, _ = two_shards(tmp_path)
    store = Store(tmp_path)
    store[1]["x"].zero_()
    assert torch.equal(store[1]["x"], x[1])
    rows = text_shards(tmp_path / "text")
    text = TextStore(tmp_path / "text")
    text["a fox"].zero_()
    assert torch.equal(text["a fox"], rows["a fox"])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_reading_an_item_does_not_read_its_shard(tmp_path):
    size = 8 * 2**20
    write_shard(tmp_path / "0.safetensors", {"x": torch.ones(16, size // 4)}, [""] * 16)
    before = private_memory()
    store = Store(tmp_path)
    item = store[7]
    assert private_memory() - before < 2 * size < 16 * size
    assert item["x"].untyped_storage().nbytes() == size

    # Of the mapped file, too, only the pages of the item are read, and some ahead.
    with open("/proc/self/smaps") as f:
        mapped = f.read().split("0.safetensors")[1:]
    resident = sum(int(part.split("Rss:")[1].split()[0]) for part in mapped)
    assert resident * 1024 < 4 * size


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "new" / "0.safetensors"
    write_shard(path, {"x": torch.ones(1, 2)}, ["whole"])
    before = path.read_bytes()

    def full(tensors, partial, metadata):
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wan5b.util.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(path, {"x": torch.zeros(1, 2)}, ["broken"])
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    path.with_name(path.name + ".partial").write_bytes(b"half")  # of a process that was killed
    assert Store(path.parent).prompts == ["whole"]  # that is no shard
    write_shard(path, {"x": torch.zeros(1, 2)}, ["again"])  # nor in the way
    assert list(path.parent.iterdir()) == [path]


def test_files_are_a_function_of_what_is_written(tmp_path):
    code = (
        "import sys, torch; from wan5b.extras.shards import write_shard\n"
        "x = torch.arange(6.).view(2, 3)\n"
        "write_shard(sys.argv[1], {'b': x, 'a': x + 1}, ['p', 'q'], seed=1, size=[1, 2], model='m')"
    )
    for name in "ab":
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_header_is_one_key(tmp_path):
    write_shard(tmp_path / "0.safetensors", {"x": torch.ones(1)}, ["p"], made_from="abc", seed=1)
    with safe_open(tmp_path / "0.safetensors", "pt") as f:
        metadata = f.metadata()
    assert metadata.keys() == {HEADER}
    expected = {"prompts": ["p"], "facts": {"seed": 1}, "made_from": "abc"}
    assert json.loads(metadata[HEADER]) == expected


def test_store_errors(tmp_path):
    with pytest.raises(ValueError, match="nowhere is no folder of shards"):
        Store(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is no folder of shards"):
        Store(tmp_path)
    two_shards(tmp_path, seed=0)
    first = tmp_path / "00000.safetensors"
    whole = first.read_bytes()
    for broken in (whole[:-4], whole[:20], b""):
        first.write_bytes(broken)
        with pytest.raises(ValueError, match=r"00000.safetensors is damaged"):
            Store(tmp_path)
    save_file({"x": torch.ones(1)}, first)
    with pytest.raises(ValueError, match="not of prepare.py"):
        Store(tmp_path)
    first.write_bytes(whole)
    assert "\n" not in difference({"a": "x\ny"}, {"a\nb": 3})
    other = tmp_path / "00003.safetensors"
    write_shard(other, {"x": torch.ones(1, 2, 3).bfloat16(), "index": torch.ones(1)}, ["p"], seed=1)
    says = "00003.safetensors does not belong with 00000.safetensors: seed 0 and 1"
    with pytest.raises(ValueError, match=says):
        Store(tmp_path)
    write_shard(other, {"x": torch.ones(1, 2, 4).bfloat16(), "index": torch.ones(1)}, ["p"], seed=0)
    with pytest.raises(ValueError, match=r"x \(2, 3\) and \(2, 4\)"):
        Store(tmp_path)
    write_shard(other, {"x": torch.ones(1, 2, 3).bfloat16()}, ["p"], seed=0)
    with pytest.raises(ValueError, match=r"index \(\) and None"):
        Store(tmp_path)


def test_text_store(tmp_path):
    rows = text_shards(tmp_path)
    text = TextStore(tmp_path)
    assert text.prompts == list(rows)
    assert text.facts == {"negative": ""}
    for prompt, embedding in rows.items():
        assert torch.equal(text[prompt], embedding)
    batch = text.batch(["红", "a fox", "红"], 5)
    assert batch.shape == (3, 5, 8)
    assert batch.dtype == torch.float32
    assert torch.equal(batch[0], batch[2])
    for row, prompt in zip(batch, ["红", "a fox"], strict=False):
        n = len(rows[prompt])
        assert torch.equal(row[:n], rows[prompt].float())
        assert not row[n:].any()
    assert text.batch([""], 1, torch.bfloat16).dtype == torch.bfloat16

    too_long = r"width 8 and up to 4 tokens, the network takes \(8, 3\): shorten"
    with pytest.raises(ValueError, match=too_long):
        check_texts(text, ["", "a fox"], 8, 3)
    with pytest.raises(AssertionError, match="4 tokens, not 3: 'a fox'"):
        text.batch(["", "a fox"], 3)
    with pytest.raises(ValueError, match=r"width 8 and .*, the network takes \(9, 4\): shorten"):
        check_texts(text, ["a fox"], 9, 4)
    check_texts(text, ["a fox"], 8, 4)
    with pytest.raises(ValueError, match=r"lacks 4 prompts \('b'\); see prepare.py text"):
        check_texts(text, ["a fox", "b", "c", "d", "e", "b"], 8, 4)
    for missing in (lambda: text["b"], lambda: text.batch(["a fox", "b"], 5)):
        with pytest.raises(ValueError, match=r"lacks 1 prompts \('b'\)"):
            missing()
    two_shards(tmp_path / "other")
    with pytest.raises(ValueError, match="holds x, index and no text|holds index, x and no text"):
        TextStore(tmp_path / "other")


# -------------------------------------------------------------------------------------------- order


def test_order_is_a_new_permutation_in_every_epoch():
    def items(seed, epoch):
        return [order(10, 10 * epoch + i, seed) for i in range(10)]

    epochs = [items(seed, epoch) for seed in (0, 1) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6

    # There is no state: positions may be asked for in any order.
    expected = [epochs[2][5], epochs[0][3], epochs[1][4]]
    assert [order(10, position, 0) for position in (25, 3, 14)] == expected
    assert order(1, 7, 0) == 0
