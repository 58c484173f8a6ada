"""``student/README.md``: the model card of a student, in the hub's format (YAML front matter, then Markdown)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from onpolicy.checkpoint import atomic_file
from onpolicy.config import TrainConfig
from onpolicy.evaluate import figures
from onpolicy.evaluate.figures import number
from onpolicy.evaluate.provenance import UNKNOWN, Origin, num_layers, num_parameters, origin_of, versions
from onpolicy.evaluate.usage import code, usage_section
from onpolicy.prompts.config import DEFAULT_WORD_PROBLEMS, WORD_PROBLEMS, SourceConfig
from onpolicy.student import check_layers, evenly_spaced

TAGS = ["on-policy-distillation", "speculative-decoding"]


def write_model_card(student_dir: Path, config: TrainConfig, summary: dict[str, Any]) -> None:
    """Write ``student_dir/README.md``, whole or not at all; the same run and installation give the same bytes.

    ``student_dir`` holds the saved student (its size is read from there), ``summary`` what summary.json will hold; a
    missing ``heldout`` leaves the table out.
    """
    teacher = origin_of(config.teacher.model)
    base = teacher if config.student.model is None else origin_of(config.student.model)
    sections = [
        _front_matter(teacher, base),
        _introduction(student_dir, config, teacher, summary),
        _licence_section(teacher, base),
        _making_section(config),
        _data_section(config),
        _figures_section(config, summary.get("heldout") or {}),
        usage_section(teacher, config.prompts.template == "chat"),
        _versions_section(),
    ]
    with atomic_file(student_dir / "README.md") as file:
        file.write("\n\n".join(sections) + "\n")


def licence_of(teacher: Origin, base: Origin) -> str:
    """The licence to declare: the teacher's, or "other" when the student's own starting point has another one."""
    return teacher.licence if base.licence == teacher.licence else "other"


def _front_matter(teacher: Origin, base: Origin) -> str:
    values = {
        "base_model": base.name,
        "license": licence_of(teacher, base),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": TAGS,
    }
    return "---\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True) + "---"


def _introduction(student_dir: Path, config: TrainConfig, teacher: Origin, summary: dict[str, Any]) -> str:
    size = num_parameters(student_dir)
    how = "it was trained on completions its teacher sampled"
    if config.steps:
        how = "it sampled its own completions, the teacher scored every token, and it learnt from that"
    parameters = f" ({number(size / 1e6)} million parameters)" if size else ""
    return (
        f"# {' '.join(config.name.split())}\n\n"
        f"A student{parameters} of {code(teacher.name)}, distilled with onpolicy: {how}. It is meant as the draft "
        "model of speculative decoding with that teacher, and can be used alone where speed matters more than "
        f"quality.\n\n{figures.headline(summary.get('heldout') or {})}"
    )


def _licence_section(teacher: Origin, base: Origin) -> str:
    lines = [f"- Teacher: {_named(teacher)}"]
    if base is not teacher:
        lines.append(f"- Starting point of the student: {_named(base)}")
    lines.append("")
    if licence_of(teacher, base) == UNKNOWN:
        lines.append("No licence was found beside the teacher. Check before publishing, and set `license` above.")
    elif base.licence != teacher.licence:
        lines.append("The two licences differ or one is unknown: check what both allow before publishing.")
    else:
        lines.append("This student is derived from the teacher and is passed on under the same licence.")
    return "## Teacher and licence\n\n" + "\n".join(lines)


def _named(origin: Origin) -> str:
    licence = "unknown: check before publishing" if origin.licence == UNKNOWN else origin.licence
    return f"{code(origin.name)}{'' if origin.hub else ' (a local checkpoint)'}, licence: {licence}"


def _making_section(config: TrainConfig) -> str:
    lines = [_start_line(config)]
    if config.student.lora.rank:
        lora = config.student.lora
        where = ", ".join(lora.target_modules) if lora.target_modules else "every linear layer but the head"
        lines.append(f"LoRA adapter of rank {lora.rank}, alpha {lora.alpha:g}, on {where}; merged into these weights.")
    elif config.student.freeze_embeddings:
        lines.append("Embedding and output matrices were left as they are.")
    warm = config.warm_start
    if warm.num_prompts:
        lines.append(
            f"Warm start: {code(warm.divergence)} on the teacher's own completions, {warm.num_prompts:,} prompts × "
            f"{warm.samples_per_prompt}, {_count(warm.epochs, 'epoch')}, learning rate {warm.learning_rate:g}."
        )
    if config.steps:
        lines.append(_on_policy_line(config))
        if config.other_teachers:
            weighed = [f"{_named(origin_of(each.model))}, weight {each.weight:g}" for each in config.other_teachers]
            lines.append(f"Further teachers (the first has weight {config.teacher.weight:g}): {'; '.join(weighed)}.")
        lines.append(f"Update: {_update(config)}.")
    lines.append(f"Seed {config.seed}.")
    return "## How it was made\n\n" + "\n".join(f"- {line}" for line in lines)


def _start_line(config: TrainConfig) -> str:
    student = config.student
    if student.model is not None:
        return f"Start: {code(origin_of(student.model).name)}."
    of = num_layers(config.teacher.model)
    if of is None:
        kept = f"layers {_joined(student.layers)}" if student.layers else f"{student.num_layers} evenly spaced layers"
        return f"Start: the teacher, pruned in depth to {kept}."
    layers = check_layers(student.layers, of) if student.layers else evenly_spaced(student.num_layers, of)
    kept = f"{len(layers)} of its {of} layers: {_joined(layers)} (counted from 0)"
    return f"Start: the teacher, pruned in depth to {kept}."


def _on_policy_line(config: TrainConfig) -> str:
    sampling = config.sampling
    cut = f", top-p {sampling.top_p:g}" if sampling.top_p < 1 else ""
    cut += f", top-k {sampling.top_k}" if sampling.top_k else ""
    return (
        f"On-policy: {_count(config.steps, 'step')} of {config.prompts_per_step} prompts × "
        f"{sampling.samples_per_prompt} completions of up to {sampling.max_tokens} tokens, sampled at temperature "
        f"{sampling.temperature:g}{cut}; learning rate {config.optim.learning_rate:g} ({config.optim.schedule})."
    )


def _update(config: TrainConfig) -> str:
    if config.algorithm == "policy_gradient":
        pg = config.policy_gradient
        subtracted = {"none": "", "expected": ", closed-form control variate", "least_variance": ", best baseline"}
        beyond = ""
        if pg.reference_model is not None:
            beyond = f", extrapolated {pg.extrapolation:g} times from {code(origin_of(pg.reference_model).name)}"
        task = f", right answers rewarded with {pg.task_weight:g}" if pg.task_weight else ""
        return (
            f"policy gradient with the per-token reward log π_T − log π_S ({pg.estimate} in the {pg.place}, discount "
            f"{pg.discount:g}, importance correction: {pg.correction}{subtracted[pg.control_variate]}{beyond}{task})"
        )
    gkd = config.gkd
    known = {0.0: ", which is forward KL", 1.0: ", which is reverse KL"}
    beta = f" with β = {gkd.beta:g}{known.get(gkd.beta, '')}" if gkd.divergence == "jsd" else ""
    share = "" if gkd.lmbda == 1 else f"; {gkd.lmbda:.0%} of the prompts on-policy, the rest on the data's completions"
    options = f", {', '.join(f'{k}={v}' for k, v in sorted(gkd.options.items()))}" if gkd.options else ""
    return f"GKD, full-vocabulary {code(gkd.divergence)}{beta}{options}{share}"


def _data_section(config: TrainConfig) -> str:
    prompts = config.prompts
    parts = prompts.sources()
    lines = []
    for part in parts:
        weight = f" (weight {part.weight:g})" if len(parts) > 1 else ""
        lines.append(f"Training prompts: {_source(part, prompts.seed)}{weight}.")
    builtin = any(s.source == WORD_PROBLEMS for s in parts)
    if prompts.size or builtin:
        lines.append(f"At most {prompts.size or DEFAULT_WORD_PROBLEMS:,} training prompts.")
    heldout = prompts.heldout()
    apart = _source(heldout, prompts.seed) if heldout else "set apart from the same source by content hash"
    lines.append(f"Held-out prompts: up to {prompts.heldout_size:,}, {apart}; none of them was trained on.")
    mixed = config.steps and config.algorithm == "gkd" and config.gkd.lmbda < 1
    lines.append(f"Completions were sampled from the models themselves{', or came with the data' if mixed else ''}.")
    return "## Data\n\n" + "\n".join(f"- {line}" for line in lines)


def _source(source: SourceConfig, seed: int) -> str:
    if source.source == WORD_PROBLEMS:
        return f"word problems from onpolicy's built-in generator (`{WORD_PROBLEMS}`, seed {seed}); no outside data"
    path = Path(source.source)
    named = code(path.name if path.exists() else source.source) + (" (local)" if path.exists() else "")
    extra = [f"{key} {code(value)}" for key, value in (("subset", source.subset), ("split", source.split)) if value]
    return ", ".join([named, *extra])


def _figures_section(config: TrainConfig, heldout: figures.Heldout) -> str:
    labels = figures.present_labels(heldout)
    if not labels:
        return "## Held-out figures\n\nNot measured."
    evaluation = config.evaluation
    lines = [
        f"On up to {evaluation.num_prompts} held-out prompts, completions of up to {evaluation.max_tokens} tokens, "
        "student beside teacher at temperature 1."
    ]
    for suffix, title, meaning in figures.GROUPS:
        names = [figures.LABELS.get(label, label) for label in labels]
        lines += ["", f"{title} ({meaning}):", "", _row(["", *names]), _row(["---", *["---:"] * len(names)])]
        for f in figures.FIGURES:
            values = [number(figures.value_of(heldout, label, f.key + suffix)) for label in labels]
            lines.append(_row([f.title, *values]))
    lines.append("")
    lines += [f"- {f.title} ({f.unit}, {f.better} is better). {f.meaning}" for f in figures.FIGURES]
    return "## Held-out figures\n\n" + "\n".join(lines)


def _versions_section() -> str:
    rows = [_row(["package", "version"]), _row(["---", "---"]), *(_row(pair) for pair in versions().items())]
    return "## Versions\n\n" + "\n".join(rows)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _joined(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _count(number_of: int, noun: str) -> str:
    return f"{number_of:,} {noun}{'s' * (number_of != 1)}"
