"""Files of token ids: whole or not at all, and nothing that is damaged or foreign is read."""

import os
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest

from foretoken.drafters import token_files
from foretoken.drafters.token_files import (
    FileKind,
    check_token_ids,
    map_token_file,
    vocabulary_digest,
    write_token_file,
)
from foretoken.errors import ConfigError

KIND = FileKind(name="a kind", num_arrays=2, owner="it:path", remedy="build it again")
VOCABULARY = vocabulary_digest(7, None)
ARRAYS = [np.arange(9, dtype=np.int32), -np.arange(9, dtype=np.int32)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "tokens"
    write_token_file(path, KIND, VOCABULARY, ARRAYS)
    return path


def refused(path, message, kind=KIND, vocabulary=VOCABULARY):
    with pytest.raises(ConfigError, match=message) as caught:
        map_token_file(path, kind, vocabulary)
    assert str(path) in str(caught.value)
    assert caught.value.hint == "build it again"


def test_what_was_written_is_read(path):
    for read, written in zip(map_token_file(path, KIND, VOCABULARY), ARRAYS, strict=True):
        assert read.dtype == np.int32
        np.testing.assert_array_equal(read, written)


def test_empty_arrays_are_read(tmp_path):
    empty = np.empty(0, np.int32)
    write_token_file(tmp_path / "it", KIND, VOCABULARY, [empty, empty])
    assert [len(array) for array in map_token_file(tmp_path / "it", KIND, VOCABULARY)] == [0, 0]


def test_every_changed_byte_is_noticed(path):
    content = path.read_bytes()
    used = struct.calcsize("<8s16sIIQ32s32s") + 32
    places = [*range(used), *range(192, len(content))]
    assert len(content) == 192 + 2 * 9 * 4
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        refused(path, "damaged|not written by Foretoken")


def test_every_truncation_is_noticed(path):
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused(path, "damaged|not written by Foretoken")
    path.write_bytes(content + b"\0")
    refused(path, "265 bytes instead of 264")


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"text\n" * 100, bytes(4096)])
def test_foreign_files_are_refused(tmp_path, content):
    (tmp_path / "it").write_bytes(content)
    refused(tmp_path / "it", "was not written by Foretoken")


def test_other_kinds_vocabularies_and_versions_are_refused(path, monkeypatch):
    other = FileKind(name="another", num_arrays=2, owner="it:path", remedy="build it again")
    refused(path, "holds 'a kind'", kind=other)
    refused(path, "another vocabulary", vocabulary=vocabulary_digest(8, None))
    monkeypatch.setattr(token_files, "_VERSION", 2)
    refused(path, "has version 1; this one reads 2")


def test_missing_files_and_folders_are_refused(tmp_path):
    refused(tmp_path / "none", "cannot be read: No such file")
    refused(tmp_path, "cannot be read: Is a directory")


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch, moment):
    """A full disk or a crash before the move: the old file stands, and nothing lies beside it."""
    before = path.read_bytes()

    def fail(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail) if moment == "fsync" else monkeypatch.setattr(
        "pathlib.Path.replace", fail
    )
    with pytest.raises(OSError, match="No space"):
        write_token_file(path, KIND, VOCABULARY, [array + 1 for array in ARRAYS])
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


KILLED_WHILE_WRITING = """
import os, pathlib, signal, sys
import numpy as np
from foretoken.drafters.token_files import FileKind, vocabulary_digest, write_token_file
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
kind = FileKind(name="a kind", num_arrays=2, owner="it:path", remedy="build it again")
arrays = [np.zeros(1_000_000, np.int32)] * 2
write_token_file(pathlib.Path(sys.argv[1]), kind, vocabulary_digest(7, None), arrays)
"""


def test_a_process_that_is_killed_while_writing_leaves_the_old_file(path):
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    np.testing.assert_array_equal(map_token_file(path, KIND, VOCABULARY)[0], ARRAYS[0])


def test_readers_of_the_old_file_keep_it(path):
    [old, _] = map_token_file(path, KIND, VOCABULARY)
    write_token_file(path, KIND, VOCABULARY, [array + 5 for array in ARRAYS])
    np.testing.assert_array_equal(old, ARRAYS[0])
    np.testing.assert_array_equal(map_token_file(path, KIND, VOCABULARY)[0], ARRAYS[0] + 5)


def test_vocabularies_differ_by_token_and_id_and_without_tokenizer_by_size():
    class Words:
        def __init__(self, **vocabulary):
            self.vocabulary = vocabulary

    words = (Words(a=0, b=1), Words(a=1, b=0), Words(a=0, c=1))
    digests = {vocabulary_digest(2, item) for item in words}
    digests |= {vocabulary_digest(size, None) for size in (2, 3)}
    assert len(digests) == 5
    # Models of one family pad their logits to different widths.
    assert vocabulary_digest(2, words[0]) == vocabulary_digest(9, Words(b=1, a=0))


def test_tokens_without_logits_are_refused():
    check_token_ids(np.array([-1, 3]), 4, "it")
    check_token_ids(np.array([], np.int32), 4, "it")
    with pytest.raises(ConfigError, match="it holds token id 4; the target's are below 4"):
        check_token_ids(np.array([-1, 4]), 4, "it")
