"""The Llama 2 tokenizer (§2.2): SentencePiece BPE, 32k pieces, a token per digit, bytes for the unknown.

In: text, or a dialogue [{"role": "system" | "user" | "assistant", "content": text}, ...].
Out: token ids and, for a dialogue, which of them are the answer tokens that SFT learns from (§3.1).
Loads Meta's tokenizer.model as it is, or trains one with its settings. The chat format is that of the released code.

    python tokenizer.py train --out tokenizer.model --vocab_size 1024 --toy_symbols corpus.jsonl notes.txt.gz
    python tokenizer.py show "Hello world, 2023" --model tokenizer.model
    python tokenizer.py show --dialog dialog.json --model tokenizer.model

sentencepiece joins, again and again, the adjacent pair whose union scores best; tests/ spells that loop out.
"""
import argparse
import gzip
import io
import json
import math
import random
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import sentencepiece

B_INST, E_INST = "[INST]", "[/INST]"  # names and strings of the released generation.py
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
TAGS = (B_INST, E_INST, B_SYS.strip(), E_SYS.strip())
TOY_SYMBOLS = (*TAGS, "\n")  # our choice: as pieces of their own they save a small vocabulary ten tokens a turn
NEXT_ROLES = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}

RELEASED_SETTINGS = dict(  # read out of the released model: all that differs from SentencePiece's defaults
    model_type="bpe", split_digits=True, byte_fallback=True, character_coverage=0.99995,
    normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True)


class InputError(ValueError):
    """Bad input, said in one sentence with its mend; the command lines print it and exit with code 2."""


class StrictJson(json.JSONDecoder):
    """JSON of strangers: ValueError also for NaN, infinity, half a surrogate pair, a name twice in an object, endless nesting."""

    SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

    def __init__(self):
        super().__init__(object_pairs_hook=self.once, parse_constant=self.finite, parse_float=self.finite)

    @staticmethod
    def once(pairs: list[tuple]) -> dict:
        """The object of these names and values."""
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name stands twice in one object")
        return found

    @staticmethod
    def finite(text: str) -> float:
        """The number that a text writes."""
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text[:20]} is no number of JSON")
        return value

    def raw_decode(self, text: str, idx: int = 0) -> tuple[object, int]:
        """The value that begins at `idx`, and where it ends."""
        try:
            value, end = super().raw_decode(text, idx)
            if self.SURROGATE.search(text, idx, end):
                json.dumps(value, ensure_ascii=False).encode()  # JSON's "\\ud83d" alone makes a str that UTF-8 cannot hold
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        return value, end


parse_json = StrictJson().decode


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one sentence, without the list of all flags before it."""

    def error(self, message: str) -> None:
        """Raise the message as an InputError."""
        raise InputError(f"{message}; --help lists what there is")


class Tokenizer:
    """A SentencePiece model, ours or Meta's: text <-> ids. `pad_id` is -1 in Meta's, which has no pad token."""

    def __init__(self, path: str | Path):
        """Load a model file. Raises InputError if it is missing, broken, or has no BOS or EOS."""
        self.path = str(Path(path))
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=self.path)
            self._model.id_to_piece(list(range(len(self._model))))  # a piece that is no UTF-8 fails here, not in mid-text
        except (RuntimeError, UnicodeDecodeError):
            raise InputError(f"{path} is no SentencePiece model (missing? half a download? a Git LFS pointer?): "
                                 f"copy Meta's or train one: python tokenizer.py train --out {path} FILE...") from None
        self.vocab_size, self.pad_id = self._model.vocab_size(), self._model.pad_id()
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise InputError(f"{path} lacks a BOS or EOS token: train it with both, as Llama needs them")

    def encode(self, text: str | list[str], bos: bool, eos: bool) -> list[int] | list[list[int]]:
        """Ids of a text, or of each of several, with BOS and EOS if asked; "<s>" in it stays plain text.

        Raises InputError for what is no text.
        """
        try:
            return self._model.encode(text, add_bos=bos, add_eos=eos, num_threads=1)  # by default it takes all cores for several
        except (RuntimeError, TypeError):  # JSON's "\ud83d" makes a str that UTF-8 cannot hold
            raise InputError("the input is no text or has half a surrogate pair: remove that") from None

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ids. Control tokens and pads (-1 in the released batches) are skipped, bad UTF-8 is U+FFFD.

        Gives back any text encoded with the settings above, but U+2581 as a space. IndexError for an unknown id.
        """
        return self._model.decode([int(token) for token in tokens if token != self.pad_id])

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """The vocabulary entry of each id: U+2581 stands for a space, "<0x0A>" for a byte. Raises as `decode`."""
        return [self._model.id_to_piece(int(token)) for token in tokens]

    def encode_dialog(self, messages: Sequence[dict], escape: bool = False) -> tuple[list[int], list[bool]]:
        """Ids of a dialogue, and for each whether it is part of an answer, EOS included. Raises as `dialog_turns`."""
        turns = [self.encode_turn(prompt, answer) for prompt, answer in dialog_turns(messages, escape)]
        tokens = [token for ids, _ in turns for token in ids]
        is_answer = [flag for _, mask in turns for flag in mask]
        return tokens, is_answer

    def encode_turn(self, prompt: str, answer: str | None) -> tuple[list[int], list[bool]]:
        """One turn of `dialog_turns`: BOS + encode(prompt + " " + answer + " ") + EOS, and its answer mask.

        As in the released code, both are encoded as one text. The answer begins where its ids differ from those of the
        prompt alone, so a token across the border is the answer's (our choice; the released model has none). An answer
        that is still to come is None: then there is no EOS.
        """
        prompt_ids = self.encode(prompt, bos=True, eos=False)
        turn = prompt_ids if answer is None else self.encode(f"{prompt} {answer} ", bos=True, eos=True)
        start = next((i for i, (a, b) in enumerate(zip(prompt_ids, turn)) if a != b), len(prompt_ids))
        return turn, [False] * start + [True] * (len(turn) - start)

    @classmethod
    def train(cls, texts: Iterable[str], path: str | Path, vocab_size: int = 32_000,
              user_defined_symbols: Sequence[str] = (), threads: int = 16,
              input_sentence_size: int = 200_000_000) -> "Tokenizer":
        """Train a model with the released settings (§2.2), write it to `path` and load it.

        Ids: 0 unknown, 1 BOS, 2 EOS, user-defined symbols, 256 bytes, then the learned pieces in merge order. Memory
        holds at most `input_sentence_size` lines, a random sample. The same texts and arguments give the same file.
        Raises InputError if there is no text or `vocab_size` does not suit it, and names one that does.
        """
        if not 0 < vocab_size < 2**31 or not 0 < input_sentence_size < 2**31:
            raise InputError(f"vocab_size {vocab_size} and input_sentence_size {input_sentence_size} must be above 0 and "
                                 "below 2^31")
        Path(path).parent.mkdir(parents=True, exist_ok=True)  # fail before the work
        if Path(path).is_dir():
            raise InputError(f"{path} is a folder; name a file to write")
        lines = training_lines(texts, input_sentence_size)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(lines.pop() for _ in range(len(lines))),  # frees ours as SentencePiece copies
                model_writer=model, vocab_size=vocab_size, user_defined_symbols=list(user_defined_symbols),
                input_sentence_size=input_sentence_size, num_threads=threads, minloglevel=2, **RELEASED_SETTINGS)
        except RuntimeError as error:
            message = f"SentencePiece cannot train: {error}"
            if most := re.search(r"Vocabulary size too high .* value <= (\d+)", message):
                message = f"vocab_size {vocab_size} is too large: this text gives {most[1]} at most"
            elif least := re.search(r"smaller than required_chars\. -?\d+ vs (\d+)", message):
                message = f"vocab_size {vocab_size} is too small: symbols, bytes, characters need at least {least[1]}"
            elif "!sentences_.empty()" in message:
                message = "there is no text to train a tokenizer on"
            raise InputError(message) from None
        unfinished = Path(f"{path}.unfinished")
        unfinished.write_bytes(model.getvalue())
        unfinished.replace(path)  # whoever opens `path` finds a whole model or none
        return cls(path)


def training_lines(texts: Iterable[str], size: int) -> list[str]:
    """The texts in lines for the trainer: `size` at most, each with the same chance, the same ones in every run.

    SentencePiece silently skips lines over 4192 bytes (1048 characters of 4) and lines with U+2585, its mark for the
    unknown; so lines are cut there, a long one at a space if it has any. It samples with another seed in every run.
    """
    generator, sample = random.Random(0), []  # reservoir sampling
    short = (part for text in texts for line in re.split("[\n\u2585]", text)
             for part in re.findall("(.{1,1048}(?= |$)|.{1048}) ?", line))
    for count, line in enumerate(short, 1):
        if len(sample) < size:
            sample.append(line)
        elif (slot := generator.randrange(count)) < size:
            sample[slot] = line
    return sample


class TextStream:
    """Decoding for chat, a token at a time: what `push` returns, joined, plus `flush` at the end, equals decode(all tokens)."""

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode
        self._shown: list[int] = []  # tokens: those shown last
        self._waiting: list[int] = []  # those not yet shown

    def push(self, token: int) -> str:
        """Take one token and return the text that is certain now, "" within a multibyte character."""
        self._waiting.append(token)
        text = self.flush()
        if not text or text.endswith("\ufffd"):  # perhaps only the first of up to four byte tokens of a character
            return ""
        self._shown, self._waiting = self._waiting, []
        return text

    def flush(self) -> str:
        """The text of the tokens that still wait, complete or not; for after the last token."""
        return self._decode(self._shown + self._waiting)[len(self._decode(self._shown)):]


def escape_tags(text: str) -> str:
    """Our choice for texts with chat tags: a space behind the first character, "[ INST]", "< <SYS>>"."""
    for tag in TAGS:
        text = text.replace(tag, f"{tag[0]} {tag[1:]}")
    return text


def dialog_turns(messages: Sequence[dict], escape: bool = False) -> list[tuple[str, str | None]]:
    """A dialogue as (prompt, answer) turns of the released format: system or not, then user and assistant in turn.

    The answer of a last turn still to be answered is None. Raises InputError with the message's index if a role is
    wrong, a content no text, an answer empty, or a tag in a text (unless `escape`) could pose as another speaker.
    """
    contents, previous = [], None
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise InputError(f'message {index} is no object with "role" and "content", both of them text')
        role, content = message.get("role"), message["content"]
        if role not in NEXT_ROLES[previous]:
            raise InputError(f"message {index} has the role {role!r:.60}, expected {' or '.join(NEXT_ROLES[previous])}")
        content = escape_tags(content) if escape else content
        if tags := [tag for tag in TAGS if tag in content]:
            raise InputError(f"message {index} ({role}) carries the tag {tags[0]}: remove or escape it")
        if role == "assistant" and not content.strip():
            raise InputError(f"message {index} (assistant) is an empty answer")
        contents.append(B_SYS + content + E_SYS if role == "system" else content)
        previous = role
    if previous in (None, "system"):
        raise InputError(f"the dialogue has no user message: expected one as message {len(messages)}")
    if messages[0]["role"] == "system":
        contents[:2] = [contents[0] + contents[1]]  # before the strip, so that spaces between the two stay
    contents = [content.strip() for content in contents]
    return [(f"{B_INST} {prompt} {E_INST}", answer) for prompt, answer in zip_longest(contents[::2], contents[1::2])]


def read_lines(file: str) -> Iterator[tuple[int, str]]:
    """(number, text) of each line of a text file, plain or .gz, or of standard input, "-"; InputError names a bad line."""
    number = 0
    try:
        with sys.stdin.buffer if file == "-" else gzip.open(file) if file.endswith(".gz") else open(file, "rb") as f:
            for number, line in enumerate(f, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}, line {number}: not UTF-8 (byte {error.object[error.start]:#04x}); "
                             "convert the file with iconv or drop the line") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file}, after line {number}: can't be read ({error}); is it whole?") from None


def read_texts(file: str) -> Iterator[str]:
    """Each "text" of a .jsonl (.gz), or the lines of any other file. Raises as `read_lines`."""
    is_json = file.removesuffix(".gz").endswith(".jsonl")
    for number, line in read_lines(file):
        if not is_json:
            yield line
        elif line.strip():
            try:
                text = parse_json(line)["text"]
                text.encode()  # AttributeError if it is none
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(f'{file}, line {number}: each line must be a JSON object with a "text" string; mend or '
                                     "drop that line") from None
            yield text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code, 2 after bad input."""
    parser = Parser(prog="tokenizer.py", description="Train or inspect a Llama 2 tokenizer.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a model on texts")
    train.add_argument("files", nargs="+", metavar="FILE", help='.txt, .jsonl with "text", .gz, - for stdin')
    train.add_argument("--out", required=True, help="the model file to write")
    train.add_argument("--vocab_size", type=int, default=32_000, help="number of pieces, all kinds together")
    train.add_argument("--input_sentence_size", type=int, default=200_000_000, help="lines in memory")
    train.add_argument("--toy_symbols", action="store_true", help="own pieces for chat tags and newline")
    show = commands.add_parser("show", help="print the tokens of a text or a dialogue")
    source = show.add_mutually_exclusive_group(required=True)
    source.add_argument("text", nargs="?", metavar="TEXT")
    source.add_argument("--dialog", metavar="FILE.json", help='a list of {"role": ..., "content": ...}')
    show.add_argument("--model", default="tokenizer.model", help="the model file to read")
    show.add_argument("--escape", action="store_true", help="escape chat tags instead of refusing them")
    show.add_argument("--color", action="store_true", help="color even if the output is not a terminal")
    try:
        args = parser.parse_args(arguments)
        if args.command == "train":
            texts = (text for file in args.files for text in read_texts(file))
            Tokenizer.train(texts, args.out, args.vocab_size, TOY_SYMBOLS if args.toy_symbols else (),
                            input_sentence_size=args.input_sentence_size)
            print(f"{args.out}: {args.vocab_size} pieces")
            return 0
        tokenizer = Tokenizer(args.model)
        if args.dialog:
            try:
                messages = parse_json(Path(args.dialog).read_text("utf-8-sig"))
            except ValueError as error:
                raise InputError(f"{args.dialog} is not JSON: {error}; mend it") from None
            if not isinstance(messages, list):
                raise InputError(f"{args.dialog} is not a JSON list of messages; write one")
            try:
                tokens, is_answer = tokenizer.encode_dialog(messages, args.escape)
            except InputError as error:
                raise InputError(f"{args.dialog}: {error}; mend it") from None
        else:
            tokens = tokenizer.encode(args.text, bos=False, eos=False)
            is_answer = [False] * len(tokens)
        for token, answer, piece in zip(tokens, is_answer, tokenizer.pieces(tokens)):
            row = f"{token:>6} {'*' if answer else ' '} {piece!r}"
            print(f"\033[32m{row}\033[0m" if answer and (args.color or sys.stdout.isatty()) else row)
        print(f"{len(tokens)} tokens, {sum(is_answer)} of them (*) in answers")
    except (InputError, OSError) as error:
        print(f"tokenizer.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
