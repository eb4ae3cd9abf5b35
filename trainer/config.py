"""What a run file may say: every key with its meaning. An unknown one is refused."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from teachers.ray_options import ServeOptions

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


class LoraConfig(Section):
    """[student.lora] train low-rank adapters instead of the weights; they are merged into them on export."""

    rank: Positive = 16
    """Rank of every adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Adapters are scaled by alpha / rank."""
    dropout: Share = 0.0
    """Share of an adapter's inputs that is dropped in training."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get one, as peft has them; all-linear leaves out the head."""


class StudentConfig(Section):
    """[student] the model that learns."""

    model: str
    """A Hugging Face directory, or the name of one under $TUTELAGE_CACHE/models."""
    device: str = "cpu"
    """Where it trains: cpu, cuda, cuda:1, … ; with several processes cuda is each one's own."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 computes products in bf16 over float32 weights (frozen matrices that bf16 holds exactly are kept in it), and
    with several processes norms and sums in a layer too; fp32 computes in float32 throughout."""
    activation_checkpointing: bool = False
    """Keep only each layer's input and compute the layer again in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Compile each layer with torch.compile."""
    train_layers: Positive | None = None
    """Train only this many of the uppermost layers (and the final norm); all parameters if absent."""
    lora: LoraConfig | None = None
    """[student.lora] train adapters instead."""
    roles: Roles = {}
    """Special tokens by role (bos, eos, end_of_turn, pad, unk), as spelled, where the tokenizer's word is wrong."""
    chat_template: str | None = None
    """File with the template of its chats, in place of the model's own."""


class SourceConfig(Section):
    """[[data.sources]] texts or chats of one kind: files, or a Hugging Face dataset."""

    name: str | None = None
    """The domain of its documents where no column says one; if absent, the name of the file or dataset."""
    files: list[str] = []
    """Text files (a document each), .jsonl (a document a line) or .parquet (a document a row), by path, by pattern
    ("shards/*.jsonl", in the order of their names) or by name under $TUTELAGE_CACHE/data."""
    dataset: str | None = None
    """In place of files: a folder that `save_to_disk` wrote, by path or name under $TUTELAGE_CACHE/data, or a dataset
    of the Hugging Face hub."""
    config_name: str | None = None
    """Which configuration of a dataset of the hub."""
    split: str | None = None
    """Which split of the dataset; needed where there are several."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often its windows come in an epoch: 2 is twice; 0.5 is half of them, and the other half in the next epoch."""
    text_column: str = "text"
    """Column (in a .jsonl line, key) of the text."""
    messages_column: str | None = None
    """Column of a list of messages: then each document is a chat, and its assistant texts are supervised."""
    domain_column: str | None = None
    """Column of the domain, for `adaptive`."""
    teacher_column: str | None = None
    """Column of the teacher's name, for `router`."""

    @model_validator(mode="after")
    def _check(self) -> "SourceConfig":
        if bool(self.files) == bool(self.dataset):
            raise ValueError("expected either files or a dataset")
        if self.files and (self.config_name or self.split):
            raise ValueError("config_name and split belong to a dataset, and here are files")
        return self


class DataConfig(Section):
    """[data] the texts, and the windows of them that all models see."""

    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    """[[data.sources]] where the texts and chats come from."""
    max_broken: Annotated[int, Field(ge=0)] = 0
    """Lines and rows that cannot be read are counted and named; more than this many, over all sources, end the run."""
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

    @property
    def has_chats(self) -> bool:
        return any(source.messages_column is not None for source in self.sources)

    @property
    def names_teachers(self) -> bool:
        """Whether every document has a column that names its teacher."""
        return all(source.teacher_column is not None for source in self.sources)


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
    """Folder with its tokenizer.json, for a plain vLLM server, which hands out none; for no other."""
    top_k: Positive = 64
    """Candidates asked for at every position."""
    match: Literal["chain", "em", "min_ed", "spans", "sorted"] = "chain"
    """chain: it is fused, its tokens translated by byte chains; em, min_ed: fused too, aligned as FuseLLM aligns, for
    comparison; spans, sorted: it has a part of the loss of its own, which matches the likelihoods of what both
    tokenizations cut out (ALM), or how the probability is spread (ULD)."""
    weight: Weight = 1.0
    """What its part in a fusion, or of the loss, is multiplied by, relative to the other teachers."""
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
    """Most questions that a rank has under way at once, per replica; how many pay is found out as the run goes on."""
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

    @property
    def is_fused(self) -> bool:
        """Whether what it says becomes a target over the student's tokens."""
        return self.match in ("chain", "em", "min_ed")


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
    """[loss] λ · cross-entropy + (1 − λ) · divergence from the fused target and from teachers that are not fused."""

    ce_weight: Share = 0.3
    """λ: 1 trains on the text alone, 0 on the teachers alone. FuseLLM has 0.9; what paid is in docs/quality.md."""
    final_ce_weight: Share | None = None
    """λ at the end of the run, where `schedule` moves; `ce_weight` if absent."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How λ moves from `ce_weight` to `final_ce_weight` over the run's steps."""
    divergence: Literal[
        "forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation"
    ] = "forward_kl"
    """forward_kl: KL(target ‖ student), be wherever the teachers are; reverse_kl: be nowhere else; the others lie
    between and are bounded. All take the tail as one bucket on both sides."""
    mix: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share in the mixtures of jensen_shannon (of the target; 0.5 if absent) and of skew_* (of the own side; 0.1)."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of target and student in the divergence; other than 1 it costs a second pass over the vocabulary. Over top-k the
    target's tail is taken as spread evenly over all tokens that are not listed: above 1 that makes it too heavy, so
    keep near 1 unless the listed mass is high."""
    span_temperature: Annotated[float, Field(gt=0)] = 100.0
    """τ of teachers matched by spans: likelihoods are compared as p^(1/τ). At 1 an unlikely span teaches little."""
    chunk_tokens: Positive = 512
    """Positions whose logits exist at once; more where spans of teachers overlap over more."""

    @property
    def last_ce_weight(self) -> float:
        return self.ce_weight if self.final_ce_weight is None else self.final_ce_weight


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
    """Times every sample is seen, of sources of weight 1."""
    steps: Positive | None = None
    """Stop after this many steps even if epochs remain; the learning rate decays over the shorter of both."""
    batch_samples: Positive = 8
    """Samples in one step."""
    accumulate: Positive = 1
    """Forward passes that one step of each process is split into; no more than it has samples."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides the order of samples and the held-out documents."""
    deterministic: bool = False
    """Let torch use only operations that give the same bits every time, and refuse those that cannot. Without it a run
    that is resumed on a GPU may differ by rounding; on a CPU it does not."""
    prefetch_tokens: Positive = 1 << 16
    """Most tokens of the student under way ahead of the step, of each rank: read, asked for, aligned, fused or waiting.
    A sample counts as a whole window until it is read. The next step's batch is always under way, however long: a
    longer one follows it only when the step has taken it. 65,536 hide a teacher that answers after 3 s from a student
    of 20,000 tokens/s."""
    prefetch_bytes: Positive = 1 << 30
    """Most memory of their answers and targets, of each rank, with the same exception. What has not come yet counts as
    20 bytes a candidate: 65,536 tokens at K = 64 take 84 MB a teacher, and 1 GiB holds those of twelve."""
    target_cache_bytes: Annotated[int, Field(ge=0)] = 1 << 30
    """Memory for targets of samples that come again in a later epoch; never on disk."""


class EvalConfig(Section):
    """[eval] bits per byte on text that is never trained on, and agreement with the teachers there."""

    held_out_documents: Annotated[int, Field(ge=0)] = 0
    """Documents set aside, drawn by the seed."""
    every_steps: Positive | None = None
    """Measure this often; always before the first and after the last step."""
    max_samples: Positive | None = None
    """Measure on only this many windows."""
    agreement_samples: Annotated[int, Field(ge=0)] = 0
    """On this many of them, spread evenly, measure too how far the student agrees with each teacher and with the fused
    target: the same likeliest token, and KL(target ‖ student). Asked once; the answers stay in memory."""
    stop_after: Positive | None = None
    """End the run once so many measurements in a row were no better than the best before them."""
    stop_margin: Annotated[float, Field(ge=0)] = 0.0
    """What is better by no more than this, in bits per byte, is not better for stop_after."""


class OutputConfig(Section):
    """[output] where a run writes: metrics.jsonl, checkpoints/, model/."""

    dir: str
    """The run's folder."""
    checkpoint_every_steps: Positive | None = None
    """Save this often; always after the last step."""
    keep_checkpoints: Positive = 2
    """Older ones are deleted."""
    export: Literal["last", "best"] = "last"
    """Which weights model/ holds: those after the last step, or those that were best on held-out text, written
    whenever they are measured (before the first step too)."""


class TrackingConfig(Section):
    """[tracking] where events go beside metrics.jsonl, which is always written and holds everything."""

    tensorboard: bool = False
    """Event files in the folder `tensorboard` of the run's. Needs the extra tensorboard."""
    wandb: Annotated[str, Field(min_length=1)] | None = None
    """Project at Weights & Biases; entity, key and mode by its own environment variables. Needs the extra wandb."""
    mlflow: Annotated[str, Field(min_length=1)] | None = None
    """Experiment in MLflow, at MLFLOW_TRACKING_URI, else in the run's folder `mlflow`. Needs the extra mlflow."""


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

    @property
    def patience_s(self) -> float:
        """The longest that a teacher may be away."""
        return max((teacher.patience_s for teacher in self.teachers), default=0.0)

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.student.lora and self.student.train_layers:
            raise ValueError("student.lora: adapters leave all weights as they are; leave student.train_layers out")
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError("teachers: two teachers have the same name")
        for weights in ([t.weight for t in self.teachers], [t.last_weight for t in self.teachers]):
            if self.teachers and not any(weights):
                raise ValueError("teachers: the weights are all 0, expected one above it")
        if len(self.teachers) > MOST_TEACHERS:
            raise ValueError(f"teachers: expected at most {MOST_TEACHERS}")
        for_texts = [f"teacher {t.name} is matched by {t.match}" for t in self.teachers if t.match != "chain"]
        if for_texts and self.data.has_chats:
            raise ValueError(f"teachers: {for_texts[0]}, which is for texts; chats are matched by chain")
        unfused = [f"teacher {t.name} is matched by {t.match}" for t in self.teachers if not t.is_fused]
        if unfused and self.fusion.method == "router":
            raise ValueError(f"teachers: {unfused[0]}; fusion by router needs a target from each of them")
        if self.fusion.method == "router" and not self.data.names_teachers:
            raise ValueError("data.sources: fusion by router needs the teacher_column of every source")
        if self.data.close_documents and all(source.messages_column for source in self.data.sources):
            raise ValueError("data.close_documents: a chat ends as its template says; leave it out")
        if not self.teachers and min(self.loss.ce_weight, self.loss.last_ce_weight) < 1:
            key = "ce_weight" if self.loss.ce_weight < 1 else "final_ce_weight"
            raise ValueError(f"loss.{key}: without teachers there is only the text to learn from; set it to 1")
        if self.loss.final_ce_weight is not None and self.loss.schedule == "constant":
            raise ValueError("loss.final_ce_weight: give a loss.schedule, linear or cosine, that moves there")
        measured = {
            "eval.agreement_samples": self.eval.agreement_samples,
            "eval.stop_after": self.eval.stop_after,
            'output.export = "best"': self.output.export == "best",
        }
        if any(measured.values()) and not self.eval.held_out_documents:
            key = next(key for key, wanted in measured.items() if wanted)
            raise ValueError(f"{key}: nothing is held out to measure on; set eval.held_out_documents")
        if self.eval.stop_after and self.eval.every_steps is None:
            raise ValueError("eval.stop_after counts measurements on the way; set eval.every_steps")
        if self.train.batch_samples % self.train.accumulate:
            raise ValueError("train.accumulate: must divide train.batch_samples")
        return self
