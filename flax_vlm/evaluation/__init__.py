# SPDX-License-Identifier: Apache-2.0
"""What is measured.

build(EVALUATORS, {"name": "zero_shot", ...}, "evaluator", dataset=..., batch_size=...)
"""

from flax_vlm.evaluation.answers import Answers
from flax_vlm.evaluation.captioning import Captioning
from flax_vlm.evaluation.classification import Classification
from flax_vlm.evaluation.multiple_choice import MultipleChoice
from flax_vlm.evaluation.pope import Pope
from flax_vlm.evaluation.retrieval import Retrieval
from flax_vlm.evaluation.two_choice import TwoChoice
from flax_vlm.evaluation.vqa import Vqa
from flax_vlm.evaluation.zero_shot import ZeroShot

EVALUATORS = {
    "zero_shot": ZeroShot,
    "retrieval": Retrieval,
    "two_choice": TwoChoice,
    "classification": Classification,
    "answers": Answers,
    "vqa": Vqa,
    "pope": Pope,
    "multiple_choice": MultipleChoice,
    "captioning": Captioning,
}
