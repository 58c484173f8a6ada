"""TRL's ``DistillationTrainer`` with any divergence of this library: for those who want the losses alone.

    trainer = OnPolicyDistillationTrainer(
        model="student", teacher_model="teacher", args=DistillationConfig(...), train_dataset=dataset,
        divergence="skew_reverse_kl", divergence_options={"skew": 0.1},
    )

Sampling, batching, optimizer, logging and saving stay TRL's; the loss alone is replaced, computed by
:func:`onpolicy.losses.chunked` from the hidden states that TRL computes. docs/trl.md shows a whole script.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from trl import DistillationConfig, DistillationTrainer

from onpolicy.losses import chunked
from onpolicy.losses._checks import checked_options

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedModel


def _check_trl() -> None:
    """ImportError where TRL has no such methods: an override nobody calls would leave TRL's loss in place, silently."""
    expected = {"_compute_loss": "unwrapped_student inputs num_items_in_batch", "_get_last_hidden_state": ""}
    for name, parameters in expected.items():
        method = getattr(DistillationTrainer, name, None)
        found = inspect.signature(method).parameters if method is not None else ()
        if method is None or not set(parameters.split()) <= set(found):
            raise ImportError(
                f"this TRL's DistillationTrainer has no {name}({', '.join(parameters.split())}), where the loss is "
                "replaced; install trl 1.16, the version this was tested with"
            )


_check_trl()


class OnPolicyDistillationTrainer(DistillationTrainer):
    """``DistillationTrainer`` that minimises ``divergence``, one of :func:`onpolicy.losses.names`.

    ``divergence_options`` are its own options (``{"skew": 0.1}``, ``{"alpha": 0.5}``) and, for every divergence,
    ``top_k`` and ``support``. The temperature is TRL's, ``args.temperature``, in sampling and loss alike. Without
    ``divergence`` the objective is TRL's own: jsd with ``args.beta``.

    Everything else, positional arguments included, is as in TRL. Raises ValueError for unknown names and options,
    for ``args.beta`` where it would have no effect, and for what the loss cannot be computed from: no local teacher,
    Liger kernels, parameters sharded by FSDP or DeepSpeed ZeRO-3, a head that is not a plain matrix product.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: DistillationConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        *more: Any,
        divergence: str = "jsd",
        divergence_options: Mapping[str, Any] | None = None,
        **trl_arguments: Any,
    ):
        settings = args or DistillationConfig(bf16=False)  # TRL makes its own; only its defaults are looked at
        self.divergence = divergence
        self.divergence_options = check_divergence(divergence, divergence_options or {}, settings)
        if teacher_model is None:
            raise ValueError(
                "teacher_model is missing: a divergence needs the teacher's hidden states, so the teacher must be a "
                "local model; a server (TRL's ServerDistillationTrainer) returns only some log-probs"
            )
        if settings.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel: Liger's kernels are untested with this loss, whose head is not the model's; unset it"
            )
        super().__init__(model, teacher_model, args, train_dataset, *more, **trl_arguments)
        if self.is_fsdp_enabled or (self.is_deepspeed_enabled and settings.deepspeed_plugin.zero_stage == 3):
            raise ValueError(
                "FSDP and DeepSpeed ZeRO-3 shard the head, which this loss reads whole; train with DDP or ZeRO-2, or "
                "use TRL's own DistillationTrainer"
            )
        for who, unwrapped in (("student", self.model), ("teacher", self.accelerator.unwrap_model(self.teacher_model))):
            check_plain_head(who, unwrapped)

    def _compute_loss(
        self, unwrapped_student: PreTrainedModel, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, sum of student entropies, number of tokens) of one micro-batch; called by TRL's ``compute_loss``."""
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        student_head, teacher_head = unwrapped_student.get_output_embeddings(), teacher.get_output_embeddings()
        device = student_head.weight.device
        if teacher_head.weight.device != device:
            raise ValueError(
                f"the student's head is on {device} and the teacher's on {teacher_head.weight.device}; place both on "
                "one device in their device_map"
            )
        student_hidden = self._completion_states(unwrapped_student, inputs)
        self.teacher_model.eval()
        with torch.no_grad():
            teacher_hidden = self._forward_redirection(
                self.teacher_model, teacher, self._completion_states, teacher, inputs
            )
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)  # what a tool said is not the student's doing
        loss, metrics = chunked(
            self.divergence,
            student_hidden.to(device).flatten(0, 1), student_head.weight,
            teacher_hidden.to(device).flatten(0, 1), teacher_head.weight,
            mask.to(device).flatten().bool(),
            token_ids=inputs["completion_ids"].to(device).flatten() if self.divergence == "kd" else None,
            temperature=self.temperature,
            denominator=None if num_items_in_batch is None else float(num_items_in_batch),
            student_bias=student_head.bias, teacher_bias=teacher_head.bias,
            **self.divergence_options,
        )  # fmt: skip
        return loss, metrics["student_entropy"].sum(), mask.sum().to(device)

    def _completion_states(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """Hidden states [B, L, D] that predict the completion tokens; images and the like are passed on."""
        known = inspect.signature(self._get_last_hidden_state).parameters
        return self._get_last_hidden_state(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            **{name: value for name, value in inputs.items() if name in known},
        )


@torch.no_grad()
def check_plain_head(who: str, model: PreTrainedModel) -> None:
    """ValueError unless the model's logits are hidden @ head.T + bias: a scale or soft cap would go unnoticed."""
    head, training = model.get_output_embeddings(), model.training
    probe = torch.arange(4, device=next(model.parameters()).device)[None] % len(head.weight)
    model.eval()
    try:
        output = model(input_ids=probe, use_cache=False, output_hidden_states=True)
    finally:
        model.train(training)
    hidden, theirs = output.hidden_states[-1].to(head.weight.device).float(), output.logits.float()
    ours = nn.functional.linear(hidden, head.weight.float(), None if head.bias is None else head.bias.float())
    scale = theirs.abs().amax().clamp_min(1e-6)
    plain = torch.allclose(ours / scale, theirs.to(ours.device) / scale, atol=2e-2)  # room for bf16 products
    # A soft cap is the identity near zero, so small logits would not show it.
    if not plain or getattr(model.config.get_text_config(), "final_logit_softcapping", None):
        raise ValueError(
            f"the {who}, a {type(model).__name__}, does not compute its logits as a plain matrix product (a scaled "
            "or soft-capped head), so this loss would be wrong for it; use TRL's own DistillationTrainer"
        )


def check_divergence(name: str, options: Mapping[str, Any], args: DistillationConfig) -> dict[str, Any]:
    """The options to compute ``name`` with, TRL's ``beta`` included where it means something. ValueError otherwise."""
    own, default_beta = dict(options), type(args).__dataclass_fields__["beta"].default
    if name == "jsd":
        if "beta" in own and args.beta not in (default_beta, own["beta"]):
            raise ValueError(f"beta is {own['beta']} in divergence_options and {args.beta} in args; set one of them")
        own = {"beta": args.beta} | own
    elif args.beta != default_beta:
        raise ValueError(f"args.beta={args.beta} has no effect on divergence {name!r}; leave it out, or choose 'jsd'")
    return checked_options(name, own, args.temperature)
