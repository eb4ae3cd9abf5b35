"""The run file: TOML in, frozen models out. Every key is here with its meaning; an unknown one is refused."""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from teachers.models import cache_dir as cache_dir
from teachers.serve_options import ServeOptions
from trainer.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
ROLES = ("bos", "eos", "end_of_turn", "pad", "unk")


MOST_TEACHERS = 16


def _known_roles(roles: dict[str, str]) -> dict[str, str]:
    for role in roles:
        if role not in ROLES:
            raise ValueError(f"there is no role {role!r}; the roles are {', '.join(ROLES)}")
    return roles


Roles = Annotated[dict[str, str], AfterValidator(_known_roles)]


class Section(BaseModel):
    """Base of all sections: frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class StudentConfig(Section):
    """[student] the model that learns."""

    model: str
    """A Hugging Face directory, or the name of one under $TUTELAGE_CACHE/models."""
    device: str = "cpu"
    """Where it trains: cpu, cuda, cuda:1, …"""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 autocasts over float32 weights; fp32 computes in float32 throughout."""
    train_layers: Positive | None = None
    """Train only this many of the uppermost layers (and the final norm); all parameters if absent."""
    roles: Roles = {}
    """Special tokens by role (bos, eos, end_of_turn, pad, unk), as spelled, where the tokenizer's word is wrong."""
    chat_template: str | None = None
    """File with the template of its chats, in place of the model's own."""


class DataConfig(Section):
    """[data] the texts, and the windows of them that all models see."""

    files: Annotated[list[str], Field(min_length=1)]
    """Text files (a document each) or .jsonl files (a document a line), by path or name under $TUTELAGE_CACHE/data."""
    text_column: str = "text"
    """Key of the document in a .jsonl line."""
    messages_column: str | None = None
    """Key of a list of messages in a .jsonl line: then every line is a chat, and its assistant texts are supervised."""
    domain_column: str | None = None
    """Key of the domain in a .jsonl line, for `adaptive`; without it the file's name is the domain."""
    teacher_column: str | None = None
    """Key of the teacher's name in a .jsonl line, for `router`."""
    window_tokens: Annotated[int, Field(ge=2)] = 512
    """Longest window, in tokens of the student, BOS not counted."""
    max_windows_per_document: Positive | None = None
    """Use only the first windows of each document."""
    max_samples: Positive | None = None
    """Train on only this many windows, drawn by the seed."""
    close_documents: bool = False
    """Put EOS behind the last window of each document, on every side."""
    too_long: Literal["refuse", "shorten"] = "refuse"
    """A sample that a model cannot take whole: end the run with its name, or shorten it for all models alike."""
    broken_chats: Literal["refuse", "skip"] = "refuse"
    """A chat whose supervised spans cannot be found in every model's rendering: end the run, or skip and count it."""


class TeacherConfig(Section):
    """[[teachers]] a source model, served by one or more replicas. None at all is plain training."""

    name: Annotated[str, Field(min_length=1)]
    """How metrics and errors call it."""
    urls: list[str] = []
    """Base address of each replica; dns+http://NAME:PORT stands for every address that the name has at the moment."""
    urls_file: str | None = None
    """File with more of them, one a line, that is read again while the run goes on."""
    key_env: str | None = None
    """Environment variable that holds its bearer key."""
    key_file: str | None = None
    """File that holds its bearer key."""
    ca_file: str | None = None
    """Certificates to trust for https, where the system's are not enough."""
    tokenizer: str | None = None
    """Folder with its tokenizer.json, for a plain vLLM server, which hands out none."""
    top_k: Positive = 64
    """Candidates asked for at every position."""
    weight: Weight = 1.0
    """What its part in a fusion is multiplied by, relative to the other teachers."""
    final_weight: Weight | None = None
    """The same at the end of the run, where fusion.schedule moves; `weight` if absent."""
    roles: Roles = {}
    """Special tokens by role (bos, eos, end_of_turn, pad, unk), as spelled, where its tokenizer's word is wrong."""
    chat_template: str | None = None
    """File with the template of its chats, in place of its own."""
    timeout_s: Seconds = 120.0
    """Total time for one answer."""
    patience_s: Seconds = 600.0
    """How long no replica may answer before the teacher is lost."""
    on_loss: Literal["wait", "drop", "stop"] = "wait"
    """A teacher that is lost: `wait` ends the run once patience_s is over, `drop` goes on without it until it is back,
    `stop` ends the run as soon as no replica is left."""
    concurrency: Positive = 32
    """Most questions under way at once, per replica; how many pay is found out while the run goes on."""
    serve: ServeOptions | None = None
    """[teachers.serve] how `tutelage serve` runs it on Ray Serve; its address is then http://HOST:PORT/NAME."""

    @model_validator(mode="after")
    def _check(self) -> "TeacherConfig":
        if not self.urls and self.urls_file is None:
            raise ValueError("urls: expected at least one address, or a urls_file that lists them")
        return self

    @property
    def last_weight(self) -> float:
        return self.weight if self.final_weight is None else self.final_weight


class FusionConfig(Section):
    """[fusion] how several teachers become one target."""

    method: Literal[
        "mean", "geometric", "min_ce", "avg_ce", "confidence", "adaptive", "router", "fusellm_min_ce", "fusellm_avg_ce"
    ] = "mean"
    """mean and geometric: of probabilities and of their logarithms; min_ce, avg_ce: the teacher that predicts the text
    best, or all by how well they do; confidence: by low entropy; adaptive: a mean by running bits per byte in each
    domain; router: the teacher that a column names; fusellm_*: the paper's own two, for comparison."""
    scope: Literal["token", "sample", "batch"] = "sample"
    """Over what min_ce, avg_ce and confidence compare."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the softmax that turns bits per byte (avg_ce, adaptive) or nats of entropy (confidence) into weights."""
    top_k: Positive = 64
    """Entries kept in a fused row; the rest joins the tail."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How weights move from `weight` to `final_weight` over the run's steps."""
    half_life_bytes: Annotated[float, Field(gt=0)] = 1e6
    """adaptive: text of a domain counts half as much once so much more of it has been seen."""
    margin_bpb: Annotated[float, Field(ge=0)] = 0.1
    """adaptive: a teacher this far behind the best of a domain, in bits per byte, is not fused there."""


class LossConfig(Section):
    """[loss] ce_weight · cross-entropy + (1 − ce_weight) · forward KL."""

    ce_weight: Share = 0.9
    """λ: 1 trains on the text alone, 0 on the teachers alone."""
    chunk_tokens: Positive = 256
    """Positions whose logits exist at once."""


class OptimConfig(Section):
    """[optim] AdamW with linear warm-up and cosine decay."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    min_lr_ratio: Share = 0.1
    """Last learning rate, relative to the peak."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay, on matrices only."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's decay of first and second moments."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest gradient norm."""


class TrainConfig(Section):
    """[train] batches, order and the queue in front of the step."""

    epochs: Positive = 1
    """Times every sample is seen."""
    steps: Positive | None = None
    """Stop after this many steps even if epochs remain; the learning rate decays over the shorter of both."""
    batch_samples: Positive = 8
    """Samples in one step."""
    accumulate: Positive = 1
    """Forward passes that one step is split into."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides the order of samples and the held-out documents."""
    prefetch_batches: Positive = 4
    """Batches under way ahead of the step: asked for, aligned, fused. Two more may be done and waiting."""
    target_cache_bytes: Annotated[int, Field(ge=0)] = 1 << 30
    """Memory for targets of samples that come again in a later epoch; never on disk."""


class EvalConfig(Section):
    """[eval] bits per byte on text that is never trained on."""

    held_out_documents: Annotated[int, Field(ge=0)] = 0
    """Documents set aside, drawn by the seed."""
    every_steps: Positive | None = None
    """Measure this often; always before the first and after the last step."""
    max_samples: Positive | None = None
    """Measure on only this many windows."""


class OutputConfig(Section):
    """[output] where a run writes: metrics.jsonl, checkpoints/, model/."""

    dir: str
    """The run's folder."""
    checkpoint_every_steps: Positive | None = None
    """Save this often; always after the last step."""
    keep_checkpoints: Positive = 2
    """Older ones are deleted."""


class TrackingConfig(Section):
    """[tracking] where events go beside metrics.jsonl, which is always written and holds everything."""

    tensorboard: bool = False
    """Event files in the folder `tensorboard` of the run's. Needs the extra tutelage[tensorboard]."""
    wandb: Annotated[str, Field(min_length=1)] | None = None
    """Project at Weights & Biases; entity, key and mode by its own environment variables. Needs tutelage[wandb]."""
    mlflow: Annotated[str, Field(min_length=1)] | None = None
    """Experiment in MLflow, at MLFLOW_TRACKING_URI, else in the run's folder `mlflow`. Needs tutelage[mlflow]."""


class RunConfig(Section):
    """A whole run file."""

    student: StudentConfig
    data: DataConfig
    teachers: list[TeacherConfig] = []
    fusion: FusionConfig = FusionConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    output: OutputConfig
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError("teachers: two teachers have the same name")
        for weights in ([t.weight for t in self.teachers], [t.last_weight for t in self.teachers]):
            if self.teachers and not any(weights):
                raise ValueError("teachers: the weights are all 0, expected one above it")
        if len(self.teachers) > MOST_TEACHERS:
            raise ValueError(f"teachers: expected at most {MOST_TEACHERS}")
        if self.fusion.method == "router" and self.data.teacher_column is None:
            raise ValueError("data.teacher_column: fusion by router needs the column that names the teacher")
        if self.data.messages_column is not None and self.data.close_documents:
            raise ValueError("data.close_documents: a chat ends as its template says; leave it out")
        if not self.teachers and self.loss.ce_weight != 1:
            raise ValueError("loss.ce_weight: without teachers there is only the text to learn from; set it to 1")
        if self.train.batch_samples % self.train.accumulate:
            raise ValueError("train.accumulate: must divide train.batch_samples")
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file and apply `key=value` overrides. Raises ConfigError naming key, value and choices."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the run file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    for override in overrides:
        _override(raw, override)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_sentence(error)}") from error


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set expects key=value, received {text!r}")
    node: Any = raw
    *path, last = key.strip().split(".")
    try:
        for part in path:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = _value(value.strip())
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"--set {key}: there is no such place in the run file") from error


def _value(text: str) -> Any:
    """A TOML value; anything that is not one is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _sentence(error: ValidationError) -> str:
    errors = error.errors()
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])  # a misspelt key explains the rest
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{where} is missing"
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        near = difflib.get_close_matches(key, _known_keys(first["loc"][:-1]), n=1, cutoff=0.0)
        return f"unknown key {where!r}; the nearest known one is {near[0]!r}"
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}, received {first['input']!r}" if where else message


def _known_keys(path: tuple[int | str, ...]) -> list[str]:
    model: Any = RunConfig
    for part in path:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            model = next((a for a in getattr(annotation, "__args__", ()) if hasattr(a, "model_fields")), annotation)
    return list(model.model_fields)


def tables_dir() -> Path:
    """Where alignment keeps what it makes once per pair of tokenizers."""
    return cache_dir() / "alignment"


def find_model(name: str) -> Path:
    """A model directory by path, or by name under the cache. Raises ConfigError if there is neither."""
    return _find(name, "models", "a model directory", "config.json")


def find_tokenizer(name: str) -> Path:
    """A folder with a tokenizer by path, or a model by name under the cache. Raises ConfigError if there is neither."""
    return _find(name, "models", "a folder with a tokenizer", "tokenizer.json")


def find_data(name: str) -> Path:
    """A text file by path, or by name under the cache. Raises ConfigError if there is neither."""
    return _find(name, "data", "a file", "")


def _find(name: str, kind: str, what: str, must_hold: str) -> Path:
    candidates = [Path(name).expanduser(), cache_dir() / kind / name]
    for path in candidates:
        if path.exists() and (path / must_hold).exists():
            return path
    hint = "; `tutelage demo --prepare` makes what the demo needs" if "/" not in name else ""
    raise ConfigError(f"{name} is neither {what} nor a name in {cache_dir() / kind}{hint}")
