"""The sections of a config, one frozen dataclass each; a field's default is written here and nowhere else."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture."""

    name: str  # in logs, tables and folders: letters, digits, '.', '_' and '-'
    uri: str  # as data.source
    weight: float = 1.0  # its part of the training tokens, as `data.alpha` says; 0 leaves it out of training
    language: str = ""  # one of model.languages; of pairs two, as "en,de"; empty: its text is shown without a language


@dataclasses.dataclass(frozen=True)
class FiltersConfig:
    """Which documents preparation leaves out; 0 (and no languages) switches a rule off. "Gopher" is its rule's limit.

    Source: Rae et al. 2021, arXiv:2112.11446, appendix A.1 (Gopher). A Han character or kana counts as a word.
    """

    min_words: int = 0  # Gopher: 50
    max_words: int = 0  # Gopher: 100_000
    min_word_length: float = 0.0  # mean, in characters; Gopher: 3
    max_word_length: float = 0.0  # Gopher: 10
    min_lettered_words: float = 0.0  # share of the words that have a letter; Gopher: 0.8
    min_letters: float = 0.0  # share of the characters, spaces not counted
    max_digits: float = 0.0  # likewise
    max_symbols: float = 0.0  # hashes, or ellipses, for each word; Gopher: 0.1
    max_bullet_lines: float = 0.0  # share of the lines that begin with a bullet point; Gopher: 0.9
    max_ellipsis_lines: float = 0.0  # that end in an ellipsis; Gopher: 0.3
    max_repeated_lines: float = 0.0  # that repeat an earlier line of the document; Gopher: 0.3
    languages: tuple[str, ...] = ()  # ISO 639-1 codes of those that are kept, of a document's first 2,000 characters
    min_language_probability: float = 0.0  # of the language that is the most probable one
    near_duplicates: float = 0.0  # Jaccard similarity of word n-grams from which only one of two documents is kept
    ngram_words: int = 5
    minhashes: int = 128  # by which it is estimated


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it is split and packed. All but weights and alpha decide a prepared corpus's identity.

    A mixture draws its training tokens from a source in proportion to weight · tokens^alpha.
    """

    source: str = "builtin:python_docs"  # URI: builtin:, files:, pairs:, tfds:, hf:
    sources: tuple[SourceConfig, ...] = ()  # in the place of `source`: several, each with its own held-out split
    alpha: float = 0.0  # 0: weights are shares; XLM-R: 0.3; 1: every source as often as its weight says, as epochs
    validation_fraction: float = 0.01  # share of documents held out, chosen by the hash of their text
    deduplicate: bool = True  # drop exact repetitions of a document
    max_segments: int = 16  # documents (or parts of one) that may share a row
    max_words: int = 0  # the training split, or each source's, takes no more documents than have so many words; 0: all
    filters: FiltersConfig = FiltersConfig()  # of documents, before anything else sees them
    image_resize: str = "pad"  # pad (with white) | crop (the middle) | stretch: how an image becomes a square


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Trained by `prepare`, or an existing model file (pretrained)."""

    algorithm: str = "unigram"  # unigram | bpe (SentencePiece's) | characters | regex | code | pretrained
    pattern: str = ""  # for regex: a token is what it matches, as the expression for SMILES in configs/chem_mini.py
    path: str = ""  # for pretrained: a SentencePiece .model or a tokenizer.json
    vocab_size: int = 8192  # at most so many for characters and regex; a pretrained tokenizer brings its own
    character_coverage: float = 0.9995  # of unigram and bpe, as the next
    byte_fallback: bool = True
    lowercase: bool = False
    sample_megabytes: float = 10.0  # text that the tokenizer is trained on, sampled over the whole source
    sample_alpha: float = 0.3  # of a mixture: a source's part of that sample is in proportion to bytes^alpha


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The encoder's architecture. The vocabulary may exceed the tokenizer's (padding to a multiple of 128)."""

    vocab_size: int = 8192
    num_layers: int = 4
    embed_dim: int = 256
    table_dim: int = 0  # width of the embedding tables, projected to embed_dim (ELECTRA-small: 128); 0: embed_dim itself
    num_heads: int = 4
    mlp_dim: int = 1024
    max_positions: int = 512
    position_offset: int = 0  # RoBERTa: 2, its tables start after the padding id
    num_token_types: int = 0  # BERT: 2; 0 leaves the table out
    languages: tuple[str, ...] = ()  # each has an embedding that its text is shown with (XLM); none leaves the table out
    positions: str = "learned"  # learned (a table) | rope | alibi
    rope_base: float = 10_000.0  # of layers that see all of a segment; a stage may change it
    local_rope_base: float = 10_000.0  # of local layers
    local_window: int = 0  # tokens that a local layer sees to either side; 0: every layer sees all of a segment
    global_every: int = 3  # where there is a window: layers 0, 3, 6, … are not local
    activation: str = "gelu_tanh"  # gelu_tanh | gelu_erf | relu | silu
    gated_mlp: bool = False  # GeGLU (gelu_erf) and SwiGLU (silu): a second product times the activated one, without biases
    biases: bool = True  # of dense layers; the decoder always has one
    pre_norm: bool = False  # norms before each sublayer and one at the end, instead of behind each sublayer
    first_norm: bool = True  # of pre_norm, whether the first sublayer has one too (ModernBERT: False)
    embedding_norm: bool = True
    norm: str = "layer"  # layer | rms
    norm_bias: bool = True  # of layer norms
    norm_eps: float = 1e-12
    head_transform: bool = True  # whether a dense layer, activation and norm stand before the decoder
    dropout: float = 0.0
    attention_dropout: float = 0.0
    init_std: float = 0.02
    init_truncated: bool = True  # BERT: truncated normal; Hugging Face and RoBERTa: plain normal
    init_scaled: bool = False  # Megatron and ModernBERT: kernels onto the residual stream at init_std / √(2 · num_layers)
    tie_embeddings: bool = True
    image_size: int = 0  # pixels of a side of the image beside each text (ViLT); 0: text alone
    patch_size: int = 16  # of a side of the squares that it is cut into, each a token of the encoder

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def embedding_dim(self) -> int:
        """The width of the embedding tables."""
        return self.table_dim or self.embed_dim

    def is_local(self, layer: int) -> bool:
        """Whether a layer's tokens see only `local_window` of their segment to either side."""
        return self.local_window > 0 and layer % self.global_every != 0


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """What is predicted and what the encoder sees in its place."""

    policy: str = "token"  # token | whole_word | span | ngram | pmi
    rate: float = 0.15  # of the row's real tokens
    mask_prob: float = 0.8  # of the chosen positions: shown as [MASK]
    random_prob: float = 0.1  # shown as a random token; the rest is shown unchanged
    random_from: str = "regular"  # regular | vocab: whether random tokens may be special ones (BERT: vocab)
    include_special: bool = False  # whether CLS and SEP may be chosen (fairseq's RoBERTa does)
    static: bool = False  # the same mask in every epoch (BERT's original data), for ablation
    max_words: int = 10  # span and ngram: the longest stretch of whole words (ALBERT's n-grams: 3)
    span_p: float = 0.2  # span: lengths are geometric with this parameter (ngram: in proportion to 1 / length)
    rate_spread: float = 0.0  # each example draws its own rate, uniform within this distance of the rate
    schedule: str = "constant"  # constant | linear | cosine | step: how rate and probabilities go to their final values
    schedule_start: int = 0  # updates before they begin to move, or (step) before they change
    schedule_steps: int = 0  # updates that they take for it; 0 lasts to the end of the run
    final_rate: float = -1.0  # -1 stays as it began, here and below
    final_mask_prob: float = -1.0
    final_random_prob: float = -1.0
    ngrams: str = ""  # pmi: a text file, an n-gram a line, whose words are masked together

    @property
    def span_lengths(self) -> tuple[float, ...]:
        """For span and ngram, the probabilities of 1, 2, … words: cut off at `max_words`, where they sum to 1 again."""
        lengths = range(1, self.max_words + 1)
        weights = [1.0 / n if self.policy == "ngram" else (1.0 - self.span_p) ** (n - 1) for n in lengths]
        return tuple(weight / sum(weights) for weight in weights)


@dataclasses.dataclass(frozen=True)
class SpanBoundaryConfig:
    """For the objective 'span': each masked token is also predicted from the two ends of its span."""

    max_targets: int = 15  # tokens of a span that are, counted from its left end
    position_dim: int = 200  # of the embeddings of their distance from there
    loss_weight: float = 1.0  # of this prediction, beside that of masked tokens


@dataclasses.dataclass(frozen=True)
class RtdConfig:
    """Replaced-token detection: `model` is the discriminator, and the generator a fraction of it with the same tables."""

    generator_size: float = 0.25  # of the discriminator's width, heads and mlp
    generator_layers: float = 1.0  # of its layers
    generator_weight: float = 1.0  # of the loss of each network
    discriminator_weight: float = 50.0
    embedding_sharing: str = "tied"  # tied (ELECTRA) | disentangled (DeBERTaV3: the generator's, fixed, plus a difference)

    def generator(self, model: ModelConfig) -> ModelConfig:
        """The generator's architecture: each size rounded, at least one layer and one head."""
        return dataclasses.replace(
            model,
            num_layers=max(1, round(model.num_layers * self.generator_layers)),
            embed_dim=round(model.embed_dim * self.generator_size),
            table_dim=model.embedding_dim,
            num_heads=max(1, round(model.num_heads * self.generator_size)),
            mlp_dim=round(model.mlp_dim * self.generator_size),
        )


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """For objective = diffusion, which draws a mask rate for each row."""

    min_rate: float = 1e-3  # rates are uniform from here to 1
    scored_share: float = 1.0  # of a row's positions, how many are scored at most: a random subset of its masked tokens
    draws: int = 4  # numbers of masks at which an evaluation scores each row


@dataclasses.dataclass(frozen=True)
class HybridConfig:
    """For objective = hybrid, which masks some rows and reads the others from left to right."""

    causal_share: float = 0.0625  # of a batch's rows; 1 is plain causal language modelling


@dataclasses.dataclass(frozen=True)
class ImageTextConfig:
    """For objective = image_text: what is learned beside masked text."""

    match_weight: float = 1.0  # of telling a text's own image from another's; 0: no text is shown another's
    exchange_rate: float = 0.5  # share of the examples that are; their masked text counts for nothing
    patch_mask_rate: float = 0.0  # share of an image's patches that are hidden and predicted (MAE: 0.75)
    patch_weight: float = 1.0  # of that prediction

    @property
    def exchanged(self) -> float:
        """The share of the examples that are shown another's image."""
        return self.exchange_rate if self.match_weight else 0.0


# The objectives of fine-tuning, and what the best evaluation can be chosen by (more is better; a regression has rmse too).
TASKS = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "tagging": ("f1", "precision", "recall"),
    "question_answering": ("f1", "exact_match"),
}


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Fine-tuning: what an objective of `TASKS` learns from. Rows are cut or divided at the stage's `seq_len`."""

    train: str = ""  # a file or glob of .tsv, .csv, .jsonl, .parquet, CoNLL columns or SQuAD's .json, a folder of texts in
    # a folder for each label, or tfds:NAME#SPLIT, hf:NAME#SPLIT
    dev: str = ""  # the same, for the choice of the best checkpoint; empty: a part of train, chosen by its text's hash
    dev_fraction: float = 0.1  # that part
    text: str = "text"  # column of the text; a number counts from 0 in a file whose first line names no columns
    pair: str = ""  # of a second text; empty: there is none
    label: str = "label"
    labels: tuple[str, ...] = ()  # as their ids count them; empty: those found in train, sorted (tagging: without B- and I-)
    class_weights: tuple[float, ...] = ()  # of the loss, for classification, in the same order; empty: all 1
    pooling: str = "cls"  # cls (the first token, through a dense layer) | mean; for classification and regression
    activation: str = "tanh"  # of it: tanh (BERT) | gelu_erf (ELECTRA, ModernBERT) | relu (DistilBERT) | gelu_tanh | silu
    transform: bool = False  # ModernBERT: a norm stands behind that layer, and both before every task's output
    transform_bias: bool = False  # whether it then has a bias
    stride: int = 64  # tagging and answers: tokens between the beginnings of the windows that a long text is divided into
    max_answer_tokens: int = 30
    null_answers: bool = False  # SQuAD 2.0: a question may have no answer
    null_threshold: float = 0.0  # by how much "no answer" must score above the best answer
    epochs: int = 3  # 0: as many steps as the stage has
    warmup: float = 0.1  # share of the steps; with epochs = 0 optimizer.warmup_steps counts
    dropout: float = 0.1  # of hidden states and attention, in place of the model's
    buckets: tuple[int, ...] = (16, 32, 64, 128, 256)  # rows are padded to the shortest of these that holds them
    metric: str = ""  # of the dev examples, that the best checkpoint is chosen by; empty: the first of the task's
    patience: int = 0  # evaluations without a better one that end the run; 0: none do
    random_init: bool = False  # the architecture and tokenizer of init_from, but random parameters, to compare with


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and the learning-rate curve over the whole run (a stage may restart it)."""

    name: str = "adamw"  # adamw | stable_adamw | lamb
    learning_rate: float = 1e-4  # peak
    schedule: str = "linear"  # constant | linear | cosine | inverse_sqrt | one_minus_sqrt | wsd
    warmup_steps: int = 0
    decay_steps: int = 0  # wsd only: length of the final decay
    end_factor: float = 0.0  # final learning rate as a fraction of the peak
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.01
    decay_at_peak: bool = False  # weight_decay is the share that a step takes at the peak; else it is times the rate
    decay_embeddings: bool = True
    decay_norms_and_biases: bool = False  # fairseq's RoBERTa: True
    bias_correction: bool = True  # BERT's own Adam: False
    clip_norm: float = 1.0  # global gradient norm; 0 is off
    layer_decay: float = 1.0  # the learning rate of each layer as a share of the next one's, embeddings being the first
    ema_decay: float = 0.0  # exponential moving average of the parameters; 0 keeps none


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One piece of a run: so many steps on rows of one length."""

    steps: int = 1000
    seq_len: int = 128
    batch_size: int = 256  # rows in a global step
    accumulation: int = 1  # micro-batches that a step is split into
    learning_rate: float = 0.0  # above 0: the schedule restarts in this stage with this peak
    warmup_steps: int = 0  # of a restarted schedule
    schedule: str = ""  # of a restarted schedule; empty: optimizer.schedule
    mask_rate: float = 0.0  # above 0: replaces masking.rate in this stage
    weights: tuple[float, ...] = ()  # one for each of data.sources, in their order: replaces their weights in this stage
    rope_base: float = 0.0  # above 0: replaces model.rope_base from this stage on (ModernBERT's extension to 8,192: 160,000)


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the same mathematics is executed; may change between a run and its continuation."""

    dtype: str = "auto"  # auto (bfloat16 on TPU and GPU, float32 on CPU) | float32 | bfloat16
    layers: str = "auto"  # auto (unrolled on CPU, scan elsewhere) | scan | unroll
    remat: str = "none"  # none | dots | full
    attention: str = "auto"  # auto | xla | row | splash | cudnn
    head_chunk: int = 128  # diffusion and hybrid: positions of a row whose logits are held at a time; 0 holds all


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """Sizes of the mesh's axes, and what is divided over them; -1 (once) takes the devices that are left.

    Replicated: data=-1. ZeRO: data=-1, zero=True. FSDP: data=1, fsdp=-1. FSDP and tensor: data=1, fsdp=-1, tensor=4.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slice: int = 1  # TPU slices, or hosts of GPUs, joined by a slower network than their own
    zero: bool = False  # float32 parameters, moments and average are divided over data, and gathered once a step


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop around the step. Counts are in steps."""

    log_every: int = 50
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    max_nonfinite: int = 10  # consecutive skipped updates before the run stops
    max_epochs: int = 0  # the stages may pass over the training text so often, all together; 0: as often as they like
    wandb_project: str = ""  # with the extra wandb


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss under frozen masks, the same for every run whatever its training rate."""

    every: int = 500  # steps between evaluations while training; 0 only at the end
    batch_size: int = 64
    max_rows: int = 2048  # of a mixture's sources together
    mask_rate: float = 0.15
    seed: int = 1234
    probes: tuple[str, ...] = ()  # texts with [MASK] that are filled in at each evaluation, for the report


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str
    seed: int = 0
    objective: str = "mlm"  # mlm | span | rtd | diffusion | hybrid | image_text, or one of TASKS
    init_from: str = ""  # a workdir whose newest parameters the run begins with, as `import` writes one; empty: random ones
    reference_topology: str = ""  # where the recipe is known to fit, as `compile` names it: v5e:4x4; empty for a CPU
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    masking: MaskingConfig = MaskingConfig()
    span_boundary: SpanBoundaryConfig = SpanBoundaryConfig()
    rtd: RtdConfig = RtdConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    hybrid: HybridConfig = HybridConfig()
    image_text: ImageTextConfig = ImageTextConfig()
    task: TaskConfig = TaskConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    stages: tuple[StageConfig, ...] = (StageConfig(),)
    compute: ComputeConfig = ComputeConfig()
    sharding: ShardingConfig = ShardingConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def first_step(self, stage: int) -> int:
        """The updates done before the stage of this index."""
        return sum(earlier.steps for earlier in self.stages[:stage])

    def stage_of(self, step: int) -> int:
        """The index of the stage that the last of these updates belongs to."""
        return max(index for index in range(len(self.stages)) if index == 0 or self.first_step(index) < step)

    def at_stage(self, stage: int) -> "Config":
        """The same with the model's positions as they are rotated in the stage of this index."""
        bases = [each.rope_base for each in self.stages[: stage + 1] if each.rope_base]
        return dataclasses.replace(self, model=dataclasses.replace(self.model, rope_base=bases[-1])) if bases else self

    @property
    def networks(self) -> dict[str, ModelConfig]:
        """The architecture of each network that the objective trains, by what stands before its fields in a message."""
        generator = {"the generator's ": self.rtd.generator(self.model)} if self.objective == "rtd" else {}
        return {"model.": self.model} | generator

    def languages(self, language: str) -> tuple[int, ...]:
        """The number of a `SourceConfig.language`, or of each of a pair's two: counted from 1; of no language, none."""
        return tuple(self.model.languages.index(name) + 1 for name in language.split(",")) if language else ()

    def weights(self, stage: StageConfig) -> tuple[float, ...]:
        """Those of data.sources in a stage."""
        return stage.weights or tuple(source.weight for source in self.data.sources)

    def mask_rate(self, stage: StageConfig) -> float:
        """The rate that a stage trains with, where no schedule moves it."""
        return stage.mask_rate or self.masking.rate
