"""The Llama 2 tokenizer (§2.2): SentencePiece BPE, 32k pieces, a token per digit, bytes for the unknown.

In: text, or a dialogue [{"role": "system" | "user" | "assistant", "content": text}, ...].
Out: token ids and, for a dialogue, which of them are the answer tokens that SFT learns from (§3.1).
Loads Meta's released tokenizer.model as it is, or trains a model with the same settings. The chat format is that of
the released code; the paper does not print it.

    python tokenizer.py train --out tokenizer.model --vocab_size 1024 --toy_symbols corpus.jsonl notes.txt.gz
    python tokenizer.py show "Hello world, 2023" --model tokenizer.model
    python tokenizer.py show --dialog dialog.json --model tokenizer.model

Needs only sentencepiece, which does the merging: again and again it joins the adjacent pair of pieces whose union
has the best score. tests/test_tokenizer.py spells that loop out and compares.
"""
import argparse
import gzip
import io
import json
import random
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

B_INST, E_INST = "[INST]", "[/INST]"  # names and strings of the released generation.py
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
TAGS = (B_INST, E_INST, B_SYS.strip(), E_SYS.strip())
TOY_SYMBOLS = (*TAGS, "\n")  # our choice: as pieces of their own they save a small vocabulary ten tokens a turn
NEXT_ROLES = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}

RELEASED_SETTINGS = dict(  # read out of the released model: all that differs from SentencePiece's defaults
    model_type="bpe",
    character_coverage=0.99995,  # rarer characters are spelled in bytes
    split_digits=True,
    byte_fallback=True,
    allow_whitespace_only_pieces=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
)


class TokenizerError(ValueError):
    """Bad input, said in one sentence; the command line prints it and exits with code 2."""


class Tokenizer:
    """A SentencePiece model, ours or Meta's: text <-> ids.

    Attributes: vocab_size, bos_id, eos_id, pad_id (-1 in the released model: it has no pad token), path.
    """

    def __init__(self, path: str | Path):
        """Load a model file. Raises TokenizerError if it is missing, broken, or has no BOS or EOS."""
        self.path = str(path)
        if not Path(path).is_file():
            raise TokenizerError(f"no tokenizer model at {path}: train one ('python tokenizer.py train --out {path} "
                                 "FILE...') or copy Meta's tokenizer.model there")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=self.path)
        except RuntimeError:
            raise TokenizerError(f"{path} is no SentencePiece model (half a download? a Git LFS pointer?): fetch or "
                                 "train it again") from None
        self.vocab_size, self.pad_id = self._model.vocab_size(), self._model.pad_id()
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise TokenizerError(f"{path} lacks a BOS or EOS token: train it with both, as Llama needs them")

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        """Ids of a text, BOS in front and EOS behind if asked; "<s>" and "</s>" in the text stay plain text.

        Raises TokenizerError for what is no text and for half a surrogate pair, as JSON's "\\ud83d" makes one.
        """
        try:
            return self._model.encode(text, add_bos=bos, add_eos=eos)
        except (RuntimeError, TypeError):
            raise TokenizerError("the input is no text or has half a surrogate pair: remove that") from None

    def encode_batch(self, texts: list[str], bos: bool, eos: bool, threads: int = 1) -> list[list[int]]:
        """The same ids as `encode` text by text, in one call of SentencePiece that can use threads."""
        try:
            return self._model.encode(texts, add_bos=bos, add_eos=eos, num_threads=threads)
        except (RuntimeError, TypeError):  # `encode` says what is wrong
            return [self.encode(text, bos, eos) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ids. Control tokens and pads (-1 in the released batches) are skipped, bad UTF-8 is U+FFFD.

        Gives back every text that went through `encode`, only U+2581, the model's mark for a space, returns as a
        space. (A model with a normaliser or without byte fallback loses more.) Raises IndexError for an unknown id.
        """
        return self._model.decode([int(token) for token in tokens if token != self.pad_id])

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """The vocabulary entry of each id: U+2581 stands for a space, "<0x0A>" for a byte. Raises as `decode`."""
        return [self._model.id_to_piece(int(token)) for token in tokens]

    def stream(self) -> "TextStream":
        """A decoder that takes one token at a time."""
        return TextStream(self)

    def encode_dialog(self, messages: Sequence[dict], escape: bool = False) -> tuple[list[int], list[bool]]:
        """Ids of a dialogue in the released chat format, and for each id whether it is part of an answer.

        The dialogue ends with the assistant (training) or with the user (to be answered, no EOS). All tokens behind
        "[/INST]" through EOS are the answer's. Raises TokenizerError as `dialog_turns` does.
        """
        tokens, is_answer = [], []
        for prompt, answer in dialog_turns(messages, escape):
            turn, mask = self.encode_turn(prompt, answer)
            tokens += turn
            is_answer += mask
        return tokens, is_answer

    def encode_turn(self, prompt: str, answer: str | None) -> tuple[list[int], list[bool]]:
        """One turn of `dialog_turns`: BOS + encode(prompt + " " + answer + " ") + EOS, and its answer mask.

        As in the released code, prompt and answer are encoded as one text. The answer begins at the first id in
        which that differs from the prompt encoded alone: if a model merges across the border, the merged token is
        the answer's (our choice; no piece of the released model crosses it). Raises TokenizerError as `encode`.
        """
        prompt_ids = self.encode(prompt, bos=True, eos=False)
        if answer is None:
            return prompt_ids, [False] * len(prompt_ids)
        turn = self.encode(f"{prompt} {answer} ", bos=True, eos=True)
        start = next((i for i, (a, b) in enumerate(zip(prompt_ids, turn)) if a != b), len(prompt_ids))
        return turn, [False] * start + [True] * (len(turn) - start)

    @classmethod
    def train(cls, texts: Iterable[str], path: str | Path, vocab_size: int = 32_000,
              user_defined_symbols: Sequence[str] = (), threads: int = 16,
              input_sentence_size: int = 200_000_000) -> "Tokenizer":
        """Train a model with the released settings (§2.2), write it to `path` and load it.

        Ids: 0 unknown, 1 BOS, 2 EOS, user-defined symbols, 256 bytes, then the learned pieces in merge order. `texts`
        is read once; its lines are kept in memory, or a random `input_sentence_size` of them, if there are more. The
        same texts and arguments give the same file (`threads` is recorded in it and changes nothing else).
        Raises TokenizerError if there is no text or `vocab_size` does not suit it, and names one that does.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)  # fail before the work
        lines = sample_lines(training_lines(texts), input_sentence_size)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(lines.pop() for _ in range(len(lines))),  # frees ours as SentencePiece copies
                model_writer=model, vocab_size=vocab_size, user_defined_symbols=list(user_defined_symbols),
                input_sentence_size=input_sentence_size, num_threads=threads, minloglevel=2, **RELEASED_SETTINGS)
        except RuntimeError as error:
            raise training_error(str(error), vocab_size) from None
        unfinished = Path(f"{path}.unfinished")
        unfinished.write_bytes(model.getvalue())
        unfinished.replace(path)  # whoever opens `path` finds a whole model or none
        return cls(path)


class TextStream:
    """Decoding for chat: what `push` returns, joined, plus `flush` at the end, equals decode(all tokens).

    A character may be spread over four byte tokens, and the dummy space before the first word is no text, so tokens
    wait here until later ones can no longer change what they say.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode
        self._shown, self._waiting = [], []  # tokens; behind those shown last, a leading space is kept

    def push(self, token: int) -> str:
        """Take one token and return the text that is certain now, "" within a multibyte character."""
        self._waiting.append(token)
        text = self.flush()
        if not text or text.endswith("\ufffd"):  # U+FFFD: perhaps only the beginning of a character
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
    """Check a dialogue and write it as turns (prompt, answer); the answer of an open last turn is None.

    An optional system message, then user and assistant in turn. The system prompt joins the first user message
    before the strip, so that spaces between the two stay (released chat format). Raises TokenizerError with the
    message's index for a wrong role, a content that is no text, an empty answer, or a tag in a text, which the
    released code refuses too; `escape` applies `escape_tags` instead.
    """
    turns, system, previous = [], "", None
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise TokenizerError(f'message {index} is no object with "role" and "content", both of them text')
        role, content = message.get("role"), message["content"]
        if role not in NEXT_ROLES[previous]:
            raise TokenizerError(f"message {index} has the role {role!r}, expected {' or '.join(NEXT_ROLES[previous])}")
        content = escape_tags(content) if escape else content
        if tags := [tag for tag in TAGS if tag in content]:
            raise TokenizerError(f"message {index} ({role}) carries the tag {tags[0]} and could pose as another "
                                 "speaker: remove or escape it")
        if role == "system":
            system = B_SYS + content + E_SYS
        elif role == "user":
            turns.append((f"{B_INST} {(system + content).strip()} {E_INST}", None))
            system = ""
        elif content.strip():
            turns[-1] = (turns[-1][0], content.strip())
        else:
            raise TokenizerError(f"message {index} (assistant) is an empty answer")
        previous = role
    if not turns:
        raise TokenizerError(f"the dialogue has no user message: expected one as message {len(messages)}")
    return turns


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts into lines that the SentencePiece trainer takes, since it silently skips all others.

    It skips empty lines, lines with U+2585, its mark for the unknown, and lines over 4192 bytes: 1048 characters of
    4 bytes. Long lines are cut at a space, which the dummy space before the next line replaces, or where they must.
    """
    for text in texts:
        for line in re.split("[\n\u2585]", text):
            yield from re.findall("(.{1,1048}(?= |$)|.{1048}) ?", line)


def sample_lines(lines: Iterable[str], size: int) -> list[str]:
    """At most `size` lines, each with the same chance (reservoir sampling), and the same ones in every run.

    SentencePiece can sample by itself, but its generator has another seed in every process.
    """
    generator, kept = random.Random(0), []
    for count, line in enumerate(lines, 1):
        if len(kept) < size:
            kept.append(line)
        elif (slot := generator.randrange(count)) < size:
            kept[slot] = line
    return kept


def training_error(message: str, vocab_size: int) -> TokenizerError:
    """SentencePiece's message as a sentence that names the vocabulary size that would do."""
    if match := re.search(r"Vocabulary size too high .* value <= (\d+)", message):
        return TokenizerError(f"vocab_size {vocab_size} is too large: this text gives {match[1]} at most")
    if match := re.search(r"smaller than required_chars\. -?\d+ vs (\d+)", message):
        return TokenizerError(f"vocab_size {vocab_size} is too small: control tokens, symbols, 256 bytes and the "
                              f"characters of this text need at least {match[1]}")
    if "!sentences_.empty()" in message:
        return TokenizerError("there is no text to train a tokenizer on")
    return TokenizerError(f"SentencePiece cannot train: {message}")


def read_texts(names: Iterable[str]) -> Iterator[str]:
    """Stream texts: the "text" of each line of a .jsonl file, else each line; .gz too; - is text on stdin.

    Raises TokenizerError with file and line number for a malformed line, or for a broken .gz.
    """
    for name in names:
        is_json = name.removesuffix(".gz").endswith(".jsonl")
        opener = gzip.open if name.endswith(".gz") else open
        try:
            with sys.stdin.buffer if name == "-" else opener(name, "rb") as file:
                for number, line in enumerate(file, 1):
                    text = json.loads(line)["text"] if is_json and line.strip() else line.decode()
                    text.encode()  # half a surrogate pair fails here, with its line number
                    yield text
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise TokenizerError(f"{name} is a broken .gz file: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            wanted = 'a JSON object with a "text"' if is_json else "UTF-8 text"
            raise TokenizerError(f"{name}, line {number} is not {wanted}") from None


def read_dialog(name: str) -> list:
    """The list of messages in a JSON file; raises TokenizerError if the file holds anything else."""
    try:
        messages = json.loads(Path(name).read_bytes())
    except ValueError:
        messages = None
    if not isinstance(messages, list):
        raise TokenizerError(f"{name} is not a JSON list of messages")
    return messages


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code, 2 after bad input."""
    parser = argparse.ArgumentParser(prog="tokenizer.py", description="Train or inspect a Llama 2 tokenizer.")
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
    args = parser.parse_args(arguments)
    try:
        if args.command == "train":
            symbols = TOY_SYMBOLS if args.toy_symbols else ()
            tokenizer = Tokenizer.train(read_texts(args.files), args.out, args.vocab_size, symbols,
                                        input_sentence_size=args.input_sentence_size)
            print(f"{args.out}: {tokenizer.vocab_size} pieces")
        else:
            show_tokens(Tokenizer(args.model), args)
    except (TokenizerError, OSError) as error:
        print(f"tokenizer.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
