"""A grammar engine small enough to read, as a plugin package: the output is the source of the "regex", letter by letter.

What hostile grammars do to real engines it does on command, so that it happens whatever the libraries' versions are: a source holds
"!hang!" and so on: hang (in C, holding the interpreter), eat (memory), big (of two megabytes), abort, quit, no (refuse), raise, wait:FILE (until it is there); "!lit-hang!" holds for
engines whose name begins so. A mask of a text that begins with "slow" hangs behind these four letters.
"""

PLUGIN = '''
import os, pathlib, re, time
from plugmesh.errors import DataLoss, UnsupportedGrammar
from plugmesh.hookspecs import hookimpl
from plugmesh.records import GrammarEngineRecord


class Matcher:
    def __init__(self, text, vocabulary):
        self.text, self.vocabulary, self.at, self.history, self.is_terminated = text, vocabulary, 0, [], False

    @property
    def is_completed(self):
        return self.at == len(self.text)

    def _step(self, token):
        piece = self.vocabulary.token_bytes[token] if 0 <= token < len(self.vocabulary.token_bytes) else None
        if self.is_terminated or not piece:
            return 0
        return len(piece) if self.text.startswith(piece, self.at) and token not in self.vocabulary.special_ids else 0

    def fill(self, mask):
        if self.text.startswith(b"slow") and self.at >= 4:
            re.match("(a+)+$", "a" * 60 + "b")
        mask[:] = 0
        for token in range(len(self.vocabulary.token_bytes)):
            if self._step(token) or (self.is_completed and token in self.vocabulary.eos_token_ids):
                mask[token // 32] |= 1 << (token % 32)
        return True

    def accept(self, token):
        if self.is_completed and not self.is_terminated and token in self.vocabulary.eos_token_ids:
            self.is_terminated = True
            self.history.append(0)
            return True
        step = self._step(token)
        if step:
            self.at += step
            self.history.append(step)
        return step > 0

    def rollback(self, num_tokens):
        if num_tokens > len(self.history):
            raise ValueError("fewer were accepted")
        for _ in range(num_tokens):
            self.at -= self.history.pop()
            self.is_terminated = False

    def forced(self):
        return self.text[self.at:]

    def fork(self):
        other = Matcher(self.text, self.vocabulary)
        other.at, other.history, other.is_terminated = self.at, list(self.history), self.is_terminated
        return other


class Compiled:
    def __init__(self, text, vocabulary):
        self.text, self.vocabulary, self.num_bytes = text, vocabulary, len(text)

    def matcher(self):
        return Matcher(self.text, self.vocabulary)


class Engine:
    def __init__(self, vocabulary):
        self.vocabulary = vocabulary

    def compile(self, language, source):
        # A lowered pattern may come in another dress; what counts is in it.
        command = re.search(r"!(?:(\\w+)-)?(hang|eat|big|abort|quit|no|raise|wait:[^!]*)!", source)
        if command is None or not NAME.startswith(command[1] or ''):
            return b"LIT" + source.encode()
        word = command[2]
        if word == "hang":
            re.match("(a+)+$", "a" * 60 + "b")
        if word == "eat":
            held = []
            while True:
                held.append(bytearray(1 << 24))
        if word == "big":
            return b"LIT" + bytes(2 << 20)
        if word == "abort":
            os.abort()
        if word == "quit":
            os._exit(3)
        if word == "raise":
            raise ValueError(source)
        if word == "no":
            raise UnsupportedGrammar("it says no", keyword="pattern", path="/x")
        path = pathlib.Path(word.removeprefix("wait:"))
        while not path.exists():
            time.sleep(0.01)
        return b"LITwaited"

    def load(self, compiled):
        if not compiled.startswith(b"LIT"):
            raise DataLoss("not of this engine")
        return Compiled(compiled[3:], self.vocabulary)


@hookimpl
def register_grammar_engines(context):
    return [GrammarEngineRecord(NAME, VERSION, frozenset({"regex"}), Engine)]
'''

CARD = """
slug = "{slug}"
version = "0.1.0"
summary = "Literal text"
services = ["grammar", "decode"]
hooks = ["register_grammar_engines"]
fidelity = "n/a"
device = ["cpu"]
"""


def write(folder, slug="t_literal", *, name="literal", version="1"):
    """The plugin's package below `folder`, which must be on the import path."""
    package = folder / f"plugmesh_{slug}"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "plugin.py").write_text(f"NAME = {name!r}\nVERSION = {version!r}\n{PLUGIN}")
    (package / "plugin.toml").write_text(CARD.format(slug=slug))
