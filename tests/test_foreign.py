"""Whatever lies in a checkpoint's directory: all who read it judge alike, in one line, and act on nothing."""

import json
import os
import random
import re
import shutil
import struct
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.ranks import run_ranks
from trainer.checkpoint import Checkpoints, DamagedError, problems, read_index, read_manifest, read_whole
from trainer.checkpoint.__main__ import DAMAGED, OK, REFUSED, main
from trainer.checkpoint.checkpoints import remove
from trainer.checkpoint.cover import uncovered
from trainer.checkpoint.foreign import check_yaml, read_json
from trainer.checkpoint.manifest import file_entry, write_manifest

# -- every element exactly once -----------------------------------------------------------------------------


def counted(shape: tuple[int, ...], boxes: list) -> bool:
    """The slow way: counts how often each element is held."""
    times = np.zeros(shape, dtype=int)
    for offsets, sizes in boxes:
        times[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] += 1
    return bool((times == 1).all())


def cut(shape: tuple[int, ...], chance: random.Random) -> list:
    """A random cut into boxes: again and again one of them in two."""
    boxes = [((0,) * len(shape), shape)]
    for _ in range(chance.randrange(8)):
        offsets, sizes = boxes.pop(chance.randrange(len(boxes)))
        axis = chance.randrange(len(shape))
        at = chance.randint(0, sizes[axis])
        first, rest = list(sizes), list(sizes)
        first[axis], rest[axis] = at, sizes[axis] - at
        moved = list(offsets)
        moved[axis] += at
        boxes += [(o, tuple(n)) for o, n in ((offsets, first), (tuple(moved), rest)) if 0 not in n]
    return boxes


def test_any_cut_is_whole_and_any_change_of_it_is_seen_as_counting_sees_it():
    """Also changes that keep the number of values: a box in the place of another one."""
    chance, seen = random.Random(0), {True: 0, False: 0}
    for _ in range(1500):
        shape = tuple(chance.randint(1, 5) for _ in range(chance.randint(1, 3)))
        boxes = cut(shape, chance)
        assert uncovered(shape, boxes) is None
        for _ in range(chance.randint(1, 2)):
            at = chance.randrange(len(boxes))
            sizes = boxes[at][1]
            room = [range(whole - n + 1) for whole, n in zip(shape, sizes, strict=True)]
            boxes[at] = (tuple(chance.choice(axis) for axis in room), sizes)
        right = counted(shape, boxes)
        assert (uncovered(shape, boxes) is None) == right, (shape, boxes)
        seen[right] += 1
    assert min(seen.values()) > 300


def test_the_kinds_of_wrong_pieces():
    rows = [((0, 0), (2, 6)), ((2, 0), (2, 6))]
    assert (
        uncovered((4, 6), rows) is None
        and uncovered((), [((), ())]) is None
        and uncovered((0, 3), []) is None
    )
    assert "hold 12 of the 24" in uncovered((4, 6), rows[:1]) and "hold 0 of the 24" in uncovered((4, 6), [])
    assert "hold 36 of the 24" in uncovered((4, 6), [*rows, rows[0]])
    assert "overlap" in uncovered((4, 6), [rows[0], rows[0]])
    assert "hold 2 of the 1" in uncovered((), [((), ()), ((), ())])
    for box in [((-2, 0), (2, 6)), ((3, 0), (2, 6)), ((2**62, 0), (2, 6)), ((2, 0), (0, 6))]:
        assert "outside" in uncovered((4, 6), [rows[0], box])
    assert "its shape is" in uncovered((4, 6), [rows[0], ((2,), (2,))])


def test_a_layout_of_a_hundred_thousand_pieces_is_judged_in_one_pass():
    """256 experts x 400 ranks; a piece at the place of its neighbour keeps the number of values."""
    boxes = [((expert, 8 * rank), (1, 8)) for expert, rank in product(range(256), range(400))]
    assert uncovered((256, 3200), boxes) is None
    assert "overlap" in uncovered((256, 3200), [*boxes[1:], boxes[1]])


# -- a checkpoint whose files were changed, and the manifest with them ---------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run's directory with checkpoints of two ranks, of steps 1 and 2."""
    run = tmp_path_factory.mktemp("run")

    def worker() -> None:
        mesh = init_device_mesh("cpu", (2,))
        kept = Checkpoints(run / "checkpoints", retries=0)
        for step in (1, 2):
            whole = torch.arange(24.0).view(4, 6) + step
            state = {
                "a": distribute_tensor(whole, mesh, [Shard(0)]),
                "b": distribute_tensor(whole + 100, mesh, [Shard(0)]),
                "step": torch.tensor(step),
            }
            texts = {"config.yaml": "model: {dim: 4}\n", "tokenizer.json": "{}"}
            kept.save(step, state, about={"tokens": 10}, texts=texts, wait=True)

    run_ranks(worker, 2)
    return run


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def fix(checkpoint: Path) -> None:
    """The manifest is that of the files as they are."""
    about = json.loads((checkpoint / "manifest.json").read_text())
    del about["xxh3"]
    files = {
        name: file_entry(checkpoint / name) for name in about.pop("files") if (checkpoint / name).is_file()
    }
    write_manifest(checkpoint, about, files)


def index(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(checkpoint: Path) -> None:
        content = json.loads((checkpoint / "index.json").read_text())
        change(content)
        (checkpoint / "index.json").write_text(json.dumps(content))

    return edit


def piece(**values) -> Callable[[Path], None]:
    return index(lambda content: content["a"]["pieces"][1].update(values))


def file(name: str, content: bytes | str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def header(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(checkpoint: Path) -> None:
        path = checkpoint / "rank-00000.safetensors"
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + size])
        change(entries)
        text = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return edit


def length(number: int) -> Callable[[Path], None]:
    def edit(checkpoint: Path) -> None:
        path = checkpoint / "rank-00000.safetensors"
        path.write_bytes(struct.pack("<Q", number) + path.read_bytes()[8:])

    return edit


def swapped(content: dict) -> None:
    content["a"]["pieces"], content["b"]["pieces"] = content["b"]["pieces"], content["a"]["pieces"]


DEEP = '{"a":' * 100_000
SHARD = "rank-00000.safetensors: cannot be read as safetensors"
# what lies there, and a part of the one line that says so
FORGED = {
    "no piece": (index(lambda c: c["a"].update(pieces=[])), "index.json: a: .* hold 0 of the 24 values"),
    "half the pieces": (
        index(lambda c: c["a"]["pieces"].pop()),
        "index.json: a: .* hold 12 of the 24 values",
    ),
    "a piece twice": (index(lambda c: c["a"]["pieces"].append(c["a"]["pieces"][0])), "hold 36 of the 24"),
    "one in the other's place": (piece(offsets=[0, 0]), "index.json: a: .*pieces overlap"),
    "a negative offset": (piece(offsets=[-2, 0]), "index.json: a: -2: must be a whole number"),
    "a huge offset": (piece(offsets=[2**62, 0]), "index.json: a: .*lies outside of"),
    "beyond int64": (piece(offsets=[2**64, 0]), "index.json: a: 18446744073709551616: must be a whole"),
    "no number": (piece(offsets=[2.0, 0]), "index.json: a: 2.0: must be a whole number"),
    "offsets of another rank": (piece(offsets=[2]), "index.json: a: .*but its shape is"),
    "a shape of 10^13": (index(lambda c: c["a"].update(shape=[10**13, 6])), "hold 24 of the 60000000000000"),
    "another tensor's pieces": (index(swapped), "a@0,0 must be .* is called b@0,0 there"),
    "another dtype": (
        index(lambda c: c["a"].update(dtype="int32")),
        "a@0,0 must be .'I32', .2, 6.. by index.json, is .'F32'",
    ),
    "an unknown dtype": (index(lambda c: c["a"].update(dtype="bits")), "index.json: a: KeyError: 'bits'"),
    "no such tensor": (index(lambda c: c.pop("a")), "holds a@0,0, which index.json does not name"),
    "an empty name": (piece(file=""), "index.json: a: '' must be a plain file name"),
    "the directory above": (piece(file=".."), "index.json: a: '..' must be a plain file name"),
    "an absolute name": (piece(file="/etc/passwd"), "'/etc/passwd' must be a plain file name"),
    "a NUL in a name": (piece(file="a\0b"), "must be a plain file name"),
    "a file that is none": (piece(file=7), "7 must be a plain file name"),
    "an unlisted file": (
        piece(file="rank-00007.safetensors"),
        "names rank-00007.safetensors, which manifest",
    ),
    "no pieces": (index(lambda c: c["a"].pop("pieces")), "index.json: a: KeyError: 'pieces'"),
    "a tensor of text": (index(lambda c: c.update(a="text")), "index.json: a: TypeError"),
    "an index of a list": (file("index.json", "[]"), "index.json: must be a JSON object"),
    "an empty index": (file("index.json", ""), "index.json: Expecting value"),
    "a deep index": (file("index.json", DEEP), "index.json: RecursionError"),
    "no UTF-8": (file("index.json", b'{"\xff": 1}'), "index.json: 'utf-8' codec"),
    "a key twice": (file("index.json", '{"a": {}, "a": {}}'), "index.json: 'a' stands in it twice"),
    "not a number": (file("index.json", '{"a": NaN}'), "index.json: NaN is no number"),
    "infinity": (file("index.json", '{"a": -Infinity}'), "index.json: -Infinity is no number"),
    "a number of 10,000 digits": (file("index.json", '{"a": ' + "1" * 10_000 + "}"), "index.json: Exceeds"),
    "a header of 0 bytes": (length(0), SHARD),
    "a header of 100 MB": (length(100_000_000), SHARD),
    "a header of 2^63 bytes": (length(2**63), SHARD),
    "an empty shard": (file("rank-00000.safetensors", b""), SHARD),
    "overlapping data": (header(lambda h: h["b@0,0"].update(data_offsets=h["a@0,0"]["data_offsets"])), SHARD),
    "huge data": (header(lambda h: h["b@0,0"].update(data_offsets=[0, 2**63])), SHARD),
    "data of another size": (header(lambda h: h["b@0,0"].update(shape=[2, 7])), SHARD),
    "a shape of 10^13 in a header": (header(lambda h: h["b@0,0"].update(shape=[10**13, 6])), SHARD),
    "a dtype that is none": (header(lambda h: h["b@0,0"].update(dtype="X9")), SHARD),
    "another shape of as many values": (
        header(lambda h: h["b@0,0"].update(shape=[3, 4])),
        "b@0,0 must be .*is ",
    ),
    "another name in a header": (header(lambda h: h.update(c=h.pop("b@0,0"))), "b@0,0 must be .* is missing"),
    "a python tag": (
        file("config.yaml", "a: !!python/object/apply:os.system [true]"),
        "config.yaml, line 1: a tag",
    ),
    "aliases": (file("config.yaml", "a: &a [1]\nb: *a\n"), "config.yaml, line 1: an anchor or alias"),
    "an interpolation": (
        file("config.yaml", "a:\n  b: ${oc.env:HOME}\n"),
        "line 2: '\\${oc.env:HOME}', nothing is",
    ),
    "a list of settings": (file("config.yaml", "- 1\n"), "config.yaml: must be a mapping"),
    "a setting twice": (file("config.yaml", "a: 1\na: 2\n"), "config.yaml: ConstructorError"),
    "no YAML": (file("config.yaml", "a: ["), "config.yaml: ParserError"),
    "deep YAML": (file("config.yaml", "a: " + "[" * 20_000), "line 1: more than 50 levels"),
    "endless YAML": (file("config.yaml", "a: 1\n" * 300_000), "config.yaml has 1500000 bytes"),
    "binary YAML": (file("config.yaml", b"\x00\xff\xfe"), "config.yaml: "),
    "a tokenizer that is none": (file("tokenizer.json", "{"), "tokenizer.json: Expecting"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_checkpoint_is_refused_in_one_line_by_all_who_read_it(run, capsys, name):
    forge, message = FORGED[name]
    checkpoint = run / "checkpoints/step-00000002"
    forge(checkpoint)
    fix(checkpoint)
    wrong, *more = problems(checkpoint)  # one line a file
    assert len(more) <= 1
    assert_line(wrong, message)
    goes_on_from = run_ranks(lambda: Checkpoints(run / "checkpoints").newest_good().step, 1)
    assert goes_on_from == [1]
    assert main(["verify", str(run), "2"]) == DAMAGED and main(["rewind", str(run), "2"]) == DAMAGED
    assert main(["verify", str(run), "1"]) == OK and main(["list", str(run)]) == OK
    captured = capsys.readouterr()
    told = wrong.split(" header: ")[
        0
    ]  # safetensors names one of two that overlap, now this one, now that one
    assert told in captured.out and told in captured.err
    if "index.json: a: " in message:
        with pytest.raises(DamagedError):
            read_whole(checkpoint)


def assert_line(text: str, pattern: str) -> None:
    assert re.search(pattern, text), text
    assert "\n" not in text and text.isprintable() and len(text) < 600


def test_an_untouched_one_is_good_after_fixing(run):
    fix(run / "checkpoints/step-00000002")
    assert problems(run / "checkpoints/step-00000002") == []


LINKED = {
    "a link": (lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")), "is a symbolic link"),
    "a hanging link": (lambda path: (path.unlink(), path.symlink_to("nowhere")), "is a symbolic link"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "is a pipe"),
    "a directory": (lambda path: (path.unlink(), path.mkdir()), "is a directory"),
    "nothing": (lambda path: path.unlink(), "is missing"),
}


@pytest.mark.parametrize("name", ["manifest.json", "index.json", "rank-00001.safetensors", "config.yaml"])
@pytest.mark.parametrize("kind", LINKED)
def test_what_is_no_regular_file_is_not_opened(run, name, kind):
    """A pipe would never answer."""
    change, message = LINKED[kind]
    change(run / "checkpoints/step-00000002" / name)
    for hashes in (True, False):
        (wrong,) = problems(run / "checkpoints/step-00000002", hashes=hashes)
        assert_line(wrong, f"{name} {message}")


MANIFESTS = {
    "step": (2**63, "9223372036854775808: must be a whole number"),
    "tokens": ("many", "'many': must be a whole number"),
    "data": ([1], "data must be an object"),
    "files": ({"..": {"bytes": 1, "xxh3": "0"}}, "'..' must be a plain file name"),
}


@pytest.mark.parametrize("key", MANIFESTS)
def test_a_forged_manifest_is_refused(run, key):
    checkpoint = run / "checkpoints/step-00000002"
    about = read_manifest(checkpoint)
    files = about.pop("files")
    value, message = MANIFESTS[key]
    write_manifest(checkpoint, about | {key: value}, files | (value if key == "files" else {}))
    (wrong,) = problems(checkpoint)
    assert_line(wrong, f"manifest.json: {message}")


def test_a_manifest_writes_nothing_on_the_terminal_but_text(run, capsys):
    checkpoint = run / "checkpoints/step-00000002"
    about = read_manifest(checkpoint)
    files = about.pop("files")
    write_manifest(checkpoint, about | {"code": "\x1b[31m[/b]\ud800", "saved_at": ["[bold"]}, files)
    assert problems(checkpoint) == [] and main(["list", str(run)]) == OK
    assert "?[31m[/b]?" in capsys.readouterr().out


def test_plain_yaml_is_taken(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("a: 1\nb: {c: [1.5, null, true], d: 'x: y'}\ne: 1e-3\n")
    check_yaml(path)
    (tmp_path / "x.json").write_text('{"a": [1, {"b": null}]}')
    assert read_json(tmp_path / "x.json") == {"a": [1, {"b": None}]}


def test_ranks_judge_together_and_name_each_damage_once(run):
    checkpoint = run / "checkpoints/step-00000002"
    index(lambda content: content["a"]["pieces"].pop())(checkpoint)
    fix(checkpoint)
    for wrong in run_ranks(lambda: Checkpoints(run / "checkpoints").verify(2), 3):
        assert len(wrong) == 1 and "hold 12 of the 24" in wrong[0]
    assert len(read_index(run / "checkpoints/step-00000001")) == 3


def test_a_file_that_changes_after_it_was_verified_is_one_line_too(run):
    """`refusing` of run/build.py says the cause of an error, where there is one."""
    length(0)(run / "checkpoints/step-00000002")

    def worker() -> tuple[str, object]:
        blank = {"a": torch.zeros(4, 6), "b": torch.zeros(4, 6), "step": torch.tensor(0)}
        with pytest.raises(DamagedError) as refusal:
            Checkpoints(run / "checkpoints").load(2, blank)
        return str(refusal.value), refusal.value.__cause__

    ((message, cause),) = run_ranks(worker, 1)
    assert_line(message, "step-00000002 cannot be read: rank 0: SafetensorError: ")
    assert cause is None


# -- what else may lie beside checkpoints --------------------------------------------------------------------


def save(directory: Path, *steps: int, keep: int = 1) -> tuple:
    def worker() -> tuple:
        kept = Checkpoints(directory, keep=keep, retries=0)
        found = kept.newest_good()
        kept.go_on_from(found.step if found else None)
        for step in steps:
            kept.save(step, {"step": torch.tensor(step)}, wait=True)
        return kept.misses, kept.steps()

    return run_ranks(worker, 1)[0]


def test_a_link_among_old_checkpoints_is_removed_and_what_it_points_to_stays(run, tmp_path):
    directory, elsewhere = run / "checkpoints", tmp_path / "archive"
    (directory / "step-00000001").rename(elsewhere)
    (directory / "step-00000001").symlink_to(elsewhere)
    assert save(directory, 3, 4) == (0, [4])
    assert sorted(path.name for path in directory.iterdir()) == ["latest", "step-00000004"]
    assert problems(elsewhere) == []


def test_odd_things_beside_checkpoints_end_no_save(run, tmp_path):
    directory, elsewhere = run / "checkpoints", tmp_path / "archive"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    (directory / ".step-00000009.draft").symlink_to(elsewhere)
    (directory / ".step-00000001.deleted").write_text("a file")
    (directory / ".step-00000003.draft").symlink_to("nowhere")
    for name in ("step-00000000", "step-1", "step-00000000000000002", "step-٠٠٠٠٠٠٠٠", "notes.txt", "step-x"):
        (directory / name).write_text("a file")
    (directory / "step-00000001.mine").mkdir()
    os.mkfifo(directory / "pipe")
    assert Checkpoints(directory).all_steps() == [0, 1, 2]
    assert save(directory, 3, 4) == (0, [4])
    assert (elsewhere / "file").exists() and not list(directory.glob(".*"))
    assert main(["list", str(run)]) == OK and main(["verify", str(run)]) == DAMAGED


def test_remove_takes_anything(tmp_path):
    (tmp_path / "full" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "full")
    remove(tmp_path / "link")
    assert (tmp_path / "full" / "inner").is_dir()
    (tmp_path / "file").touch()
    for name in ("full", "file", "nothing"):
        remove(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoints_that_is_no_directory_is_refused(tmp_path, capsys):
    (tmp_path / "checkpoints").touch()
    assert main(["verify", str(tmp_path)]) == REFUSED and "it has no checkpoints/" in capsys.readouterr().err
    with pytest.raises(
        DamagedError, match="checkpoints cannot be read: NotADirectoryError.*run_dir= or name="
    ):
        run_ranks(lambda: Checkpoints(tmp_path / "checkpoints").newest_good(), 1)
