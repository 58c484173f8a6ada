"""Every setting of a run, typed and documented. Unknown keys and wrong types are errors (jsonargparse).

The text under each field is what ``--help`` prints. Imports nothing heavy: ``--help`` must answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from onpolicy.health_config import HealthConfig
from onpolicy.prompts.config import PromptsConfig

Schedule = Literal["constant", "linear", "cosine"]


@dataclass
class TeacherConfig:
    """The model that scores."""

    model: str = "smollm2-135m-instruct"
    """Checkpoint directory, hub id, or `smollm2-135m-instruct` (comes with the installation, no download)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of its forward pass."""
    weight: float = 1.0
    """Its say among several teachers, relative to the others' weights."""


@dataclass
class LoraSettings:
    """Train a low-rank adapter instead of the weights (peft)."""

    rank: int = 0
    """Rank of the update; 0 trains the weights themselves."""
    alpha: float = 16.0
    """Scale: the update is alpha / rank * B @ A."""
    target_modules: list[str] | None = None
    """Module names to adapt, e.g. [q_proj, v_proj, lm_head]; default: every linear layer but the head."""


@dataclass
class StudentConfig:
    """The model being trained."""

    model: str | None = None
    """Checkpoint directory or hub id; default: the teacher, pruned in depth."""
    num_layers: int = 4
    """How many evenly spaced layers a pruned student keeps (first and last included)."""
    layers: list[int] | None = None
    """The teacher's layers a pruned student keeps, by index; overrides num_layers."""
    freeze_embeddings: bool = False
    """Leave the embedding and output matrices as they are: a third of the update's cost for a small student."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Of its matrix products in training; weights and optimizer stay float32."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    draft_vocabulary: int = 8192
    """Tokens its head keeps when it drafts, those most frequent in the teacher's warm-start samples (a file beside the
    student; the student itself is whole); 0: all. Rarer tokens are never drafted, which costs a little acceptance."""


@dataclass
class SamplingConfig:
    """How the student samples its rollouts."""

    temperature: float = 1.0
    """Applied to student and teacher alike, in sampling and in the loss."""
    top_p: float = 1.0
    """Nucleus mass kept, in (0, 1]."""
    top_k: int = 0
    """Tokens kept; 0 keeps all."""
    max_tokens: int = 96
    """Completion tokens at most."""
    samples_per_prompt: int = 4
    """Completions of each prompt; they share the prompt's computation."""


@dataclass
class RolloutsConfig:
    """The engine that samples."""

    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """auto: vLLM where it is installed, else transformers."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the sampler's weights."""
    max_num_seqs: int = 64
    """Sequences decoded together."""
    kv_cache_gib: float | None = None
    """Memory for vLLM's keys and values, GiB; default: room for max_num_seqs of the longest sequences, at most 4."""
    parity_bound: float = 0.2
    """Stop when the sampler's log-probs of its own tokens differ from the trainer's by more than this, mean nats. In
    bf16 a healthy student shows 0.03, one that was just pruned (and is sure of nonsense) 0.12."""


@dataclass
class WarmStartConfig:
    """Forward KL on the teacher's own samples, before the on-policy phase (a pruned student starts near zero)."""

    num_prompts: int = 0
    """Training prompts the teacher answers; 0 skips the phase."""
    samples_per_prompt: int = 4
    """Completions the teacher draws of each."""
    epochs: int = 1
    """Passes over the teacher's samples."""
    rollouts_per_step: int = 32
    """Completions an update."""
    learning_rate: float = 1e-3
    """Peak learning rate of the phase."""
    divergence: str = "forward_kl"
    """Any name of onpolicy.losses.names()."""


@dataclass
class GKDConfig:
    """Full-vocabulary divergence on sampled prefixes (generalised knowledge distillation, 2306.13649)."""

    divergence: str = "jsd"
    """Any name of onpolicy.losses.names()."""
    beta: float = 1.0
    """Of jsd: 0 is forward KL, 1 is reverse KL."""
    lmbda: float = 1.0
    """Probability that a prompt's completions are the student's (GKD's coin, thrown for each prompt instead of each
    batch); else it is the dataset's own completion, once. A student's prompt brings sampling.samples_per_prompt = n
    completions, so of completions the student's share is n lmbda / (n lmbda + 1 - lmbda): lmbda itself for n = 1."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of the divergence, e.g. {top_k: 64}."""


@dataclass
class PolicyGradientConfig:
    """Per-token reward log pi_T - log pi_S on sampled tokens, truncated importance weights."""

    estimate: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the divergence; what each one's gradient is: docs/estimators.md."""
    place: Literal["reward", "loss", "ratio"] = "reward"
    """Estimate used as a reward, differentiated as a loss, or both."""
    discount: float = 0.0
    """0: each token answers for itself; above 0: earlier tokens answer for later rewards."""
    reward_clip: float | None = None
    """Bound on a token's reward, nats."""
    whitening: Literal["none", "mean", "mean_std"] = "none"
    """Of the advantages, over all tokens of an update; costs one more forward pass."""
    correction: Literal["none", "truncate", "mask", "clip"] = "truncate"
    """Of trainer against sampler probability: TIS, IcePop, PPO's clip, or none."""
    ratio_level: Literal["token", "prefix", "sequence"] = "token"
    """How much of a completion the importance ratio covers."""
    ratio_cap: float = 2.0
    """truncate: ratios are cut at this value."""
    ratio_range: tuple[float, float] = (0.5, 5.0)
    """mask: tokens with ratios outside are left out."""
    clip_range: tuple[float, float] = (0.2, 0.2)
    """clip: allowed change below and above 1."""
    control_variate: Literal["none", "expected", "least_variance"] = "expected"
    """Subtracted from returns: a number that depends on the prefix alone. expected: the closed-form mean reward,
    -KL(student, teacher) (2605.07865). least_variance: what leaves the gradient by the logits least variance, for more
    sums over the vocabulary; it also helps a student that is sure of itself. Effects: docs/estimators.md. Needs
    place: reward."""
    extrapolation: float = 1.0
    """Beyond 1: away from reference_model, past the teacher (2602.12125); needs estimate: k1 and place: reward."""
    reference_model: str | None = None
    """Checkpoint directory or hub id that extrapolation leads away from, usually what the student or the teacher was
    before it was trained. Loaded in the teacher's dtype."""
    task_weight: float = 0.0
    """Nats that a completion earns, beside the teacher's reward, for ending at its prompt's answer; 0 does not look.
    An unfinished completion earns nothing. Needs place: reward, and prompts with answers (prompts.answer_column)."""
    task_placement: Literal["sequence", "last"] = "sequence"
    """Which tokens the task's reward credits: all of the completion's, or the last, to be carried back by discount."""


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    learning_rate: float = 2e-4
    """Peak learning rate of the on-policy phase."""
    schedule: Schedule = "cosine"
    """Decay after warm-up, over each phase."""
    warmup_steps: int = 5
    """Updates of linear warm-up, in each phase."""
    final_scale: float = 0.1
    """Learning rate at the end of a phase, as a share of its peak (linear and cosine)."""
    weight_decay: float = 0.0
    """Decoupled."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averages."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    updates_per_step: int = 1
    """Optimizer updates from one step's rollouts (whole prompts each); 1 is strictly on-policy."""
    normalize: Literal["token", "sequence"] = "token"
    """Every completion token counts the same, or every completion."""


@dataclass
class BatchingConfig:
    """How rollouts become tensors."""

    token_budget: int = 4096
    """Positions of one forward pass, padding included; bounds activation memory."""
    share_prompts: bool = True
    """Compute a prompt once for all its completions (checked at start: the layers must pass attention arguments on)."""


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    every: int = 10
    """Steps between checkpoints; the last step of a phase is always saved."""
    keep: int = 2
    """Checkpoints kept."""


@dataclass
class EvaluationConfig:
    """Held-out evaluation at the start, after the warm start and at the end."""

    num_prompts: int = 32
    """Held-out prompts used; 0 skips evaluation."""
    max_tokens: int = 96
    """Length of the completions it is measured on."""


@dataclass
class LoggingConfig:
    """What is written while it runs, beside metrics.jsonl."""

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers of accelerate, e.g. [tensorboard, wandb]; [] for none."""
    progress: bool = True
    """Progress bar on the terminal."""


@dataclass
class TrainConfig:
    """On-policy distillation: sample, score, update, sync."""

    name: str = "run"
    """Names the run's directory."""
    output_dir: str = "runs"
    """The run writes to output_dir/name."""
    seed: int = 0
    """Every random stream derives from it."""
    steps: int = 50
    """On-policy steps."""
    prompts_per_step: int = 8
    """Prompts sampled in each."""
    algorithm: Literal["gkd", "policy_gradient"] = "gkd"
    """Which update; its settings are in the section of the same name."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    other_teachers: list[TeacherConfig] = field(default_factory=list)
    """Further teachers with the same tokenizer, each with its weight: on-policy updates descend the weighted mean of
    all teachers' divergences. Warm start, held-out figures and pruning know the first alone."""
    student: StudentConfig = field(default_factory=StudentConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollouts: RolloutsConfig = field(default_factory=RolloutsConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    gkd: GKDConfig = field(default_factory=GKDConfig)
    policy_gradient: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
