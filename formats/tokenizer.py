"""Tokenizers as Hugging Face folders hold them.

Reads      tokenizer.json with byte-pair encoding, over bytes (GPT-2, Llama 3, Qwen, SmolLM2 ...) or
           in sentencepiece's manner (Llama 2, Mistral, Gemma, Phi-3 ...), by the steps that the
           file is made of (words.py); tokenizer.model (by the sentencepiece library); vocab.json
           with merges.txt; special tokens from tokenizer_config.json, special_tokens_map.json and
           added_tokens.json
Refuses    every other kind (WordPiece, Unigram in JSON) and every step and option that is not
           implemented, by its name

By hand and not by the tokenizers library, because a reader can follow these lines and not a Rust
package, and because a response must be encoded as the continuation of its prompt, which the
library does not offer. Every id is held to that library's in tests/peers/.
"""

import datetime
import functools
import re
from collections.abc import Iterator
from itertools import chain, groupby
from pathlib import Path

import sentencepiece

from formats.bpe import BPE, WordIds
from formats.chat_template import (
    AUTHORS_CHAT_TEMPLATE,
    BOS_IN_FRONT,
    MORE_TEMPLATES,
    default_of,
    read_chat_templates,
    read_template_file,
    render_chat_template,
)
from formats.files import optional_json, read_json, write_json
from formats.words import (
    WHITE_SPACE,
    UnsupportedStep,
    Where,
    make_normalizer,
    make_pre_tokenizer,
    prefix_of,
    steps_of,
)


def load_tokenizer(path, chat_template=None) -> "Tokenizer":
    """The tokenizer of a folder: tokenizer.json, else tokenizer.model, else vocab.json and
    merges.txt. path may also be one of these files. If tokenizer.json is of an unsupported kind,
    tokenizer.model is read instead. chat_template: a jinja file that is used in place of the
    folder's own. Raises FileNotFoundError or ValueError with the path."""
    if chat_template is not None:
        template = read_template_file(Path(chat_template))
        tokenizer = load_tokenizer(path)
        tokenizer.chat_template, tokenizer.tool_use_template = template, None
        return tokenizer
    path = Path(path)
    files = [path / "tokenizer.json", path / "tokenizer.model"] if path.is_dir() else [path]
    files = [file for file in files if file.is_file()] or [path / "vocab.json"]
    if not files[0].is_file():
        names = "tokenizer.json, vocab.json with merges.txt, or sentencepiece's tokenizer.model"
        raise FileNotFoundError(f"{path}: needs {names}: none is there")
    for file in files:
        try:
            config = optional_json(file.parent / "tokenizer_config.json")
            named = optional_json(file.parent / "special_tokens_map.json")
            # As in transformers: the older file wins where the newer one does not list the tokens.
            config = named | config if "added_tokens_decoder" in config else config | named
            if file.name in ("vocab.json", "merges.txt"):
                return BPETokenizer(file, config, _vocab_and_merges(file.parent, config))
            if file.suffix == ".json":
                return BPETokenizer(file, config, read_json(file))
            return SentencePieceTokenizer(file, config)
        except UnsupportedStep as error:
            if file == files[-1]:
                raise ValueError(f"{file}: {error} is not supported") from None
        except OSError:
            raise
        except Exception as error:  # other people's files can be broken in any way
            problem = f"{type(error).__name__}: {error!s:.300}"
            raise ValueError(f"{path}: broken tokenizer: {problem}") from None


class AddedTokens:
    """The added tokens in a text: the leftmost, then the longest.

    With lstrip or rstrip a token takes the white space on that side along; with single_word it
    counts only where no word continues beside it.
    """

    def __init__(self, tokens: list[dict]):
        """tokens: [{"content", "id", flags}]."""
        self.tokens = {token["content"]: token for token in tokens}
        flags = "lstrip", "rstrip", "single_word"
        self.plain = not any(token.get(flag) for token in tokens for flag in flags)
        # Of the branches of an alternation the first that fits is taken.
        longest_first = map(re.escape, sorted(self.tokens, key=len, reverse=True))
        self.pattern = re.compile(f"({'|'.join(longest_first) or '(?!)'})")

    def split(self, text: str) -> Iterator[str | int]:
        """The parts of a text: ids of added tokens, and the text between them."""
        if not self.tokens:
            yield text
        elif self.plain:
            for i, part in enumerate(self.pattern.split(text)):
                if part:
                    yield int(self.tokens[part]["id"]) if i % 2 else part
        else:
            yield from self._split_by_flags(text)

    def _split_by_flags(self, text: str) -> Iterator[str | int]:
        done = 0
        for m in self.pattern.finditer(text):
            token, (start, end) = self.tokens[m.group()], m.span()
            beside = text[start - 1 : start] + text[end : end + 1]
            if token.get("single_word") and re.search(r"\w", beside):
                continue
            if token.get("lstrip"):
                start = max(done, len(text[:start].rstrip(WHITE_SPACE)))
            if token.get("rstrip"):
                end = len(text) - len(text[end:].lstrip(WHITE_SPACE))
            if start > done:
                yield text[done:start]
            yield int(token["id"])
            done = end
        if done < len(text):
            yield text[done:]


class Tokenizer:
    """What all kinds share: special tokens, the start of a text, the chat template.

    A kind adds encode_text(text, where) and decode_text(ids, at_start).
    """

    class_elsewhere: str | None = None  # the tokenizer_class to write, where another one is needed
    steps_elsewhere: dict | None = None  # the steps to write into tokenizer.json, likewise
    has_prefix = False  # whether steps over bytes begin with putting a space in front of a text
    date: datetime.date | None = None  # the day that the chat template is told; None: today

    def __init__(self, file: Path, config: dict, vocab: dict, added: list[dict], defaults: dict):
        """vocab: {piece: id}. added: tokens beside it, [{"content", "id", flags}]. defaults:
        {"bos_token": id, ...} where config says nothing; where it says null, there is none."""
        more = optional_json(file.parent / "added_tokens.json").items()
        added = [{"content": text, "id": i} for text, i in more] + added
        added += [token | {"id": i} for i, token in config.get("added_tokens_decoder", {}).items()]
        added = {token["content"]: token for token in added}
        ids = vocab | {text: int(token["id"]) for text, token in added.items()}
        # bos_token, eos_token, ...: the names by which a chat template knows them
        named = {name: text for name, i in defaults.items() for text in added if ids[text] == i}
        for name, token in config.items():
            if name.endswith("_token"):
                named[name] = token["content"] if isinstance(token, dict) else token
        for name in ("bos_token", "eos_token"):
            if (text := named.get(name)) is not None and text not in ids:
                problem = f"{name} {text!r:.80} of tokenizer_config.json is not in the vocabulary"
                raise ValueError(f"{problem}; add it to the tokenizer, or name another one")
        self.special_tokens = {name: text for name, text in named.items() if text in ids}
        for text in self.special_tokens.values():
            added.setdefault(text, {"content": text, "id": ids[text]})
        self.bos_id = ids.get(self.special_tokens.get("bos_token"))
        self.eos_id = ids.get(self.special_tokens.get("eos_token"))
        for text, i in ids.items():
            if type(i) is not int or not 0 <= i < 2**31:
                raise ValueError(f"token {text!r:.80} has the id {i!r:.80}")
        "".join(ids).encode()  # raises where a token is half a surrogate pair, which has no bytes
        self.vocab_size = 1 + max(ids.values())
        templates = read_chat_templates(file.parent, config)
        self.tool_use_template = templates.get("tool_use")  # for dialogues with tools
        self.has_chat_template = bool(default_of(templates))
        self.chat_template = default_of(templates) or AUTHORS_CHAT_TEMPLATE
        self.text_of_added = {int(token["id"]): text for text, token in added.items()}
        self.added_ids = {*self.text_of_added}
        self.added = self.find_added([*added.values()])

    def tokens_from(self, n: int) -> str:
        """The tokens whose ids are n or above, as a text for people; "" where there are none."""
        named = [f"{text!r} {i}" for i, text in sorted(self.text_of_added.items()) if i >= n]
        others = max(0, self.vocab_size - n - len(named[:5]))  # more of them, or other pieces
        return ", ".join(named[:5] + ([f"{others} more"] if others else []))

    def find_added(self, tokens: list[dict]) -> AddedTokens:
        """Those that are looked for in the text as it is written."""
        return AddedTokens(tokens)

    def encode(self, text: str, bos=False, eos=False, continuation=False, after=()) -> list[int]:
        """Token ids. The text of a special token becomes its id, as in transformers.

        continuation: the text continues another one, whose ids may be given as `after`. Nothing is
        put in front of it, unless that one ends with an added token: some tokenizers (Phi-3's)
        begin a new text there, as they do where they encode both together. bos and eos have no
        effect where the tokenizer has no such token.
        """
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        where = Where.CONTINUES if continuation else Where.START
        if continuation and len(after) and int(after[-1]) in self.added_ids:
            where = Where.INSIDE
        for part in self.added.split(text):
            ids += [part] if isinstance(part, int) else self.encode_text(part, where)
            where = Where.INSIDE
        return [*ids, self.eos_id] if eos and self.eos_id is not None else ids

    def decode(self, ids) -> str:
        """The text. Special tokens are shown; only the dummy space of a text's start is removed."""
        parts = []
        for is_added, run in groupby(map(int, ids), key=self.text_of_added.__contains__):
            if is_added:
                parts += map(self.text_of_added.get, run)
            else:
                parts.append(self.decode_text(list(run), at_start=not parts))
        return "".join(parts)

    def apply_chat_template(
        self, messages: list[dict], add_generation_prompt=False, tools: list | None = None, **more
    ) -> str:
        """The text of a dialogue, by the model's own template (its `tool_use` where there are tools
        and it has one), else by that of ORPO's authors. more: what else the template is given.
        Raises ValueError where the template is broken or unsafe, or refuses the messages."""
        template = (tools and self.tool_use_template) or self.chat_template
        more = self.special_tokens | more | {"tools": tools}
        render = functools.partial(render_chat_template, template, date=self.date)
        text = render(messages, add_generation_prompt, more)
        if any(m.get("content", "") is None for m in messages):  # beside tool_calls
            with_text = [m | {"content": m.get("content") or ""} for m in messages]
            if text.count("None") > render(with_text, add_generation_prompt, more).count("None"):
                raise ValueError("the chat template writes None where a message has no content")
        return text

    def unused(self, template_kwargs: dict) -> list[str]:
        """Which of a row's chat_template_kwargs no template here mentions, in words."""
        text = self.chat_template + (self.tool_use_template or "")
        return [f"{name} of chat_template_kwargs" for name in template_kwargs if name not in text]

    @property
    def writes_date(self) -> bool:
        """Whether the chat template writes the day on which it is used."""
        return "strftime_now" in self.chat_template + (self.tool_use_template or "")

    def save_chat_template(self, folder: Path):
        """Makes these templates those of a folder of tokenizer files, and lets them begin with BOS
        as training does (data.encode_prompt): who serves a model tokenises a template's text
        without adding special tokens. Writes nothing where the folder has them already."""
        config = optional_json(folder / "tokenizer_config.json")
        found = read_chat_templates(folder, config)
        ours = {"default": self.chat_template, "tool_use": self.tool_use_template}
        kept = {name: template for name, template in found.items() if name not in ours}
        wanted = {name: self._begun_with_bos(text) for name, text in ours.items() if text}
        if found and self.chat_template == default_of(found) and "default" not in found:
            del wanted["default"]  # it only refuses
        wanted |= kept
        if wanted == found:
            return
        more = folder / MORE_TEMPLATES
        # A name comes with a download, and must not lead out of the folder.
        for name in filter(re.compile(r"\w[\w.-]*").fullmatch, wanted.keys() | found.keys()):
            file = folder / "chat_template.jinja" if name == "default" else more / f"{name}.jinja"
            if name in wanted:
                file.parent.mkdir(exist_ok=True)
                file.write_text(wanted[name], encoding="utf-8")
            else:
                file.unlink(missing_ok=True)
        if named := config.get("chat_template"):  # the only place where older readers look
            if isinstance(named, list):
                named = [{"name": name, "template": text} for name, text in wanted.items()]
            else:
                named = wanted.get("default", named)
            write_json(folder / "tokenizer_config.json", config | {"chat_template": named})

    def _begun_with_bos(self, template: str) -> str:
        bos, question = self.special_tokens.get("bos_token"), [{"role": "user", "content": "?"}]
        try:
            text = render_chat_template(template, question, True, self.special_tokens, self.date)
            says_bos = bool(bos) and text.startswith(bos)
        except ValueError:  # a template that wants other messages
            says_bos = "bos_token" in template
        return BOS_IN_FRONT + template if bos and not says_bos else template

    def save_class(self, folder: Path):
        """Has a folder of tokenizer files name a class and steps by which transformers gets our
        ids, and no code of its own, which is not handed on."""
        config = optional_json(folder / "tokenizer_config.json")
        changed = {key: value for key, value in config.items() if key != "auto_map"}
        if self.class_elsewhere is not None:  # which has no BOS and EOS of its own
            named = {name: self.special_tokens.get(name) for name in ("bos_token", "eos_token")}
            changed = {name: text for name, text in named.items() if text} | changed
            changed["tokenizer_class"] = self.class_elsewhere
        if changed.get("tokenizer_class") == "PreTrainedTokenizerFast":
            # Of this class transformers 4 would give a model token_type_ids, too.
            changed.setdefault("model_input_names", ["input_ids", "attention_mask"])
        if self.has_prefix:  # transformers 4 believes this file, and not tokenizer.json
            changed.setdefault("add_prefix_space", True)
        # transformers 5 saves a list under the first name; 4 reads lists only under the second.
        if isinstance(more := changed.get("extra_special_tokens"), list):
            del changed["extra_special_tokens"]
            changed.setdefault("additional_special_tokens", more)
        if str(changed.get("tokenizer_class")).startswith("LlamaTokenizer"):
            changed.setdefault("legacy", False)  # transformers 4 and 5 have different defaults
        if changed != config:
            write_json(folder / "tokenizer_config.json", changed)
        if self.steps_elsewhere is not None:
            file = folder / "tokenizer.json"
            write_json(file, read_json(file) | self.steps_elsewhere)

    def save_bos(self, folder: Path):
        """Has a folder of tokenizer files put BOS before a text, and nothing after it, as training
        on strings does: for whoever reads tokenizer_config.json, and for whoever reads only
        tokenizer.json."""
        config = optional_json(folder / "tokenizer_config.json")
        config |= {"add_bos_token": self.bos_id is not None, "add_eos_token": False}
        write_json(folder / "tokenizer_config.json", config)
        if (folder / "tokenizer.json").is_file():
            steps = read_json(folder / "tokenizer.json")
            steps["post_processor"] = self._post_processor()
            write_json(folder / "tokenizer.json", steps)

    def _post_processor(self) -> dict | None:
        """In the form of the tokenizers library; None where there is no BOS."""
        if self.bos_id is None:
            return None
        bos = self.special_tokens["bos_token"]
        begin = {"SpecialToken": {"id": bos, "type_id": 0}}
        text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        token = {"id": bos, "ids": [self.bos_id], "tokens": [bos]}
        return {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, other],
            "special_tokens": {bos: token},
        }

    def around_answer(self) -> tuple[str, str]:
        """What the chat template puts before an answer (Qwen3's an empty <think> block), and after
        it up to EOS (<|im_end|> for instance). ("", "") where it refuses a simple dialogue."""
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "@@"}
        try:
            prompt = self.apply_chat_template([question], add_generation_prompt=True)
            before, found, after = self.apply_chat_template([question, answer]).rpartition("@@")
        except ValueError:
            return "", ""
        if not found:  # a template without the answer
            return "", ""
        before = before.removeprefix(prompt) if before.startswith(prompt) else ""
        after = after.strip().removesuffix(self.special_tokens.get("eos_token", ""))
        return before.strip(), after.strip()

    def end_ids(self) -> list[int]:
        """The tokens that end an answer: EOS, and the special token that the chat template puts
        after an answer, if there is one: an instruct model may write only that."""
        ids = self.encode(self.around_answer()[1], continuation=True)
        ends = [self.eos_id, *(i for i in ids[:1] if i in self.added_ids)]
        return [i for i in dict.fromkeys(ends) if i is not None]


# A word with the spaces, which sentencepiece writes as ▁, and newlines in front of it.
SPACED_WORDS = re.compile("[▁ \n]*[^▁ \n]+|[▁ \n]+").findall


class SentencePieceTokenizer(Tokenizer):
    """tokenizer.model: the sentencepiece library splits the text."""

    def __init__(self, file: Path, config: dict):
        # A serialised model may be followed by bytes that override its fields, as protobuf merges
        # what comes twice. These switch off two options of the normaliser: add_dummy_prefix
        # (field 3), and for decoding remove_extra_whitespaces (field 4) as well.
        overrides = b"", b"\x1a\x02\x18\x00", b"\x1a\x04\x18\x00\x20\x00"
        try:
            self.sp, self.sp_continuation, self.sp_raw = (
                sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes() + override)
                for override in overrides
            )
        except RuntimeError:
            raise ValueError(f"{file.name}: not a sentencepiece model, or cut short") from None
        self.strips_spaces = self.sp.encode("  a") == self.sp.encode("a")
        # The library makes a new int of every id. One for all is faster to read and saves memory.
        shared = list(range(self.sp.vocab_size())).__getitem__
        encode = self.sp_continuation.encode
        self.word_ids = WordIds(lambda word: tuple(map(shared, encode(word))))
        # After a special token only old ("legacy") Llama tokenizers add the dummy space.
        self.dummy_space_at = {Where.START, *[Where.INSIDE] * bool(config.get("legacy"))}
        if config.get("add_prefix_space") is False:
            self.dummy_space_at = set()
        vocab = {self.sp.id_to_piece(i): i for i in range(self.sp.vocab_size())}
        self.splits = self._splits(vocab)
        control = {p: i for p, i in vocab.items() if self.sp.is_control(i) or self.sp.is_unknown(i)}
        added = [{"content": piece, "id": i} for piece, i in control.items()]
        names = ("bos", "eos", "unk", "pad")
        defaults = {f"{name}_token": getattr(self.sp, f"{name}_id")() for name in names}
        super().__init__(file, config, vocab, added, defaults)

    def encode_text(self, text: str, where: Where) -> list[int]:
        # The dummy space is the space that sentencepiece models put in front of a text, so that
        # its first word is the same token as elsewhere.
        dummy_space = where in self.dummy_space_at
        # Where the model removes leading spaces, the dummy space in front of a continuation
        # stands for the spaces that it begins with.
        dummy_space |= self.strips_spaces and text[0] == " "
        if not self.splits:
            return (self.sp if dummy_space else self.sp_continuation).encode(text)
        words = SPACED_WORDS(text)
        start = self.sp.encode(words.pop(0)) if dummy_space else []
        return start + self.word_ids.of(words)

    def _splits(self, vocab: dict) -> bool:
        """Whether words may be encoded one by one, and so each once: no piece reaches over the
        space or newline in front of a word, and neither does anything else in the library."""
        if self.strips_spaces or "<0x0A>" not in vocab:  # runs of unknown characters are joined
            return False
        ids = range(self.sp.vocab_size())
        by_rank = all(self.sp.get_score(i).is_integer() for i in ids)  # else Unigram's sums
        return by_rank and not any(re.search("[^▁\n][▁\n]", piece) for piece in vocab)

    def decode_text(self, ids: list[int], at_start: bool) -> str:
        # A padded embedding matrix has more rows than the vocabulary has pieces.
        ids = [i for i in ids if 0 <= i < self.sp.vocab_size()]
        # Only the library knows which of a text's first spaces is the dummy one.
        return (self.sp if at_start else self.sp_raw).decode(ids)


class BPETokenizer(Tokenizer):
    """tokenizer.json: added tokens, normalizer, pre_tokenizer, model and decoder. Its
    post_processor is not used: encode_prompt of data.py says where BOS goes."""

    def __init__(self, file: Path, config: dict, spec: dict):
        # GPT-2's tokenizer_config.json names no special tokens, but the model's has their ids.
        ids = optional_json(file.parent / "config.json")
        self._set_steps(config, spec, ids.get("model_type"))
        defaults = {name: ids.get(f"{name}_id") for name in ("bos_token", "eos_token")}
        # These have no BOS of their own, and config.json may have LlamaConfig's default. (A folder
        # that says add_bos_token is of a run that was trained with one.)
        bare = config.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
        if bare and not config.get("add_bos_token"):
            del defaults["bos_token"]
        vocab = self.model.vocab
        super().__init__(file, config, vocab, spec.get("added_tokens") or [], defaults)
        if not self.model.over_bytes:  # an added token is decoded like any piece: its ▁ is a space
            normalized = {int(t["id"]): text for text, t in self.normalized_added.tokens.items()}
            self.model.pieces |= self.text_of_added | normalized
            self.text_of_added = {}

    def _set_steps(self, config: dict, spec: dict, model_type: str | None):
        """Sets what happens to a text before the merges, the model, and whether decoding removes
        the space in front."""
        parts = ("normalizer", "pre_tokenizer", "decoder")
        normalizer, pre_tokenizer, decoder = (steps_of(spec, part) for part in parts)
        kinds = [step["type"] for step in decoder]
        over_bytes = kinds == ["ByteLevel"]
        self.model = BPE(spec["model"], over_bytes, joins_bytes="ByteFallback" in kinds)
        if over_bytes != any(step["type"] == "ByteLevel" for step in pre_tokenizer):
            raise UnsupportedStep("a decoder of another kind than the pre_tokenizer")
        sentencepiece_like = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
        if not over_bytes and not (kinds and {*kinds} <= sentencepiece_like):
            raise UnsupportedStep(f"a decoder of {', '.join(kinds) or 'no steps'}")
        if over_bytes and pre_tokenizer[-1]["type"] != "ByteLevel":
            raise UnsupportedStep("a pre_tokenizer with a step after ByteLevel")
        self.strips = bool({"Strip", "Metaspace"} & {*kinds})
        self.class_elsewhere = class_elsewhere(config, normalizer, pre_tokenizer)
        # transformers 5 builds a LlamaTokenizer anew, by `legacy`, whatever the file says, except
        # for models whose tokenizer.json it reads as it is. transformers 4 takes the file's steps.
        llama = str(config.get("tokenizer_class")).startswith("LlamaTokenizer") and not over_bytes
        self.anew = llama and not self.class_elsewhere and model_type not in READ_AS_THEY_ARE
        if self.anew:
            scheme = "always" if config.get("legacy") else "first"
            normalizer, pre_tokenizer = [], [METASPACE | {"prepend_scheme": scheme}]
        asked = config.get("add_prefix_space")
        if asked is not None:
            normalizer, pre_tokenizer = with_prefix(asked, normalizer, pre_tokenizer)
        if self.anew:
            self.steps_elsewhere = {"normalizer": None, "pre_tokenizer": pre_tokenizer[0]}
        self.has_prefix = over_bytes and bool(pre_tokenizer[0].get("add_prefix_space"))
        self.normalize = make_normalizer(normalizer)
        self.words = make_pre_tokenizer(pre_tokenizer)
        # Where a whole text is one word, and no merge reaches over a space, splitting in front of
        # spaces changes nothing, and words that occur again can be cached.
        inside = any("▁" in (a + b).lstrip("▁") for a, b in self.model.ranks)
        self.resplit = not (over_bytes or self.model.ignore_merges or inside)

    def find_added(self, tokens: list[dict]) -> AddedTokens:
        """Without those that are looked for in the normalized text, as they are normalized."""
        raw, normalized = [], []
        for token in tokens:
            if token.get("normalized") and not self.anew:
                content = self.normalize(token["content"], Where.INSIDE)
                normalized.append(token | {"content": content})
            else:
                raw.append(token)
        self.normalized_added = AddedTokens(normalized)
        return AddedTokens(raw)

    def encode_text(self, text: str, where: Where) -> list[int]:
        ids = []
        for part in self.normalized_added.split(self.normalize(text, where)):
            if isinstance(part, int):
                ids.append(part)
            else:
                words = self.words(part, where)
                if self.resplit:
                    words = chain.from_iterable(map(SPACES_AND_WORD, words))
                ids += self.model.word_ids.of(words)
            where = Where.INSIDE
        return ids

    def decode_text(self, ids: list[int], at_start: bool) -> str:
        text = self.model.text_of(ids)
        return text.removeprefix(" ") if at_start and self.strips else text


METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
READ_AS_THEY_ARE = ("mistral", "phi3", "olmo2")  # tokenizers of these models, by transformers 5
SPACES_AND_WORD = re.compile("▁*[^▁]+|▁+").findall


def class_elsewhere(config: dict, normalizer: list[dict], pre_tokenizer: list[dict]) -> str | None:
    """The tokenizer_class by which transformers reads the same file as it is; None: its own does.

    transformers 5 builds the classes below by their own steps, whatever steps the file has. A
    TokenizersBackend is unknown to transformers 4, where a CodeGenTokenizer refuses add_bos_token.
    """
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    steps = [step["type"] for step in (*normalizer, *pre_tokenizer)]
    patterns = [step["pattern"].get("Regex") for step in pre_tokenizer if "pattern" in step]
    marks = [step for step in pre_tokenizer if step["type"] == "Metaspace"]
    has_prefix = "Prepend" in steps or any(prefix_of(step) != "never" for step in marks)
    alike = {
        "GPT2Tokenizer": steps == ["ByteLevel"] and not pre_tokenizer[0].get("add_prefix_space"),
        "Qwen2Tokenizer": steps == ["NFC", "Split", "ByteLevel"] and patterns == [QWEN2_WORDS],
        # Of byte-level files 5.0 to 5.15 made a LlamaTokenizer over characters (#45488, #48206).
        "LlamaTokenizer": has_prefix and {*steps} <= {"Prepend", "Replace", "Metaspace"},
        "CodeLlamaTokenizer": False,
        "CodeGenTokenizer": False,
        "GemmaTokenizer": steps in (["Replace", "Split"], ["Replace"]),
        "TokenizersBackend": False,
    }
    if kind == "CodeGenTokenizer" and alike["GPT2Tokenizer"]:
        return "GPT2Tokenizer"
    return None if alike.get(kind, True) else "PreTrainedTokenizerFast"


def with_prefix(asked: bool, normalizer: list[dict], pre_tokenizer: list[dict]):
    """Both lists of steps, as add_prefix_space of tokenizer_config.json wants them."""
    if not asked:
        normalizer = [step for step in normalizer if step["type"] != "Prepend"]
    changed = []
    for step in pre_tokenizer:
        if step["type"] == "Metaspace" and not asked:
            step = step | {"prepend_scheme": "never"}
        if step["type"] == "ByteLevel" and step.get("add_prefix_space", True) != asked:
            if len(pre_tokenizer) > 1:  # transformers ignores the flag there
                raise UnsupportedStep(
                    f"add_prefix_space {asked} of tokenizer_config.json, which tokenizer.json "
                    "contradicts,"
                )
            step = step | {"add_prefix_space": asked}
        changed.append(step)
    return normalizer, changed


QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _vocab_and_merges(folder: Path, config: dict) -> dict:
    """GPT-2's older pair of files (and Qwen2's) in the form of a tokenizer.json."""
    kind = str(config.get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast")
    if kind not in ("GPT2Tokenizer", "CodeGenTokenizer", "Qwen2Tokenizer"):
        raise UnsupportedStep(f"tokenizer_class {kind!r:.80}")
    vocab, file = optional_json(folder / "vocab.json"), folder / "merges.txt"
    if not vocab or not file.is_file():
        raise FileNotFoundError(f"{folder}: vocab.json and merges.txt go together; one is missing")
    merges = file.read_text(encoding="utf-8").splitlines()
    special, qwen2 = "<|endoftext|>", kind == "Qwen2Tokenizer"
    split = {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated"}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": not qwen2}
    return {
        "model": {"vocab": vocab, "merges": [m for m in merges if m and m[:8] != "#version"]},
        "normalizer": {"type": "NFC"} if qwen2 else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, to_bytes] if qwen2 else [to_bytes],
        },
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"content": special, "id": vocab[special]}] if special in vocab else [],
    }
