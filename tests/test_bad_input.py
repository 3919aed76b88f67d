"""Bad input in tables: each file or flag is refused by one sentence that names what is wrong and how to mend it, and leaves nothing.

Each case goes through the reader or the command line that meets it, in this process. The good files are those of tests/fuzz.py.
"""
import json
import os
import pickle
import re
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
import gatt
import model as model_file
import pretrain
import reward
import rlhf
import sft
from fuzz import CLEAN, FOX, ROWS, TURNS, fuzz, good_files, prepare
from model import Transformer, save_hf
from pretrain import command_line, save_model
from tokenizer import Tokenizer

MEND = re.compile(  # what every sentence must have: a thing to do, what is wanted, or a question that points to it
    r"mend|fetch|take|drop|make|write|name|put |convert|leave|lower|remove|shorten|join|copy|train|give|start|wait|say|add|"
    r"must|need|expected|missing(\?|, or)|another tokenizer\?|whole\?|size\?|--help|can't be read as|no checkpoint of ours needs|"
    r"both of them text|at most|tag those|from 0 to 1|No such file|--\w+ is \w+(,| or)|may hold|as in --|there is no such|no file matches|one file holds|the file is empty")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("good")


@pytest.fixture(scope="module")
def formats(base):
    return good_files(base)


def named(value):
    """The name of a case: the same in every process, without a function's address."""
    return re.sub(r"<function (\S*<lambda>).*", r"\1", str(value))[:40]


def is_helpful(said):
    """Whether it is one line that says, apart from the paths in it, what to do."""
    return "\n" not in said and bool(MEND.search(re.sub(r"^\w+\.py: |\S*/\S*", "", said)))


def refusal(read, *arguments):
    """The sentence by which a reader refuses."""
    with pytest.raises(CLEAN) as caught:
        read(*arguments)
    said = str(caught.value)
    assert is_helpful(said), said
    return said


def put(formats, name, folder, changes):
    """The good files of a format with some of them replaced, or removed where a change is None; the path to read."""
    path, _ = prepare(formats[name], folder)
    for file, content in changes.items():
        file = folder / file
        content = content(file.read_bytes()) if callable(content) else content
        file.unlink() if content is None else file.write_bytes(content)
    return path


# ---------------------------------------------------------------------------------------------- what is no JSON

BAD_LINES = {  # name → what is made of a good line, an object
    "cut": lambda row: row[:-9], "cut in a name": lambda row: row[:5], "bracket lost": lambda row: row[:-1],
    "NaN": lambda row: row[:-1] + b', "x": NaN}', "minus infinity": lambda row: row[:-1] + b', "x": -Infinity}',
    "too large a float": lambda row: row[:-1] + b', "x": 1e999}', "5000 digits": lambda row: row[:-1] + b', "x": ' + b"9" * 5000 + b"}",
    "name twice": lambda row: row[:-1] + b', "x": 1, "x": 2}', "100,000 brackets": lambda row: row[:-1] + b', "x": ' + b"[" * 100_000,
    "closed brackets": lambda row: row[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "half a surrogate pair": lambda row: row.replace(b"fox", b"\\ud83d"), "a raw NUL": lambda row: row.replace(b"fox", b"\0"),
    "a surrogate in bytes": lambda row: row.replace(b"fox", b"\xed\xa0\x80"), "Latin-1": lambda row: row.replace(b"fox", b"f\xf6x"),
    "cut UTF-8": lambda row: row.replace(b"fox", b"f\xc3"), "overlong UTF-8": lambda row: row.replace(b"fox", b"\xc0\xaf"),
    "UTF-16": lambda row: row.decode().encode("utf-16"), "a second BOM": lambda row: b"\xef\xbb\xbf" + row,
    "two objects": lambda row: row + row, "quotes of Python": lambda row: row.replace(b'"', b"'"), "a comma at the end": lambda row: row[:-1] + b",}",
    "a list": lambda row: b"[" + row + b"]", "null": lambda row: b"null", "a number": lambda row: b"7", "a text": lambda row: b'"fox"',
    "true": lambda row: b"true", "an empty object": lambda row: b"{}", "a word": lambda row: b"fox", "HTML": lambda row: b"<!doctype html>",
}
BY_LINE = ["documents", "dialogs", "pairs", "prompts", "samples", "gsm8k", "piqa"]


@pytest.mark.parametrize("name", BY_LINE)
@pytest.mark.parametrize("how", BAD_LINES)
def test_a_line_that_is_no_json_object_is_named_by_file_and_number(formats, tmp_path, name, how):
    good = json.dumps(ROWS[name][0]).encode()
    path = put(formats, f"{name}.jsonl", tmp_path, {"rows.jsonl": good + b"\n" + BAD_LINES[how](good) + b"\n" + good + b"\n"})
    assert f"{path}, line 2" in refusal(formats[f"{name}.jsonl"].read, path)


BAD_LISTS = {  # name → what is made of a good row, in place of [row, row]
    "cut": lambda row: b"[" + row + b"," + row[:-3], "never closed": lambda row: b"[" + row + b"," + row, "no comma": lambda row: b"[" + row + row + b"]",
    "a comma at the end": lambda row: b"[" + row + b",]", "a comma at the start": lambda row: b"[," + row + b"]",
    "words behind": lambda row: b"[" + row + b"] fox", "two lists": lambda row: b"[" + row + b"][" + row + b"]", "empty": lambda row: b"",
    "spaces": lambda row: b" \n ", "NaN": lambda row: b"[" + row + b", NaN]", "a list of numbers": lambda row: b"[1, 2]",
    "a list in it": lambda row: b"[[" + row + b"]]", "100,000 brackets": lambda row: b"[" * 100_000,
}


@pytest.mark.parametrize("name", ["dialogs", "pairs", "prompts", "samples", "piqa", "constraints", "messages"])
@pytest.mark.parametrize("how", BAD_LISTS)
def test_a_list_that_is_no_whole_json_is_named_by_its_file(formats, tmp_path, name, how):
    row = json.dumps(ROWS[name][0]).encode()
    path = put(formats, f"{name}.json", tmp_path, {"rows.json": BAD_LISTS[how](row)})
    assert str(path) in refusal(formats[f"{name}.json"].read, path)


BAD_GZIP = {"cut": lambda file: file[:-12], "cut in the header": lambda file: file[:5], "empty": lambda file: b"", "no gzip": lambda file: b'{"text": "fox"}\n',
            "another magic": lambda file: b"PK" + file[2:], "wrong sum": lambda file: file[:-8] + b"\0\0\0\0" + file[-4:],
            "wrong length": lambda file: file[:-4] + b"\0\0\0\0", "other bytes": lambda file: file[:12] + b"\xff" * 20 + file[32:],
            "bytes behind": lambda file: file + b"fox" * 9, "another method": lambda file: file[:2] + b"\x07" + file[3:]}


@pytest.mark.parametrize("name", ["texts", "documents", "dialogs", "pairs", "gsm8k"])
@pytest.mark.parametrize("how", BAD_GZIP)
def test_a_gz_file_that_is_not_whole_is_named(formats, tmp_path, name, how):
    path = put(formats, f"{name}.jsonl.gz", tmp_path, {"rows.jsonl.gz": BAD_GZIP[how]})
    if how == "empty" and name in ("texts", "documents"):  # like an empty text file: there is nothing in it
        assert not formats[f"{name}.jsonl.gz"].read(path)
    else:
        assert str(path) in refusal(formats[f"{name}.jsonl.gz"].read, path)


@pytest.mark.parametrize("content", [b"a\nf\xf6x\n", b"a\n\xed\xa0\x80\n", b"a\n\xc0\xaf", b"a\n" + "fox".encode("utf-16"), b"a\n" + b"\x80"])
@pytest.mark.parametrize("name", ["documents.txt", "texts.txt"])
def test_a_text_that_is_no_utf_8_is_named_by_file_and_line(formats, tmp_path, name, content):
    path = put(formats, name, tmp_path, {"rows.txt": content})
    assert f"{path}, line 2" in refusal(formats[name].read, path)


# ---------------------------------------------------------------------------------------------- JSON that says nothing sound

USER, ANSWER = {"role": "user", "content": FOX}, {"role": "assistant", "content": "Yes."}
PAIR = {"prompt": FOX, "chosen": "a", "rejected": "b"}
BAD_ROWS = [  # format, row, what the sentence must say
    ("documents", {"text": None}, '"text"'), ("documents", {"text": 7}, '"text"'), ("documents", {"text": ["fox"]}, '"text"'), ("documents", {"Text": "fox"}, '"text"'),
    ("dialogs", {"messages": []}, "user message"), ("dialogs", {"messages": None}, "no list"), ("dialogs", {"messages": "Hi"}, "no list"),
    ("dialogs", {"messages": ["Hi"]}, "message 0"), ("dialogs", {"messages": [None]}, "message 0"), ("dialogs", {"messages": [[USER, ANSWER]]}, "message 0"),
    ("dialogs", {"messages": [USER]}, "no answer"), ("dialogs", {"messages": [ANSWER]}, "message 0"), ("dialogs", {"messages": [USER, USER]}, "message 1"),
    ("dialogs", {"messages": [USER, ANSWER, ANSWER]}, "message 2"), ("dialogs", {"messages": TURNS[:1]}, "user message"),
    ("dialogs", {"messages": [USER, TURNS[0], ANSWER]}, "message 1"), ("dialogs", {"messages": [{"role": "root", "content": "x"}]}, "'root'"),
    ("dialogs", {"messages": [{"role": ["user"], "content": "x"}]}, "message 0"), ("dialogs", {"messages": [{"role": None, "content": "x"}]}, "message 0"),
    ("dialogs", {"messages": [{"role": "user"}]}, "message 0"), ("dialogs", {"messages": [{"role": "user", "content": 7}]}, "message 0"),
    ("dialogs", {"messages": [USER, ANSWER | {"content": " \n"}]}, "empty answer"), ("dialogs", {"messages": [USER | {"content": "[INST]"}, ANSWER]}, "tag"),
    ("dialogs", {"messages": [USER, ANSWER | {"content": "<<SYS>>"}]}, "tag"), ("dialogs", {"conversations": [{"from": ["gpt"], "value": "x"}]}, "message 0"),
    ("dialogs", {"conversations": {"from": "human"}}, "no list"), ("dialogs", {"instruction": 7, "output": "x"}, "instruction"),
    ("dialogs", {"instruction": "x", "input": ["y"], "output": "x"}, "input"), ("dialogs", {"instruction": "x"}, "message 1"),
    ("dialogs", {"prompt": "x"}, "message 1"), ("dialogs", {"prompt": {"text": "x"}, "response": "y"}, "message 0"), ("dialogs", {"question": "x"}, "messages"),
    ("dialogs", {"turns": [[[1, 2], [3]]], "is_answer": [False, True]}, "ids"), ("dialogs", {"turns": [[[1, 2], ["x"]]], "is_answer": [False, True, True]}, "ids"),
    ("dialogs", {"turns": [[[1, 2], [-3]]], "is_answer": [False, True, True]}, "ids"), ("dialogs", {"turns": 7, "is_answer": [True]}, "ids"),
    ("dialogs", {"turns": [[[1, 2], [3.5]]], "is_answer": [False, True, True]}, "ids"), ("dialogs", {"turns": [[[1, 2], [3]]], "is_answer": "yes"}, "ids"),
    ("dialogs", {"turns": [[[1, 2], [3]]], "is_answer": [0, 1, 1]}, "ids"), ("dialogs", {"turns": [], "is_answer": []}, "ids"),
    ("dialogs", {"turns": [[[1, 2], [2**70]]], "is_answer": [False, True, True]}, "ids"),
    ("pairs", PAIR | {"chosen": None}, "text"), ("pairs", PAIR | {"rejected": 7}, "text"), ("pairs", PAIR | {"prompt": 7}, "message"),
    ("pairs", PAIR | {"prompt": [USER, ANSWER]}, "user"), ("pairs", PAIR | {"prompt": []}, "user message"), ("pairs", PAIR | {"rating": "good"}, "rating"),
    ("pairs", PAIR | {"rating": ["better"]}, "rating"), ("pairs", PAIR | {"safety": "safe"}, "safety label"), ("pairs", PAIR | {"safety": {}}, "safety label"),
    ("pairs", PAIR | {"about": 7}, "about"), ("pairs", PAIR | {"prompt_ids": [1], "chosen_ids": [2]}, "ids"),
    ("pairs", PAIR | {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": []}, "ids"), ("pairs", PAIR | {"prompt_ids": "1", "chosen_ids": [2], "rejected_ids": [3]}, "ids"),
    ("pairs", {"prompt": FOX, "responses": ["a"], "scores": [1, 2]}, "scores"), ("pairs", {"prompt": FOX, "responses": "ab", "scores": [1, 2]}, "scores"),
    ("pairs", {"prompt": FOX, "responses": ["a", "b"], "scores": [1, "2"]}, "scores"), ("pairs", {"prompt": FOX, "responses": ["a", "b"]}, "scores"),
    ("pairs", {"prompt": FOX, "responses": ["a", "b"], "scores": [1, 10**400]}, "scores"), ("pairs", {"prompt": FOX, "responses": ["a", 7], "scores": [1, 2]}, "responses"),
    ("pairs", {"chosen": "Yes.", "rejected": "No."}, "transcript"), ("pairs", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}, "differ"),
    ("pairs", {"chosen": "a", "rejected": None}, "prompt"), ("pairs", {"conversations": 7, "chosen": {"value": "a"}, "rejected": {"value": "b"}}, "no list"),
    ("pairs", {"conversations": [{"from": "human", "value": FOX}], "chosen": "a", "rejected": "b"}, "text"),
    ("prompts", {"prompt": None}, "message"), ("prompts", {"prompt": [USER, ANSWER]}, "user"), ("prompts", {"text": FOX}, "prompt"), ("prompts", {"prompt": {}}, "message"),
    ("prompts", {"prompt": FOX, "unsafe": "no"}, "unsafe"), ("prompts", {"prompt": FOX, "unsafe": 1}, "unsafe"), ("prompts", {"prompt": FOX, "kind": 7}, "kind"),
    ("prompts", {"prompt": FOX, "id": [1]}, "id"), ("prompts", {"prompt": "[/INST] x"}, "tag"), ("prompts", {"prompt": FOX, "system": 7}, "message"),
    ("samples", {"prompt": ""}, "prompt"), ("samples", {"prompt": 7}, "prompt"), ("samples", {"tokens": []}, "tokens"), ("samples", {"tokens": [1.5]}, "tokens"),
    ("samples", {"tokens": [-1]}, "tokens"), ("samples", {"tokens": [True]}, "tokens"), ("samples", {"tokens": [2**80]}, "tokens"), ("samples", {"tokens": "12"}, "tokens"),
    ("hellaswag", {"query": FOX, "choices": ["a", "b"], "gold": 2}, "choices"), ("hellaswag", {"query": FOX, "choices": "ab", "gold": 0}, "texts"),
    ("hellaswag", {"query": FOX, "choices": ["a", "b"], "gold": -1}, "choices"), ("hellaswag", {"query": FOX, "choices": ["a", "b"], "gold": 0.5}, "gold"),
    ("piqa", {"goal": FOX, "sol1": "a", "sol2": "b", "label": 2}, "choices"), ("piqa", {"goal": FOX, "sol1": "a", "sol2": 7, "label": 1}, "sol2"), ("piqa", {"goal": FOX}, "sol1"),
    ("siqa", {"context": FOX, "question": "?", "answerA": "a", "answerB": "b", "answerC": "c", "label": 0}, "choices"),
    ("winogrande", {"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}, "winogrande"),
    ("winogrande", {"sentence": "a _ b", "option1": "a", "option2": "b", "answer": "3"}, "winogrande"),
    ("arc-e", {"question": FOX, "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"}, "arc"), ("arc-e", {"question": None, "answerKey": "A"}, "arc"),
    ("openbookqa", {"question_stem": FOX, "choices": [], "answerKey": "A"}, "openbookqa"), ("commonsenseqa", {"question": FOX, "choices": {"text": ["a"] * 6, "label": list("ABCDEF")}, "answerKey": "A"}, "five"),
    ("boolq", {"passage": FOX, "question": "?", "answer": "yes"}, "boolq"), ("boolq", {"passage": FOX, "question": "?", "answer": 7}, "choices"),
    ("mmlu", {"question": FOX, "subject": "x", "choices": ["a", "b"], "answer": 2}, "choices"), ("mmlu", {"question": FOX, "choices": ["a", "b"], "answer": 1}, "subject"),
    ("truthfulqa-mc1", {"question": FOX, "mc1_targets": {"a": 0}}, "right"), ("truthfulqa-mc1", {"question": FOX, "mc1_targets": {"a": 5}}, "labels"),
    ("truthfulqa-mc2", {"question": FOX, "mc1_targets": {"a": 1}}, "mc2_targets"), ("triviaqa", {"question": FOX, "answer": "3"}, "triviaqa"),
    ("naturalquestions", {"question": FOX, "answer": "3"}, "answer"), ("naturalquestions", {"question": FOX, "answer": []}, "answer"),
    ("gsm8k", {"question": FOX, "answer": "3"}, "gsm8k"), ("gsm8k", {"question": FOX, "answer": "x #### y"}, "number"), ("gsm8k", {"question": FOX, "answer": None}, "gsm8k"),
    ("humaneval", {"prompt": "def f():"}, "entry_point"), ("humaneval", {"prompt": 7, "entry_point": "f", "canonical_solution": "", "test": ""}, "prompt"),
    ("mbpp", {"text": FOX, "code": "x", "test_list": "assert x"}, "texts"), ("mbpp", {"text": FOX, "code": "x", "test_list": []}, "texts"),
]


@pytest.mark.parametrize("name, row, words", BAD_ROWS, ids=lambda value: value if isinstance(value, str) else json.dumps(value)[:60])
def test_a_row_that_makes_no_sense_is_named_by_file_line_and_fault(formats, tmp_path, name, row, words):
    path = put(formats, f"{name}.jsonl", tmp_path, {"rows.jsonl": f"{json.dumps(ROWS[name][0])}\n{json.dumps(row)}\n".encode()})
    said = refusal(formats[f"{name}.jsonl"].read, path)
    assert f"{path}, line 2" in said and words in said, said


BAD_WHOLES = [  # format, file, its content, what the sentence must say
    ("constraints.json", "rows.json", b"{}", "list"), ("constraints.json", "rows.json", b'[{"kind": "x", "texts": "ab", "terse": "y"}]', "list"),
    ("constraints.json", "rows.json", b'[{"kind": "x", "texts": [], "terse": "y"}]', "list"), ("constraints.json", "rows.json", b'[{"kind": 7, "texts": ["a"], "terse": "y"}]', "list"),
    ("constraints.json", "rows.json", b'[{"kind": "x", "texts": ["a"]}]', "list"), ("constraints.json", "rows.json", b"[7]", "list"), ("constraints.json", "rows.json", b"\xff", "list"),
    ("messages.json", "rows.json", b'{"role": "user"}', "list"), ("messages.json", "rows.json", b'[{"role": "user", "content": 7}]', "message 0"),
    ("messages.json", "rows.json", b"\xff\xfe", "JSON"), ("messages.json", "rows.json", b'[{"role": "user", "content": "<<SYS>>"}]', "tag"),
    ("mmlu.csv", "eggs_test.csv", b'"open,1,2,3,4,C\n', "line 1"), ("mmlu.csv", "eggs_test.csv", b"q,1,2,3,4,C\nq,1,2\n", "line 2"),
    ("mmlu.csv", "eggs_test.csv", b"q,1,2,3,4,E\n", "line 1"), ("mmlu.csv", "eggs_test.csv", b"q,1,2,3,4,C,x,y\n", "line 1"), ("mmlu.csv", "eggs_test.csv", b"q\xff,1,2,3,4,C\n", "line 1"),
    ("mmlu.csv", "eggs_test.csv", b"", "empty"), ("truthfulqa.csv", "t.csv", b"a,b\n1,2\n", "line 2"), ("labels.lst", "rows-labels.lst", b"0\n", "1 labels for the 2 rows"),
    ("labels.lst", "rows-labels.lst", b"0\nx\n", "line 2"), ("labels.lst", "rows-labels.lst", b"0\n\xff\n", "line 2"), ("labels.lst", "rows-labels.lst", b"0\n7\n", "line 2"),
    ("tokenizer.model", "tokenizer.model", b"", "no SentencePiece model"), ("tokenizer.model", "tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "no SentencePiece"),
    ("tokenizer.model", "tokenizer.model", b"\x08\x96\x01", "no SentencePiece"), ("tokenizer.model", "tokenizer.model", b"\0" * 999, "no SentencePiece"),
    ("tokenizer.model", "tokenizer.model", lambda file: file[:-999], "no SentencePiece"), ("tokenizer.model", "tokenizer.model", b'{"model": {"type": "BPE"}}', "no SentencePiece"),
    ("shards", "fox.u16", b"", "0 bytes"), ("shards", "fox.u16", lambda file: file[:-1], "bytes"), ("shards", "fox.u16", lambda file: file[:-2], "does not cut"),
    ("shards", "fox.u16", lambda file: b"\xff\xff" + file[2:], "65535"), ("shards", "fox.ends", None, "missing"), ("shards", "fox.ends", b"", "0 bytes"),
    ("shards", "fox.ends", lambda file: file[:-1], "bytes"), ("shards", "fox.ends", lambda file: file[::-1], "does not cut"), ("shards", "fox.ends", lambda file: file[:8] + file, "does not cut"),
    ("shards", "fox.ends", lambda file: b"\xff" * 8 + file[8:], "does not cut"), ("shards", "fox.ends", lambda file: bytes(8) + file[8:], "does not cut"),
]


@pytest.mark.parametrize("name, file, content, words", BAD_WHOLES, ids=named)
def test_a_file_of_another_kind_is_named_with_its_fault(formats, tmp_path, name, file, content, words):
    said = refusal(formats[name].read, put(formats, name, tmp_path, {file: content}))
    assert Path(file).stem.removesuffix("-labels") in said and words in said, said


# ---------------------------------------------------------------------------------------------- weights


def tensors(**entries):
    """A .safetensors file with this header, and 64 bytes of data behind it."""
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + bytes(64)


ONE = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
BAD_TENSORS = {
    "no length": b"\x05", "an absurd length": struct.pack("<Q", 2**60) + b"{}", "minus one": b"\xff" * 8 + b"{}", "text": b"Not Found\n" * 9, "no JSON": struct.pack("<Q", 9) + b"fox fox f",
    "a list": struct.pack("<Q", 2) + b"[]", "nested": struct.pack("<Q", 90_000) + b"[" * 90_000, "NaN": struct.pack("<Q", 10) + b'{"a": NaN}', "UTF-16": struct.pack("<Q", 4) + b"{\0}\0",
    "behind the end": tensors(x=ONE | {"data_offsets": [0, 999]}), "far behind": tensors(x=ONE | {"data_offsets": [2**62, 2**62 + 64]}), "backwards": tensors(x=ONE | {"data_offsets": [64, 0]}),
    "negative": tensors(x=ONE | {"data_offsets": [-64, 0]}), "overlapping": tensors(x=ONE, y=ONE), "a hole": tensors(x=ONE | {"shape": [8], "data_offsets": [32, 64]}),
    "another size": tensors(x=ONE | {"shape": [17]}), "2^80 numbers": tensors(x=ONE | {"shape": [2**40, 2**40]}), "half a number": tensors(x=ONE | {"shape": [1.5]}),
    "unknown dtype": tensors(x=ONE | {"dtype": "Q4"}), "no dtype": tensors(x={"shape": [16], "data_offsets": [0, 64]}), "another dtype": tensors(x=ONE | {"dtype": "I32"}),
    "a name twice": struct.pack("<Q", 115) + (b'{"x":' + json.dumps(ONE).encode() + b',"x":' + json.dumps(ONE).encode() + b"}").ljust(115) + bytes(64),
    "no tensor": tensors(), "another tensor": tensors(x=ONE), "bytes behind": tensors(x=ONE) + bytes(9),
}


@pytest.mark.parametrize("how", BAD_TENSORS)
def test_a_safetensors_file_that_lies_about_itself_is_refused(formats, tmp_path, how):
    said = refusal(formats["hf"].read, put(formats, "hf", tmp_path / "hf", {"model-00001-of-00002.safetensors": BAD_TENSORS[how]}))
    assert str(tmp_path / "hf") in said


class Evil:
    """Pickled code: it makes a file when it is unpickled as usual."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def change(**values):
    """Other values in a JSON object; None drops one."""
    return lambda file: json.dumps({k: v for k, v in (json.loads(file) | values).items() if v is not None}).encode()


def inside(key, **values):
    """The same in an object in it."""
    return lambda file: json.dumps(json.loads(file) | {key: json.loads(change(**values)(json.dumps(json.loads(file)[key])))}).encode()


BAD_FOLDERS = [  # format, file, its new content, what the sentence must say
    ("meta", "params.json", b"", "params.json"), ("meta", "params.json", b"[]", "object"), ("meta", "params.json", b'{"dim": 32, "dim": 64}', "twice"), ("meta", "params.json", b"\xff{}", "JSON"),
    ("meta", "params.json", b"[" * 100_000, "params.json"), ("meta", "params.json", change(dim=None), "dim"), ("meta", "params.json", change(dim="32"), "dim"),
    ("meta", "params.json", change(dim=31), "dim"), ("meta", "params.json", change(dim=64), "shape"), ("meta", "params.json", change(dim=-32), "dim"), ("meta", "params.json", change(dim=10**30), "dim"),
    ("meta", "params.json", change(n_layers=1), "2 layers"), ("meta", "params.json", change(n_layers=10**6), "n_layers"), ("meta", "params.json", change(n_layers=[2]), "n_layers"),
    ("meta", "params.json", change(n_heads=3), "n_heads"), ("meta", "params.json", change(n_heads=0), "n_heads"), ("meta", "params.json", change(n_kv_heads=3), "n_kv_heads"),
    ("meta", "params.json", change(norm_eps=float("nan")), "norm_eps"), ("meta", "params.json", change(norm_eps=-1), "norm_eps"), ("meta", "params.json", change(rope_theta="big"), "rope_theta"),
    ("meta", "params.json", change(use_scaled_rope=True), "rotary"), ("meta", "params.json", change(vocab_size=7), "vocab_size"), ("meta", "params.json", change(vocab_size="x"), "vocab_size"),
    ("meta", "consolidated.00.pth", None, "not all there"), ("meta", "consolidated.01.pth", None, "shape"), ("meta", "consolidated.01.pth", b"", "consolidated.01.pth"),
    ("meta", "consolidated.01.pth", b"version https://git-lfs", "consolidated.01.pth"), ("meta", "consolidated.01.pth", lambda file: file[: len(file) // 2], "consolidated.01.pth"),
    ("hf", "config.json", b"null", "object"), ("hf", "config.json", change(hidden_size=None), "hidden_size"), ("hf", "config.json", change(num_hidden_layers=10**8), "num_hidden_layers"),
    ("hf", "config.json", change(num_hidden_layers=3), "2 layers"), ("hf", "config.json", change(num_key_value_heads=3), "n_kv_heads"), ("hf", "config.json", change(hidden_act="gelu"), "gelu"),
    ("hf", "config.json", change(model_type="mistral"), "mistral"), ("hf", "config.json", change(model_type=None), "model"), ("hf", "config.json", change(quantization_config={"bits": 4}), "quantised"),
    ("hf", "config.json", change(rope_scaling={"type": "linear", "factor": 2}), "rotary"), ("hf", "config.json", change(rope_scaling=[1]), "rotary"), ("hf", "config.json", change(attention_bias=True), "bias"),
    ("hf", "config.json", change(rms_norm_eps=float("nan")), "rms_norm_eps"), ("hf", "config.json", change(vocab_size=-1), "vocab_size"), ("hf", "config.json", change(vocab_size=10**7), "shape"),
    ("hf", "config.json", change(max_position_embeddings=10**12), "max_position"), ("hf", "config.json", change(intermediate_size=True), "intermediate_size"), ("hf", "config.json", change(head_dim=9), "9"),
    ("hf", "model.safetensors.index.json", b"{}", "weight_map"), ("hf", "model.safetensors.index.json", b"[]", "object"), ("hf", "model.safetensors.index.json", change(weight_map={}), "layers"),
    ("hf", "model.safetensors.index.json", change(weight_map={"x": "../run/config.json"}), "weight_map"), ("hf", "model.safetensors.index.json", change(weight_map={"x": "/etc/passwd"}), "weight_map"),
    ("hf", "model.safetensors.index.json", change(weight_map={"x": "gone.safetensors"}), "gone"), ("hf", "model.safetensors.index.json", None, "model.safetensors"),
    ("hf", "model-00002-of-00002.safetensors", None, "model-00002"),
    ("run", "config.json", None, "config.json"), ("run", "config.json", b"{", "config.json"), ("run", "config.json", b"[]", "config.json"), ("run", "config.json", change(model=None), "config.json"),
    ("run", "config.json", change(model=[]), "config.json"), ("run", "config.json", change(settings=7), "config.json"), ("run", "config.json", change(threads="x"), "config.json"),
    ("run", "config.json", inside("model", dim=None), "dim"), ("run", "config.json", inside("model", dim="32"), "dim"), ("run", "config.json", inside("model", dim=64), "shape"),
    ("run", "config.json", inside("model", n_layers=10**7), "n_layers"), ("run", "config.json", inside("model", n_layers=1), "n_layers"), ("run", "config.json", inside("model", n_kv_heads=3), "n_kv_heads"),
    ("run", "config.json", inside("model", vocab_size=10**7), "shape"), ("run", "config.json", inside("model", max_seq_len=10**12), "max_seq_len"), ("run", "config.json", inside("model", norm_eps=0), "norm_eps"),
    ("run", "config.json", inside("settings", world="x"), "world"), ("run", "config.json", inside("settings", world=-1), "world"), ("run", "config.json", inside("settings", world=[0]), "world"),
    ("run", "step-000000/.metadata", b"", "damaged"), ("run", "step-000000/.metadata", None, "damaged"), ("run", "step-000000/.metadata", b"fox", "damaged"),
    ("run", "step-000000/.metadata", lambda file: file[:-99], "damaged"), ("run", "step-000000/.metadata", pickle.dumps([1]), "damaged"), ("run", "step-000000/__0_0.distcp", None, "damaged"),
    ("run", "step-000000/__0_0.distcp", b"", "damaged"), ("run", "step-000000/__0_0.distcp", lambda file: file[: len(file) // 2], "damaged"), ("run", "step-000000/progress.json", b"", "damaged"),
    ("run", "step-000000/progress.json", b"{}", "damaged"), ("run", "step-000000/progress.json", b"[7]", "damaged"), ("run", "step-000000/progress.json", None, "damaged"),
    ("run", "tokenizer.model", b"", "no SentencePiece"), ("run", "tokenizer.model", None, "tokenizer.model"),
]


@pytest.mark.parametrize("name, file, content, words", BAD_FOLDERS, ids=named)
def test_a_folder_of_weights_that_does_not_fit_together_is_refused_by_the_fault(formats, tmp_path, name, file, content, words):
    said = refusal(formats[name].read, put(formats, name, tmp_path / name, {file: content}))
    assert str(tmp_path / name) in said and words in said, said


BAD_PICKLES = {
    "a list": lambda file: [torch.ones(2)], "a number": lambda file: 7, "numbers by name": lambda file: {"norm.weight": 1.0}, "a whole module": lambda file: torch.nn.Linear(2, 2),
    "code": lambda file: {"norm.weight": Evil(file)}, "code alone": Evil, "names that are no text": lambda file: {0: torch.ones(2)},
    "sparse": lambda file: {"norm.weight": torch.eye(3).to_sparse()}, "meta": lambda file: {"norm.weight": torch.ones(3, device="meta")}, "int8": lambda file: {"norm.weight": torch.ones(3, dtype=torch.int8)},
}


@pytest.mark.parametrize("how", BAD_PICKLES)
@pytest.mark.parametrize("name, file", [("meta", "consolidated.00.pth"), ("hf", "pytorch_model.bin")])
def test_a_torch_file_of_other_things_is_refused_and_runs_nothing(formats, tmp_path, name, file, how):
    path, harm = put(formats, name, tmp_path / name, {}), tmp_path / "harm"
    for index in path.glob("*.index.json"):
        index.unlink()
    torch.save(BAD_PICKLES[how](harm), path / file)
    assert file in refusal(formats[name].read, path)
    assert not harm.exists()


@pytest.mark.parametrize("content", [Evil, lambda file: {"step": Evil(file)}], ids=["alone", "inside"])
@pytest.mark.parametrize("file", ["step-000000/.metadata", "step-000000/__0_0.distcp"])
def test_code_in_a_checkpoint_of_ours_is_not_run(formats, tmp_path, file, content):
    harm = tmp_path / "harm"
    path = put(formats, "run", tmp_path / "run", {file: pickle.dumps(content(harm))})
    assert str(path) in refusal(formats["run"].read, path)
    assert not harm.exists()


def test_weights_that_are_not_finite_are_refused_by_their_name(formats, tmp_path):
    bad = Transformer(model_file.ModelConfig(32, 1, 4, 2, 48, vocab_size=320))
    with torch.no_grad():
        bad.layers[0].attention.wq.weight[0, 0] = torch.nan
    save_hf(bad, tmp_path / "hf")
    assert "q_proj" in refusal(formats["hf"].read, tmp_path / "hf")
    save_model(bad, str(tmp_path / "run"), str(put(formats, "tokenizer.model", tmp_path / "own", {})))
    assert "step-000000" in refusal(formats["run"].read, tmp_path / "run")


def test_the_tokenizer_of_another_model_is_refused(base, formats, tmp_path):
    Tokenizer.train([FOX, "A hen likes the fox. It said: yes, no, perhaps so."] * 30, tmp_path / "other.model", 330)
    for name in ("run", "hf", "meta"):
        folder = put(formats, name, tmp_path / name, {"tokenizer.model": (tmp_path / "other.model").read_bytes()} if name == "run" else {})
        shutil.copy(tmp_path / "other.model", folder / "tokenizer.model")
        assert "330 pieces" in refusal(model_file.read_any, folder)
    assert "another tokenizer" in refusal(reward.parents_of, [str(base / "run"), str(smaller(tmp_path))])


def smaller(folder):
    """A run whose tokenizer has other pieces than that of `base`."""
    tokenizer = Tokenizer.train(["A red hen has eggs, and the dog said so."] * 30, folder / "small.model", 290)
    save_model(Transformer(model_file.ModelConfig(32, 1, 4, 2, 48, vocab_size=290)), str(folder / "small"), tokenizer.path)
    return folder / "small"


# ---------------------------------------------------------------------------------------------- flags

MODULES = {"pretrain.py": pretrain, "sft.py": sft, "reward.py": reward, "rlhf.py": rlhf, "gatt.py": gatt, "eval.py": evaluation}
GOOD = {  # flags that a command needs before it meets the bad one
    "pretrain.py": "--data {base}/eggs.txt", "sft.py": "--init {base}/run --data {base}/chat.jsonl", "reward.py": "--init {base}/run --data {base}/pairs.jsonl --seq_len 64",
    "rlhf.py": "--init {base}/run --policy {base}/run --helpfulness {base}/judge --harmlessness {base}/judge --threshold 0.1",
    "rlhf.py ppo": "--init {base}/run --helpfulness {base}/judge --harmlessness {base}/judge --threshold 0.1 --seq_len 64 --max_new_tokens 16",
    "rlhf.py curves": "--helpfulness {base}/judge --harmlessness {base}/judge {base}/run", "rlhf.py distill": "--init {base}/run --harmlessness {base}/judge",
    "gatt.py": "--init {base}/run --reward {base}/judge --seq_len 32", "gatt.py test": "{base}/run", "gatt.py attention": "{base}/run --before {base}/run", "sft.py chat": "{base}/run",
    "reward.py collect": "--a {base}/run --b {base}/run", "reward.py stats": "{base}/pairs.jsonl --tokenizer {base}/tokenizer.model", "reward.py eval": "{base}/judge --helpfulness {base}/pairs.jsonl --safety {base}/pairs.jsonl",
    "eval.py tasks": "{base}/run", "eval.py perplexity": "{base}/run {base}/eggs.txt", "eval.py curves": "{base}/run", "eval.py facts": "{base}/run",
    "eval.py versions": "{base}/run --against {base}/run --helpfulness {base}/judge --harmlessness {base}/judge", "eval.py judge": "--a {base}/run --b {base}/run --judge truth", "eval.py safety": "{base}/run",
    "eval.py diversity": "{base}/run", "eval.py contamination": "--train {base}/fox.u16 --test {base}/samples.jsonl --tokenizer {base}/tokenizer.model",
}
BAD_FLAGS = [  # command, flags, what the sentence must say
    ("pretrain.py", "--nonsense", "--nonsense"), ("pretrain.py", "--steps", "--steps"), ("pretrain.py", "--steps x", "--steps"), ("pretrain.py", "--steps 1.5", "--steps"), ("pretrain.py", "fox", "fox"),
    ("pretrain.py", "--steps 0", "--steps"), ("pretrain.py", "--steps -3", "--steps"), ("pretrain.py", "--steps 99999999999999", "--steps"), ("pretrain.py", "--lr nan", "--lr"),
    ("pretrain.py", "--lr -1", "--lr"), ("pretrain.py", "--lr inf", "--lr"), ("pretrain.py", "--batch_size 0", "--batch_size"), ("pretrain.py", "--micro_batch -1", "--micro_batch"),
    ("pretrain.py", "--seq_len 0", "--seq_len"), ("pretrain.py", "--seq_len 9999", "context"), ("pretrain.py", "--preset 70B", "70B"), ("pretrain.py", "--device tpu", "tpu"),
    ("pretrain.py", "--dtype fp8", "fp8"), ("pretrain.py", "--replicas 0", "--replicas"), ("pretrain.py", "--replicas 3", "--replicas"), ("pretrain.py", "--keep 0", "--keep"),
    ("pretrain.py", "--threads -1", "--threads"), ("pretrain.py", "--seed -1", "--seed"), ("pretrain.py", "--warmup -1", "--warmup"), ("pretrain.py", "--weight_decay nan", "--weight_decay"),
    ("pretrain.py", "--grad_clip 0", "--grad_clip"), ("pretrain.py", "--adam_eps 0", "--adam_eps"), ("pretrain.py", "--n_kv_heads 3", "n_kv_heads"), ("pretrain.py", "--n_kv_heads -1", "--n_kv_heads"),
    ("pretrain.py", "--ffn_multiplier 0", "--ffn_multiplier"), ("pretrain.py", "--vocab_size 5 --preset toy", "too small"), ("pretrain.py", "--vocab_size 99999", "too large"),
    ("pretrain.py", "--tokenizer nowhere.model", "nowhere.model"), ("pretrain.py", "--tokenizer {base}", "{base}"), ("pretrain.py", "--tokenizer {base}/eggs.txt", "no SentencePiece"),
    ("pretrain.py", "--data nowhere/*.txt", "nowhere"), ("pretrain.py", "--data ../x=toy", "../x"), ("pretrain.py", "--data =toy", "name"), ("pretrain.py", "--data toy/moon", "toy/moon"),
    ("pretrain.py", "--data {base}/eggs.txt {base}/eggs.txt", "eggs"), ("pretrain.py", "--data {base}/eggs.txt:0", "0 epochs"), ("pretrain.py", "--data {base}/eggs.txt:99999", "1000"),
    ("pretrain.py", "--data {base}/fox.u16", "--tokenizer"), ("pretrain.py", "--data x={base}/fox.u16 --tokenizer {base}/small.model", "outside the vocabulary"), ("pretrain.py", "--data x={base}/[ef]*s.txt x={base}/fox.u16", "x"),
    ("pretrain.py", "--data {base}", "{base}"), ("pretrain.py", "--data", "--data"), ("pretrain.py", "--init nowhere", "nowhere"), ("pretrain.py", "--init {base}/eggs.txt", "eggs.txt"),
    ("pretrain.py", "--init {base}/run --n_kv_heads 2", "--n_kv_heads"), ("pretrain.py", "--init {base}/run --tokenizer {base}/tokenizer.model", "--tokenizer"), ("pretrain.py", "--init {base}/run --seq_len 512", "context"),
    ("pretrain.py plan", "--gpus 0", "--gpus"), ("pretrain.py plan", "--mfu 2", "--mfu"), ("pretrain.py plan", "--tokens nan", "--tokens"), ("pretrain.py plan", "--peak_flops -1", "--peak_flops"),
    ("sft.py", "--init nowhere", "nowhere"), ("sft.py", "--init {base}", "no weights"), ("sft.py", "--data nowhere.jsonl", "nowhere"), ("sft.py", "--data toy/moon", "toy/moon"), ("sft.py", "--epochs 0", "--epochs"),
    ("sft.py", "--noise 2", "--noise"), ("sft.py", "--safety -0.1", "--safety"), ("sft.py", "--dialogs 0", "--dialogs"), ("sft.py", "--seq_len 512", "context"), ("sft.py", "--seq_len 1", "no dialogue"),
    ("sft.py", "--preset huge", "huge"), ("sft.py", "--world -1", "--world"), ("sft.py", "--data {base}/pairs.jsonl", "line 1"), ("sft.py", "--data {base}/eggs.txt", "line 1"), ("sft.py", "--data {base}/far.jsonl", "999"),
    ("sft.py chat", "--temperature -1", "--temperature"), ("sft.py chat", "--top_p 2", "--top_p"), ("sft.py chat", "--max_new_tokens 0", "--max_new_tokens"), ("sft.py chat", "--temperature nan", "--temperature"),
    ("reward.py", "--kind kind", "kind"), ("reward.py", "--margin huge", "huge"), ("reward.py", "--data nowhere.jsonl", "nowhere"), ("reward.py", "--data {base}/chat.jsonl", "line 1"), ("reward.py", "--pairs 0", "--pairs"),
    ("reward.py", "--safety_aux -1", "--safety_aux"), ("reward.py", "--seq_len 999", "context"), ("reward.py", "--seq_len 1", "no comparison"), ("reward.py", "--test nowhere.jsonl", "nowhere"),
    ("reward.py collect", "--axis both-ways", "--axis"), ("reward.py collect", "--annotator me", "--annotator"), ("reward.py collect", "--temperatures x", "--temperatures"), ("reward.py collect", "--temperatures 0.5", "--temperatures"),
    ("reward.py collect", "--prompts nowhere.jsonl --annotator person", "nowhere"), ("reward.py collect", "--prompts {base}/prompts.jsonl", "person"), ("reward.py collect", "--a nowhere --b {base}/run", "nowhere"),
    ("reward.py stats", "--tokenizer nowhere.model", "nowhere.model"), ("reward.py eval", "{base}/run", "{base}/run"), ("reward.py eval", "--helpfulness nowhere.jsonl", "nowhere"),
    ("rlhf.py", "--version 0", "--version"), ("rlhf.py", "--select worst", "--select"), ("rlhf.py", "--pool none", "--pool"), ("rlhf.py", "--n_samples 0", "--n_samples"), ("rlhf.py", "--unsafe 2", "--unsafe"),
    ("rlhf.py", "--threshold 7", "--threshold"), ("rlhf.py", "--policy nowhere", "nowhere"), ("rlhf.py", "--helpfulness {base}/nowhere", "nowhere"), ("rlhf.py", "--prompts nowhere.jsonl", "nowhere"),
    ("rlhf.py", "--prompts {base}/pairs.jsonl --helpfulness {base}/small", "another tokenizer"), ("rlhf.py", "--temperature -1", "--temperature"),
    ("rlhf.py curves", "--temperatures hot", "--temperatures"), ("rlhf.py curves", "--n_prompts 0", "--n_prompts"), ("rlhf.py ppo", "--gamma 2", "--gamma"), ("rlhf.py ppo", "--lam -1", "--lam"),
    ("rlhf.py ppo", "--clip 0", "--clip"), ("rlhf.py ppo", "--batch_size 5 --mini_batch 2", "--mini_batch"), ("rlhf.py ppo", "--temperature 0", "--temperature"), ("rlhf.py ppo", "--max_new_tokens 64", "--max_new_tokens"),
    ("rlhf.py ppo", "--seq_len 9999", "--seq_len"), ("rlhf.py ppo", "--kl_coef nan", "--kl_coef"), ("rlhf.py ppo", "--prompts {base}/prompts.jsonl", "prompts"), ("rlhf.py ppo", "--out {base}/run", "--out"),
    ("rlhf.py", "--prompts {base}/long.jsonl", "line 2"), ("rlhf.py curves", "--prompts {base}/long.jsonl", "line 2"),
    ("reward.py collect", "--prompts {base}/long.jsonl --annotator person", "line 2"), ("eval.py judge", "--prompts {base}/long.jsonl --judge reward", "line 2"),
    ("rlhf.py distill", "--prompts {base}/long.jsonl", "line 2"), ("rlhf.py distill", "--prompts {base}/harmless.jsonl", "unsafe"), ("rlhf.py distill", "--harmlessness nowhere", "nowhere"),
    ("gatt.py", "--long 2", "--long"), ("gatt.py", "--resampled -1", "--resampled"), ("gatt.py", "--replay 2", "--replay"), ("gatt.py", "--samples 0", "--samples"), ("gatt.py", "--constraints nowhere.json", "nowhere.json"),
    ("gatt.py", "--constraints {base}/chat.jsonl", "chat.jsonl"), ("gatt.py test", "--turns 0", "--turns"), ("gatt.py test", "--turns two", "--turns"),
    ("gatt.py test", "--dialogs 0", "--dialogs"), ("gatt.py attention", "--bin 0", "--bin"), ("gatt.py attention", "--turns -1", "--turns"),
    ("eval.py tasks", "--task moon=x", "moon"), ("eval.py tasks", "--task gsm8k", "gsm8k"), ("eval.py tasks", "--task gsm8k=nowhere.jsonl", "nowhere"), ("eval.py tasks", "--task gsm8k={base}/chat.jsonl", "line 1"),
    ("eval.py tasks", "--task gsm8k={base}/a gsm8k={base}/b", "twice"), ("eval.py tasks", "--task ../x={base}/chat.jsonl", "../x"), ("eval.py tasks", "--task gsm8k={base}/eggs.txt", ".jsonl"),
    ("eval.py tasks", "--shots -1", "--shots"), ("eval.py tasks", "--limit 0", "--limit"), ("eval.py tasks", "--samples 0", "--samples"), ("eval.py tasks", "--seconds inf", "--seconds"),
    ("eval.py perplexity", "{base}/empty.txt", "empty"), ("eval.py perplexity", "nowhere.txt", "nowhere"), ("eval.py curves", "{base}/judge", "metrics.jsonl"), ("eval.py versions", "nowhere", "nowhere"), ("eval.py versions", "--against nowhere", "nowhere"), ("eval.py facts", "nowhere", "nowhere"), ("gatt.py test", "nowhere", "nowhere"), ("eval.py diversity", "nowhere", "nowhere"),
    ("eval.py safety", "nowhere", "nowhere"), ("eval.py curves", "nowhere", "nowhere"), ("rlhf.py curves", "nowhere", "nowhere"), ("reward.py eval", "nowhere", "nowhere"),
    ("eval.py facts", "--against {base}/run {base}/run", "--against"), ("eval.py versions", "--general nowhere", "nowhere"), ("eval.py versions", "--n_prompts 0", "--n_prompts"),
    ("eval.py judge", "--judge oracle", "oracle"), ("eval.py judge", "--judge http://127.0.0.1:1/v1", "--judge_model"), ("eval.py judge", "--judge http://me:secret@127.0.0.1/v1 --judge_model x", "user"),
    ("eval.py judge", "--judge http://127.0.0.1/v1?key=secret --judge_model x", "query"), ("eval.py judge", "--axis beauty", "beauty"), ("eval.py judge", "--prompts {base}/prompts.jsonl", "another --judge"),
    ("eval.py judge", "--parallel 0", "--parallel"), ("eval.py judge", "--retries -1", "--retries"), ("eval.py judge", "--timeout 0", "--timeout"), ("eval.py judge", "--a nowhere", "nowhere"),
    ("eval.py safety", "--rewards {base}/judge", "--rewards"), ("eval.py safety", "--previous nowhere", "nowhere"), ("eval.py diversity", "--samples 1", "--samples"), ("eval.py diversity", "--temperatures x", "--temperatures"),
    ("eval.py corpus", "--documents 0", "--documents"), ("eval.py corpus", "nowhere.txt", "nowhere"), ("eval.py contamination", "--train {base}/eggs.txt", ".u16"), ("eval.py contamination", "--test nowhere.jsonl", "nowhere"),
    ("eval.py contamination", "--lengths 5", "--lengths"), ("eval.py contamination", "--lengths ten", "--lengths"), ("eval.py contamination", "--chunk 0", "--chunk"), ("eval.py contamination", "--tokenizer nowhere.model", "nowhere.model"),
]


@pytest.fixture(scope="module")
def files(base, formats):
    """Small files beside the good folders, as flags name them."""
    rows = {"chat": {"messages": TURNS}, "prompts": {"prompt": FOX, "unsafe": True}, "harmless": {"prompt": FOX}, "samples": ROWS["samples"][0],
            "far": {"turns": [[[1, 5], [999, 2]]], "is_answer": [False, False, True, True]}}
    for name, row in rows.items():
        (base / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (base / "long.jsonl").write_text("".join(json.dumps({"prompt": FOX * n, "unsafe": True}) + "\n" for n in (1, 2000)))
    (base / "pairs.jsonl").write_text("".join(json.dumps(PAIR | {"prompt": f"{FOX} {i}"}) + "\n" for i in range(40)))
    (base / "eggs.txt").write_text(f"{FOX}\n\n" * 40)
    (base / "foxes.txt").write_text(FOX)
    (base / "empty.txt").write_text("")
    (base / "run" / "metrics.jsonl").write_text('{"step": 1, "tokens": 9, "loss": 1.0}\n')
    (base / "fox.ends").write_bytes(formats["shards"].files["fox.ends"])
    judge = base / "judge" / "config.json"
    judge.write_text(judge.read_text().replace('"convert"', '"reward"'))
    smaller(base)
    return base


def refused_command(command, words, out, capsys, monkeypatch):
    """The sentence by which a command line refuses, on standard error, with exit code 2."""
    script, _, name = command.partition(" ")
    module = MODULES[script]
    main, settings = module.COMMANDS[name] if name else (module.main, module.Settings)
    monkeypatch.setattr(sys, "argv", [script])
    flags = ["--out", str(out)] if "out" in settings.__dataclass_fields__ and "--out" not in words else []
    flags += ["--threads", "1"] if "threads" in settings.__dataclass_fields__ and "--threads" not in words else []
    with pytest.raises(SystemExit) as stop:
        command_line(main, settings, words + flags)
    *bars, said = capsys.readouterr().err.strip().replace("\r", "\n").split("\n")
    assert all(re.match(r"\s*$|tokenising|sampling|searching", bar) for bar in bars), bars
    assert stop.value.code == 2 and said.startswith(f"{script}: ") and is_helpful(said), said
    return said


@pytest.mark.parametrize("command, words, fault", BAD_FLAGS, ids=[f"{command} {words}" for command, words, _ in BAD_FLAGS])
def test_a_flag_that_makes_no_sense_ends_with_one_sentence_and_leaves_no_output(files, tmp_path, capsys, monkeypatch, command, words, fault):
    monkeypatch.chdir(tmp_path)
    every = f"{GOOD.get(command, '')} {words}".format(base=files).split()
    assert fault.format(base=files) in refused_command(command, every, tmp_path / "out", capsys, monkeypatch)
    assert not list(tmp_path.iterdir())


BAD_OUTS = {  # name → what is put at a path, and the --out below or at it
    "a file": lambda path: path.write_text("mine") and path, "below a file": lambda path: path.write_text("mine") and path / "out",
    "in /proc": lambda path: path.mkdir() or Path("/proc/strangers/out"),
    "another stage's": lambda path: folder_with(path, "config.json", '{"stage": "moon", "settings": {}, "model": {}, "threads": 1}'),
    "somebody else's": lambda path: folder_with(path, "config.json", '{"mine": 7}'), "spoilt": lambda path: folder_with(path, "config.json", '{"stage'),
}


def folder_with(path, name, text):
    """A folder with one file."""
    path.mkdir()
    (path / name).write_text(text)
    return path


def tree(folder):
    """Every file below a folder, but for locks, with its content and date."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def is_written(command):
    """Whether a command has an --out."""
    script, _, name = command.partition(" ")
    return hasattr(MODULES[script].COMMANDS[name][1] if name else MODULES[script].Settings, "out")


@pytest.mark.parametrize("how", BAD_OUTS)
@pytest.mark.parametrize("command", [command for command in GOOD if is_written(command)])
def test_an_out_that_is_not_ours_to_write_to_is_refused_and_left_alone(files, tmp_path, capsys, monkeypatch, command, how):
    monkeypatch.chdir(tmp_path)
    out = BAD_OUTS[how](tmp_path / "there")
    before = tree(tmp_path)
    said = refused_command(command, GOOD[command].format(base=files).split(), out, capsys, monkeypatch)
    assert str(out.relative_to("/")).split("/")[1] in said and tree(tmp_path) == before


@pytest.mark.parametrize("command", ["pretrain.py", "sft.py", "gatt.py test", "eval.py judge"])
def test_an_empty_out_is_not_the_current_folder(files, tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert "--out is empty" in refused_command(command, GOOD[command].format(base=files).split(), "", capsys, monkeypatch)
    assert not list(tmp_path.iterdir())


def test_what_listens_can_be_called_from_this_machine_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    pretrain.start(pretrain.parse(pretrain.Settings, ["--out", str(tmp_path), "--device", "cpu", "--threads", "1"]))
    try:
        mine = {os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()}
        rows = [line.split() for kind in ("tcp", "tcp6") for line in Path("/proc/self/net", kind).read_text().splitlines()[1:]]
        listening = [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine]
        assert listening and all(address.startswith("0100007F:") for address in listening)  # 127.0.0.1
    finally:
        torch.distributed.destroy_process_group()
        pretrain.cpu_group.cache_clear()


def test_names_in_data_write_nothing_outside_of_out(files, tmp_path, capsys, monkeypatch):
    hostile = {"prompt": FOX, "id": "../../../id", "kind": "../kind", "category": "/category", "template": "../template"}
    (tmp_path / "p.jsonl").write_text(json.dumps(hostile) + "\n")
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    before = tree(files)
    command_line(evaluation.judge, evaluation.Judge, [
        "--a", f"{files}/run", "--b", f"{files}/small/../small", "--prompts", str(tmp_path / "p.jsonl"), "--judge", "reward", "--rewards", f"{files}/judge",
        "--max_new_tokens", "2", "--threads", "1", "--out", str(tmp_path / "deep" / "out")])
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()} == {"p.jsonl", "deep"} and tree(files) == before
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "out"]


def test_two_hundred_damaged_files_of_every_format_are_read_or_refused_with_a_sentence():
    counts, failures = fuzz(200, seed=1)
    assert not failures and min(counts["read"], counts["refused"]) > 10 and counts.total() == 200
