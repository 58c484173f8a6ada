"""Prompts: from a data set, or the built-in word problems, to templated token ids, in a resumable order.

``config`` what can be set; ``sources`` rows from files and hubs; ``examples`` columns; ``word_problems`` and
``stories`` the built-in source; ``load`` training and held-out sets; ``templates`` chat templating, defined once;
``answers`` checking; ``order`` the cursor of the training loop.
"""

from onpolicy.prompts.answers import check_answer, final_answer
from onpolicy.prompts.config import PromptsConfig, SourceConfig, WeightedSource
from onpolicy.prompts.load import check_source, load_prompts
from onpolicy.prompts.order import PromptOrder
from onpolicy.prompts.templates import encode_completion, end_of_turn_id, prepare_tokenizer, render
from onpolicy.prompts.word_problems import WordProblem, word_problems

__all__ = [
    "PromptOrder",
    "PromptsConfig",
    "SourceConfig",
    "WeightedSource",
    "WordProblem",
    "check_answer",
    "check_source",
    "encode_completion",
    "end_of_turn_id",
    "final_answer",
    "load_prompts",
    "prepare_tokenizer",
    "render",
    "word_problems",
]
