"""How to use a student, for its model card: snippets that run as they stand."""

from __future__ import annotations

import json
import re

from onpolicy.evaluate.provenance import Origin

_QUESTION = 'messages = [{"role": "user", "content": "What is 7 times 8?"}]'
_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("./student")
model = AutoModelForCausalLM.from_pretrained("./student")
{ask}
output = model.generate(**inputs, max_new_tokens=96)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
_ASK_CHAT = f"""\
{_QUESTION}
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""
_ASK_PLAIN = 'inputs = tokenizer("Seven times eight is", return_tensors="pt")'
_VLLM = """\
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        model={target},
        speculative_config={{
            "method": "draft_model",
            "model": "./student",
            "num_speculative_tokens": 3,
            "draft_sample_method": "probabilistic",
        }},
    )
{ask}"""
_VLLM_CHAT = f"""\
    {_QUESTION}
    print(llm.chat(messages, SamplingParams(temperature=0, max_tokens=96))[0].outputs[0].text)"""
_VLLM_PLAIN = """\
    print(llm.generate("Seven times eight is", SamplingParams(temperature=0, max_tokens=96))[0].outputs[0].text)"""
_NOTE = (
    "`probabilistic` samples the draft from its own distribution, which is what the acceptance at T=1 measures; vLLM's "
    "default drafts greedily. On vLLM's CPU build keep `temperature=0` unless vllm#55005 is repaired: there a draft "
    "model corrupts sampling at other temperatures."
)


def code(text: object) -> str:
    """Text as inline code, whatever it contains (CommonMark: a fence longer than any run of backticks inside)."""
    plain = " ".join(str(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    pad = " " if "`" in plain else ""
    return f"{fence}{pad}{plain}{pad}{fence}"


def usage_section(teacher: Origin, chat: bool) -> str:
    """Markdown with both snippets; ``chat`` says whether the student was trained through a chat template."""
    target = teacher.name if teacher.hub else f"./{teacher.name}"
    where = "Run where `./student` is this directory" + ("." if teacher.hub else f" and {code(target)} the teacher.")
    alone = _TRANSFORMERS.format(ask=_ASK_CHAT if chat else _ASK_PLAIN)
    draft = _VLLM.format(target=json.dumps(target), ask=_VLLM_CHAT if chat else _VLLM_PLAIN)
    parts = [
        "## Use", where, "Alone, with transformers:", f"```python\n{alone}\n```",
        "As the draft of its teacher, with vLLM:", f"```python\n{draft}\n```", _NOTE,
    ]  # fmt: skip
    return "\n\n".join(parts)
