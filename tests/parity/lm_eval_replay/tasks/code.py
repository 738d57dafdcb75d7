"""Python parts of the tasks of the parity suite."""

import random
from functools import partial

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask


def shuffle_choices(dataset):
    """Draws from the global random state at load time, as several stock tasks do."""

    def one(doc):
        choices = list(doc["choices"])
        gold = choices[doc["gold"]]
        random.shuffle(choices)
        return {"choices": choices, "gold": choices.index(gold), "noise": float(np.random.rand())}

    return dataset.map(one)


def which_choice(doc):
    return doc["gold"]


def filled(doc):
    return [doc["question"].replace("_", choice) for choice in doc["choices"]]


def ending(doc):
    return "so it is"


def asked(doc, mark):
    return doc["question"] + mark


def answered(doc, mark):
    return doc["choices"][doc["gold"]] + mark


def kept(dataset, remainder):
    return dataset.filter(lambda doc: doc["gold"] % 2 == remainder)


# Functions with some arguments given, as mmlu_pro and others have them.
only_odd = partial(kept, remainder=1)
asked_loudly = partial(asked, mark="!")
asked_quietly, answered_quietly = partial(asked, mark="."), partial(answered, mark=".")


def two_metrics(doc, results):
    return {"length": len(results[0]), "pair": (len(results[0]), doc["gold"])}


def of_pairs(items):
    return sum(a * (b + 1) for a, b in items) / len(items)


class Mixed(ConfigurableTask):
    """Asks for a text and a log-likelihood of each document."""

    VERSION = 3
    DATASET_PATH = "json"

    def __init__(self, config=None):
        kwargs = (config or {}).get("dataset_kwargs")
        super().__init__(config={"metadata": {"version": self.VERSION}, "dataset_kwargs": kwargs})

    def has_training_docs(self):
        return False

    def has_validation_docs(self):
        return True

    def has_test_docs(self):
        return False

    def validation_docs(self):
        return self.dataset["test"]

    def doc_to_text(self, doc):
        return f"Q: {doc['question']}\nA:"

    def doc_to_target(self, doc):
        return " " + doc["choices"][doc["gold"]]

    def construct_requests(self, doc, ctx, chat_template=None, apply_chat_template=False, **kwargs):
        return [
            Instance(request_type="generate_until", doc=doc, arguments=(ctx, {"until": ["\n"]}), idx=0, **kwargs),
            Instance(request_type="loglikelihood", doc=doc, arguments=(ctx, " unknown"), idx=0, **kwargs),
        ]

    def process_results(self, doc, results):
        text, (logprob, _) = results
        return {"says": float(self.doc_to_target(doc).strip() in text), "unknown": logprob}

    def aggregation(self):
        return {"says": mean, "unknown": mean}

    def higher_is_better(self):
        return {"says": True, "unknown": False}


class Trimming(Mixed):
    """Takes the rendered prompt apart."""

    def construct_requests(self, doc, ctx, chat_template=None, apply_chat_template=False, **kwargs):
        ctx = ctx[: len(ctx) // 2]
        return [Instance(request_type="loglikelihood", doc=doc, arguments=(ctx, " x"), idx=0, **kwargs)]
