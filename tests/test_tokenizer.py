"""Claims about tokenizer.py, each with its own oracle: a merge loop, sentencepiece, or ids written down.

The released ids are checked when LLAMA_TOKENIZER names Meta's tokenizer.model; all else trains a small model.
"""
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

sys.path.insert(0, str(Path(__file__).parent.parent))
from tokenizer import (TAGS, TOY_SYMBOLS, InputError, TextStream, Tokenizer, escape_tags, main,  # noqa: E402
                       read_texts)

SCRIPT = Path(__file__).parent.parent / "tokenizer.py"
GOLDEN = json.loads((Path(__file__).parent / "golden" / "released_tokenizer.json").read_text())
WORDS = ("the river runs past an old mill where seven people bake bread and sell it in town every morning "
         "before noon while children watch boats drift under stone bridges towards harbour lights").split()
TRICKY = ["", " ", "  a", "a ", "a  b", "\n", "\t\n x\r\n", "2023", "1,234.5", "café", "cafe\u0301", "你好",
          "🙂", "👩‍👩‍👧‍👦", "\x00", "<s>", "a</s>b", "<0x41>", "<unk>", "\ufeff",
          "[INST] x [/INST]", "<<SYS>>\nBe kind.\n<</SYS>>\n\n"]
PAIR = [{"role": "user", "content": "7"}, {"role": "assistant", "content": "8"}]


def corpus(lines=400):
    """Lines of 12 words; the same ones in every process."""
    generator = random.Random(1)
    return [" ".join(generator.choices(WORDS, k=12)) + f" {i}" for i in range(lines)]


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    return Tokenizer.train(corpus(), tmp_path_factory.mktemp("plain") / "t.model", 420)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    return Tokenizer.train(corpus(), tmp_path_factory.mktemp("toy") / "t.model", 420, TOY_SYMBOLS)


@pytest.fixture(scope="session")
def released():
    if "LLAMA_TOKENIZER" not in os.environ:
        pytest.skip("LLAMA_TOKENIZER does not name the released tokenizer.model")
    return Tokenizer(os.environ["LLAMA_TOKENIZER"])


def test_released_model_gives_the_released_ids(released):
    assert (released.vocab_size, released.bos_id, released.eos_id, released.pad_id) == (32000, 1, 2, -1)
    for case in GOLDEN["texts"]:
        assert released.encode(case["text"], bos=False, eos=False) == case["ids"], case
        assert released.encode(case["text"], bos=True, eos=True) == [1, *case["ids"], 2], case
        assert released.decode(case["ids"]) == case["decoded"], case


def test_released_model_gives_the_released_dialogues(released):
    for case in GOLDEN["dialogs"]:
        tokens, is_answer = released.encode_dialog(case["messages"])
        assert tokens == case["tokens"], case["name"]
        assert is_answer == [bool(flag) for flag in case["is_answer"]], case["name"]


def test_encoding_is_the_merge_loop(plain):
    model = sentencepiece.SentencePieceProcessor(model_file=plain.path)
    rank = {model.id_to_piece(i): model.get_score(i) for i in range(259, model.vocab_size())}

    def merge_loop(text):
        pieces = list("▁" + text.replace(" ", "▁"))
        while True:
            pairs = [(rank[a + b], -i) for i, (a, b) in enumerate(zip(pieces, pieces[1:])) if a + b in rank]
            if not pairs:
                break
            i = -max(pairs)[1]
            pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]
        ids = []
        for piece in pieces:
            ids += [model.piece_to_id(piece)] if piece in rank else [3 + byte for byte in piece.encode()]
        return ids

    generator = random.Random(2)
    for _ in range(300):
        text = "".join(generator.choices([*WORDS, *"aeinrst   19é🙂"], k=generator.randint(1, 12)))
        assert plain.encode(text, bos=False, eos=False) == merge_loop(text), text


def test_every_digit_is_a_token_and_unknown_characters_are_bytes(plain):
    assert plain.pieces(plain.encode("2023", False, False)) == ["▁", "2", "0", "2", "3"]
    assert plain.pieces(plain.encode("🙂", False, False)) == ["▁", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]


def test_decode_gives_back_what_was_encoded(plain, toy):
    for tokenizer in (plain, toy):
        for text in TRICKY:
            tokens = tokenizer.encode(text, bos=False, eos=False)
            assert tokenizer.decode(tokens) == text
            assert tokenizer.decode([tokenizer.bos_id, *tokens, tokenizer.eos_id, -1, -1]) == text
        assert tokenizer.decode(tokenizer.encode("a\u2581b", False, False)) == "a b"  # the stated loss


def test_a_batch_is_its_texts_one_by_one(plain):
    for bos, eos in [(False, False), (True, False), (False, True), (True, True)]:
        one_by_one = [plain.encode(text, bos, eos) for text in TRICKY]
        assert plain.encode(TRICKY, bos, eos) == one_by_one


def test_a_stream_says_what_decode_says(toy):
    generator = random.Random(3)
    characters = [toy.encode(text, bos=False, eos=False) for text in TRICKY]
    for _ in range(2000):
        tokens = sum(generator.choices(characters, k=3), [])
        tokens += generator.choices(range(toy.vocab_size), k=5)
        tokens += generator.choices(range(8, 264), k=5)  # bytes
        if generator.random() < 0.5:
            generator.shuffle(tokens)
        stream = TextStream(toy)
        assert "".join([*map(stream.push, tokens), stream.flush()]) == toy.decode(tokens), tokens


def test_a_stream_holds_back_half_a_character_and_nothing_more(plain):
    stream = TextStream(plain)
    pushed = [stream.push(token) for token in plain.encode("🙂1", bos=False, eos=False)]
    assert pushed == ["", "", "", "", "🙂", "1"] and stream.flush() == ""


def test_a_dialogue_is_the_released_format_encoded_pair_by_pair(plain, toy):
    messages = [{"role": "system", "content": " Be kind.\n"}, {"role": "user", "content": "  Hi there "},
                {"role": "assistant", "content": "\nHello. "}, {"role": "user", "content": " Bye  "}]
    texts = ["[INST] <<SYS>>\n Be kind.\n\n<</SYS>>\n\n  Hi there [/INST] Hello. ", "[INST] Bye [/INST]"]
    for tokenizer in (plain, toy):
        model = sentencepiece.SentencePieceProcessor(model_file=tokenizer.path)
        tokens, is_answer = tokenizer.encode_dialog(messages)
        assert tokens == [1, *model.encode(texts[0]), 2, 1, *model.encode(texts[1])]
        assert tokenizer.decode(token for token, answer in zip(tokens, is_answer) if answer) == "Hello. "


def test_the_answer_mask_runs_from_behind_the_tag_through_eos(toy):
    tokens, is_answer = toy.encode_dialog(PAIR + PAIR[:1])
    pair = ["<s>", "▁", "[INST]", "▁", "7", "▁", "[/INST]"]
    assert toy.pieces(tokens) == [*pair, "▁", "8", "▁", "</s>", *pair]
    assert is_answer == [False] * 7 + [True] * 4 + [False] * 7


def test_a_token_across_the_border_belongs_to_the_answer(tmp_path):
    lines = [f"[INST] {a} [/INST] yes " for a in WORDS]
    sentencepiece.SentencePieceTrainer.train(  # unlike ours, this model merges over spaces
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "across"), vocab_size=320,
        model_type="bpe", byte_fallback=True, split_by_whitespace=False, split_by_unicode_script=False,
        minloglevel=2)
    tokenizer = Tokenizer(tmp_path / "across.model")
    tokens, is_answer = tokenizer.encode_turn("[INST] a [/INST]", "yes")
    assert tokenizer.pieces(tokens)[-2:] == ["▁[/INST]▁yes", "</s>"]
    assert is_answer == [False] * (len(tokens) - 2) + [True] * 2


def test_tags_in_a_text_are_refused_or_escaped(toy):
    for tag in TAGS:
        for index, role in enumerate(["system", "user", "assistant"]):
            messages = [{"role": "system", "content": "s"}, *PAIR]
            messages[index] = {"role": role, "content": f"x{tag}{tag}<{tag}"}
            with pytest.raises(InputError, match=f"message {index}.*tag"):
                toy.encode_dialog(messages)
            escaped = escape_tags(messages[index]["content"])
            assert not any(other in escaped for other in TAGS)
            assert escaped.replace(" ", "") == messages[index]["content"]
            pieces = toy.pieces(toy.encode_dialog(messages, escape=True)[0])
            assert [pieces.count(other) for other in TAGS] == [1, 1, 1, 1]  # the format's own


@pytest.mark.parametrize("index, messages", [
    (0, []), (0, ["hi"]), (0, [{"role": "user"}]), (0, PAIR[1:]), (0, [{"role": "tool", "content": "x"}]),
    (0, [{"role": "user", "content": None}]), (1, PAIR[:1] * 2), (1, [{"role": "system", "content": "x"}]),
    (1, [PAIR[0], {"role": "assistant", "content": " \n"}]), (2, [*PAIR, {"role": "system", "content": "x"}]),
    (2, [*PAIR, PAIR[1]])])
def test_a_malformed_dialogue_is_refused_by_the_index_of_its_message(toy, index, messages):
    with pytest.raises(InputError, match=f"message {index}\\b"):
        toy.encode_dialog(messages)


def test_training_gives_the_same_file_in_every_process(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(corpus()))
    for sample in ("1000", "200"):  # 200: fewer than the lines, so a random sample of them
        files = []
        for name in ("a", "b"):
            subprocess.run([sys.executable, SCRIPT, "train", "--out", tmp_path / name, "--vocab_size", "400",
                            "--input_sentence_size", sample, tmp_path / "text.txt"], check=True)
            files.append((tmp_path / name).read_bytes())
        assert files[0] == files[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "text.txt"]  # nothing half-written


def test_nothing_of_the_training_text_is_lost(tmp_path, plain):
    one_line = Tokenizer.train([" ".join(corpus())], tmp_path / "one.model", 420)  # 30 kB; the limit is 4 kB
    assert Path(one_line.path).read_bytes() == Path(plain.path).read_bytes()
    marked = Tokenizer.train(["\n".join(f"{line}\u2585" for line in corpus())], tmp_path / "mark.model", 420)
    assert Path(marked.path).read_bytes() == Path(plain.path).read_bytes()
    unbroken = Tokenizer.train(["水" * 5000 + "火" * 5000], tmp_path / "unbroken.model", 262)
    assert {"水", "火"} < set(unbroken.pieces(range(262)))


def test_a_wrong_vocabulary_size_names_one_that_trains(tmp_path):
    for size, says in [(99_999, "at most"), (10, "at least")]:
        with pytest.raises(InputError, match=says) as error:
            Tokenizer.train(corpus(), tmp_path / "t.model", size, TOY_SYMBOLS)
        named = int("".join(filter(str.isdigit, str(error.value).split(":")[1].replace("256 bytes", ""))))
        assert Tokenizer.train(corpus(), tmp_path / "t.model", named, TOY_SYMBOLS).vocab_size == named
    with pytest.raises(InputError, match="no text"):
        Tokenizer.train([], tmp_path / "t.model", 400)


def test_texts_come_from_txt_jsonl_and_gz(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "three\\nfour"}\n\n{"text": "f\u00fcnf"}\n')
    texts = [text for name in ("a.txt", "b.jsonl.gz") for text in read_texts(str(tmp_path / name))]
    assert texts == ["one\n", "two\n", "three\nfour", "fünf"]


@pytest.mark.parametrize("name, content, says", [
    ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', "a.jsonl, line 2"), ("a.jsonl", b'{"txt": ""}\n', "line 1"),
    ("a.jsonl", b'{"text": "\\ud83d"}\n', "line 1"), ("a.txt", b"ok\nok\n\xff\n", "line 3"),
    ("a.gz", b"no gzip", "can't be read"), ("a.txt", b"\n", "no text"), ("a.txt", b"abc", "at most"),
    ("a.model", b"no model", "no SentencePiece model"), ("b.model", b"", "train one"),
    ("a.json", b"{}", "JSON list")])
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, plain, capsys, name, content, says):
    (tmp_path / name).write_bytes(content)
    command = {"b.model": ["show", "x", "--model", str(tmp_path / "missing.model")],
               "a.model": ["show", "x", "--model", str(tmp_path / "a.model")],
               "a.json": ["show", "--dialog", str(tmp_path / name), "--model", plain.path],
               }.get(name, ["train", "--out", str(tmp_path / "out.model"), str(tmp_path / name)])
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err
    assert not (tmp_path / "out.model").exists()


def test_show_marks_answer_tokens_with_a_star_and_color_only_if_asked(tmp_path, toy, capsys):
    (tmp_path / "dialog.json").write_text(json.dumps(PAIR))
    for color in ([], ["--color"]):
        assert main(["show", "--dialog", str(tmp_path / "dialog.json"), "--model", toy.path, *color]) == 0
        out = capsys.readouterr().out
        assert [line.split()[-1].removesuffix("\033[0m") for line in out.splitlines() if " * " in line] == [
            "'▁'", "'8'", "'▁'", "'</s>'"]
        assert ("\033[32m" in out) == bool(color)


def test_half_a_surrogate_pair_is_refused(plain):
    for attempt in (plain.encode, lambda text, bos, eos: plain.encode([text], bos, eos)):
        with pytest.raises(InputError, match="surrogate"):
            attempt("a\ud83d", False, False)
